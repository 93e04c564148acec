r"""How should a small autoencoder shrink pictures? Reconstruction against cost at equal training.

python benchmarks/latents.py --recipe examples/recipes/tiny/autoencoder.yaml --data photos/train \
    --perceptual squeezenet:squeezenet10.safetensors --hq photos/kodak --folder runs/latents \
    --out benchmarks/results/latents_cpu.json

Each design is trained by the recipe for `--steps` and then encodes and decodes whole photos. Only
the latents differ: every design halves the sides once or twice more with 64 channels. A run that
was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from machine import describe_machine
from PIL import Image

from tadsr.checkpoints import load_checkpoint
from tadsr.measure.metrics import psnr
from tadsr.training import Trainer, ValidationConfig, load_recipe

DESIGNS = {"f4c4": (4, 4), "f4c8": (4, 8), "f8c4": (8, 4), "f8c8": (8, 8), "f8c16": (8, 16)}
"""Shrinking factor of the sides, and channels."""
TIMED_PX = 512


def networks_of(recipe: Path, factor: int, channels: int) -> dict[str, Any]:
    """Return the recipe's networks with other latents."""
    networks = yaml.safe_load((recipe.parent / "networks.yaml").read_text("utf-8"))
    levels = factor.bit_length()
    widths = networks["vae"]["block_out_channels"]
    widths = (widths + [widths[-1]] * levels)[:levels]
    networks["vae"] |= {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": channels,
    }
    networks["unet"] |= {"in_channels": channels, "out_channels": channels}
    return networks


@torch.no_grad()
def measure(vae: Any, hq: Path) -> dict[str, float]:
    """Return mean PSNR of reconstructions, and the processor's seconds for a square picture."""
    values: dict[str, list[float]] = {"psnr_y": [], "psnr_rgb": []}
    timesteps = torch.ones(1, dtype=torch.int64)
    for path in sorted(p for p in hq.iterdir() if p.suffix in (".png", ".jpg")):
        photo = np.asarray(Image.open(path).convert("RGB"))
        photo = photo[: photo.shape[0] // 8 * 8, : photo.shape[1] // 8 * 8]
        x = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = vae.decode(vae.encode(x, timesteps).latent_dist.mode()).sample[0]
        result = (decoded.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
        values["psnr_y"].append(psnr(result, photo, channel="y"))
        values["psnr_rgb"].append(psnr(result, photo, channel="rgb"))
    x = torch.zeros(1, 3, TIMED_PX, TIMED_PX)
    times = []
    for _ in range(5):
        # The processor's time, as others may use the machine.
        begin = time.process_time()
        vae.decode(vae.encode(x, timesteps).latent_dist.mode())
        times.append(time.process_time() - begin)
    means = {name: statistics.fmean(found) for name, found in values.items()}
    return means | {"cpu_seconds": statistics.median(times)}


def main() -> None:
    """Train and measure every design."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", required=True, help="folder of photos to train on")
    parser.add_argument("--perceptual", required=True)
    parser.add_argument("--hq", type=Path, required=True, help="folder of photos to measure on")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name, (factor, channels) in DESIGNS.items():
        options.folder.mkdir(parents=True, exist_ok=True)
        networks = options.folder / f"{name}.yaml"
        networks.write_text(yaml.safe_dump(networks_of(options.recipe, factor, channels)))
        config = load_recipe(options.recipe)
        config = replace(
            config,
            model=str(networks),
            data=replace(config.data, source=options.data),
            stage=replace(config.stage, perceptual=options.perceptual),
            output=str(options.folder / name),
            steps=options.steps,
            ema_decay=0.98,
            validation=ValidationConfig(),
        )
        Trainer(config).train()
        checkpoint = load_checkpoint(options.folder / name / "model", torch_dtype=torch.float32)
        vae = checkpoint.vae.eval()
        row: dict[str, Any] = {"design": name, "values_per_pixel": channels / factor**2}
        row |= {"parameters": sum(p.numel() for p in vae.parameters())}
        row |= measure(vae, options.hq)
        rows.append(row)
        print(
            f"{name:6} {row['values_per_pixel']:.3f} values a pixel, PSNR-Y {row['psnr_y']:.2f}, "
            f"PSNR-RGB {row['psnr_rgb']:.2f} dB, {row['cpu_seconds']:.2f} CPU s at {TIMED_PX}², "
            f"{row['parameters'] / 1e6:.2f} M parameters",
            flush=True,
        )
        report = {"machine": describe_machine(), "steps": options.steps}
        report |= {"threads": torch.get_num_threads(), "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
