"""Fine-tune a model on a folder of photographs, and use what comes out.

python examples/fine_tune.py examples/photos runs/fine_tune --steps 20

The built-in model has no teacher beside it, so this trains adapters without distillation, and by
blurred MSE alone where no perceptual distance is installed; examples/recipes/finetune_24gb.yaml is
for the full model. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tadsr import TADSRPipeline
from tadsr.training import DataConfig, OptimizerConfig, Trainer, TrainingConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then load the result."""
    parser = argparse.ArgumentParser(description="Fine-tune a model on photographs.")
    parser.add_argument("photos", help="folder of sharp photographs, with sub-folders")
    parser.add_argument("output", help="folder of the run; the model will be in OUTPUT/model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--crop-px", type=int, default=128, help="side of the training squares")
    parser.add_argument("--model", default="tadsr-tiny", help="built-in name, folder or hub id")
    options = parser.parse_args(arguments)

    config = TrainingConfig(
        model=options.model,
        data=DataConfig(options.photos, crop_px=options.crop_px, num_workers=0),
        output=options.output,
        optimizer=OptimizerConfig(learning_rate=2e-5),
        steps=options.steps,
        batch_size=options.batch_size,
        log_every=1,
    )
    model = Trainer(config).train()
    pipe = TADSRPipeline.from_pretrained(model)
    print(f"{model}: {sum(p.numel() for p in pipe.unet.parameters()):,} parameters in the UNet")
    print(f"tadsr upscale photo.jpg --model {model}")


if __name__ == "__main__":
    main()
