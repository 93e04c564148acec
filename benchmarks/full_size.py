"""Load a full-size model from the published layout and upscale one photo; time and memory.

python benchmarks/full_size.py --folder /tmp/full --photo photo.png

The weights are random: what is measured is that files of the published names, shapes and kinds
(`.bin` and a pickle among them) load and run, how long that takes and how much memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

LAYOUT = Path(__file__).parents[1] / "tests" / "data" / "official_layout.json"
TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "golden" / "base" / "tokenizer"


def write_model(folder: Path) -> None:
    """Write random weights in the published layout: UNet safetensors, VAE .bin, tadsr.pkl."""
    import shutil

    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    layout = json.loads(LAYOUT.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    for name in ("unet", "time_vae", "text_encoder", "scheduler", "tokenizer"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    def random(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        # Norms near 1 and fan-in scaling keep activations finite through the whole network.
        tensors = {}
        for name, shape in shapes.items():
            if len(shape) == 1:
                is_scale = "norm" in name and name.endswith("weight")
                tensors[name] = torch.full(shape, float(is_scale))
            else:
                fan_in = torch.Size(shape[1:]).numel()
                tensors[name] = torch.randn(shape) * fan_in**-0.5
        return tensors

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(layout["configs"]["unet"])
        text = CLIPTextModel(CLIPTextConfig.from_dict(layout["configs"]["text_encoder"]))

    def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}

    save_file(random(shapes(unet)), folder / "unet" / "diffusion_pytorch_model.safetensors")
    text_shapes = {
        f"text_model.{name.removeprefix('text_model.')}": shape
        for name, shape in shapes(text).items()
    }
    save_file(random(text_shapes), folder / "text_encoder" / "model.safetensors")
    torch.save(
        random(layout["time_vae_state_dict"]),
        folder / "time_vae" / "diffusion_pytorch_model.bin",
    )
    pickled = layout["tadsr_pkl"]
    tensors = {key: random(value) for key, value in pickled["tensors"].items()}
    modules = {key: [] for key in pickled["top_level"] if key.endswith("_modules")}
    for name in tensors["state_dict_unet"]:
        if ".lora_" in name:
            adapter = name.split(".")[-2].removeprefix("default_")
            modules[f"unet_lora_{adapter}_modules"].append(name.split(".lora_")[0])
    for name in tensors["state_dict_vae"]:
        modules["vae_lora_encoder_modules"].append(name.split(".lora_")[0])
    ranks = {key: pickled[key] for key in ("rank_unet", "rank_vae")}
    torch.save({**tensors, **modules, **ranks}, folder / "tadsr.pkl")
    for name in ("unet", "time_vae", "text_encoder"):
        config = json.dumps(layout["configs"][name], indent=1)
        (folder / name / "config.json").write_text(config, encoding="utf-8")
    scheduler = json.dumps(layout["configs"]["scheduler"], indent=1)
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler, encoding="utf-8")
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)


def measure(folder: Path, photo: Path, out: Path) -> dict[str, object]:
    """Load and upscale in this process; return seconds and peak memory."""
    import torch
    from machine import describe_machine
    from PIL import Image

    from tadsr import TADSRPipeline

    started = time.perf_counter()
    pipe = TADSRPipeline.from_pretrained(folder)
    loaded = time.perf_counter()
    load_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    image = Image.open(photo).convert("RGB").crop((0, 0, 128, 128))
    result = pipe(image, timestep=500)
    done = time.perf_counter()
    assert result.size == (512, 512)
    result.save(out)
    return {
        "parameters": sum(
            p.numel() for m in (pipe.vae, pipe.unet, pipe.text_encoder) for p in m.parameters()
        ),
        "load_seconds": round(loaded - started, 2),
        "upscale_seconds": round(done - loaded, 2),
        "peak_memory_after_load_gib": round(load_peak, 2),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
    }


def main() -> None:
    """Write the model once, then measure in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="5 GB of weights go here")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("full_size.png"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.photo, args.out), indent=1))
        return
    if not (args.folder / "tadsr.pkl").exists():
        write_model(args.folder)
    # A fresh process, or its peak memory would be that of writing the weights.
    subprocess.run([sys.executable, *sys.argv, "--measure"], check=True)


if __name__ == "__main__":
    main()
