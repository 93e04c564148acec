"""Measure restoration against bicubic on photographs degraded with fixed seeds.

python benchmarks/quality.py --photos kodak/ --timesteps 1 500 --out benchmarks/results/kodak.json

PSNR and SSIM of the Y channel (BT.601) with a border of `scale` px left out, and PSNR of RGB.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.image_io import resize_bicubic
from tadsr.metrics import make_metric
from tadsr.training.degradation import PRESETS, apply_degradation, sample_degradation

SCALE = 4
METRICS = ("psnr_y", "ssim_y", "psnr_rgb")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into (1, 3, H, W) in [0, 1]."""
    array = np.asarray(image.convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Turn (1, 3, H, W) in [0, 1] into uint8 (H, W, 3)."""
    return (image[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 100, 300, 500, 700, 900])
    parser.add_argument("--preset", default="realesrgan", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, help="folder for LQ, bicubic and restored pictures")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    metrics = [make_metric(name, border_px=SCALE) for name in METRICS]
    pipe = TADSRPipeline.from_pretrained(args.model).to(args.device)
    names = ["bicubic", *(f"t={t}" for t in args.timesteps)]
    rows: dict[str, dict[str, dict[str, float]]] = {}
    seconds: list[float] = []
    for index, path in enumerate(sorted(args.photos.glob("*.png"))):
        hq = to_tensor(Image.open(path))
        params = sample_degradation(
            np.random.default_rng([args.seed, index]), PRESETS[args.preset], scale=SCALE
        )
        lq = (apply_degradation(hq * 2 - 1, params) / 2 + 0.5).clamp(0, 1)
        lq = torch.from_numpy(to_uint8(lq).copy()).permute(2, 0, 1)[None].float() / 255
        results = {"bicubic": to_uint8(resize_bicubic(lq, hq.shape[-2:]).clamp(0, 1))}
        for t in args.timesteps:
            started = time.perf_counter()
            results[f"t={t}"] = to_uint8(pipe(lq.to(args.device), t, scale=SCALE).cpu())
            seconds.append(time.perf_counter() - started)
        reference = to_uint8(hq)
        rows[path.name] = {
            name: {metric.name: metric.measure(image, reference) for metric in metrics}
            for name, image in results.items()
        }
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_uint8(lq)).save(args.save / f"{path.stem}_lq.png")
            for name, image in results.items():
                Image.fromarray(image).save(args.save / f"{path.stem}_{name}.png")

    means = {
        n: {m: float(np.mean([row[n][m] for row in rows.values()])) for m in METRICS} for n in names
    }
    wins = {
        n: {m: sum(row[n][m] > row["bicubic"][m] for row in rows.values()) for m in METRICS}
        for n in names
    }
    print(f"{len(rows)} photos, preset {args.preset}, seed {args.seed}; mean (wins over bicubic)")
    for n in names:
        cells = "  ".join(f"{m} {means[n][m]:8.4f} ({wins[n][m]:2d})" for m in METRICS)
        print(f"{n:>8}  {cells}")
    print(f"median {np.median(seconds):.2f} s per photo of {tuple(hq.shape[-2:])} px output")
    if args.out:
        report = {
            # The folder's name only: where it lay is of no use to a reader.
            "photos": args.photos.resolve().name,
            "settings": {
                k: str(getattr(args, k)) for k in ("model", "timesteps", "preset", "seed")
            },
            "machine": describe_machine(),
            "median_seconds": float(np.median(seconds)),
            "means": means,
            "wins_over_bicubic": wins,
            "images": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
