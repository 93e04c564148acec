"""Measure restoration: the knob, other methods, artefacts at the latent grid, pictures to look at.

Real pairs, with other methods' results beside:

    python benchmarks/quality.py --hq realsr/hq --lq realsr/lq --other OSEDiff=realsr/osediff \
        --perceptual squeezenet10.safetensors --out benchmarks/results/realsr_cpu

Photographs degraded with fixed seeds:

    python benchmarks/quality.py --hq kodak/ --out benchmarks/results/kodak_cpu \
        --restorer RealESRGAN_x4plus=RealESRGAN_x4plus.pth

Photographs shrunk and saved as JPEG, with the JPEG's own grid measured in the results:

    python benchmarks/quality.py --hq kodak/ --jpeg-quality 30 --out benchmarks/results/jpeg_cpu \
        --restorer RealESRGAN_x4plus=RealESRGAN_x4plus.pth

writes OUT.json, OUT.png (realism over fidelity) and, with --sheet, a contact sheet. --restorer
runs a network that spandrel detects on the same LQ; --keep FOLDER keeps LQ and results, which
--other takes the next time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from PIL import Image, ImageDraw, ImageFont

from tadsr import TADSRPipeline
from tadsr.degradation import PRESETS, apply_degradation, sample_degradation
from tadsr.degradation.jpeg import compress_jpeg
from tadsr.image_files import IMAGE_SUFFIXES
from tadsr.measure.evaluation import evaluate_model, make_perceptual_metric
from tadsr.measure.metrics import make_metric
from tadsr.measure.plot import plot
from tadsr.measure.report import format_table, write_json
from tadsr.measure.spectrum import DECIBELS, log_spectrum, peaks_above
from tadsr.training.data import load_restorer

SCALE = 4
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "detail")
SHEET_CROP_PX = 160
SHEET_ROWS = 8
LABEL_PX = 16
JPEG_BLOCK_PX = 8
GRID_NEIGHBOURS = (3, 12)
"""Frequencies beside a harmonic of the grid that count as its surroundings, in bins."""


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def degrade(hq: Path, lq: Path, preset: str, seed: int, jpeg_quality: int | None) -> None:
    """Write an LQ partner of every photograph; the same seed gives the same files."""
    for index, path in enumerate(images_in(hq)):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
        image = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
        generator = np.random.default_rng([seed, index])
        params = sample_degradation(generator, PRESETS[preset], scale=SCALE)
        small = apply_degradation(image, params)[0].clamp(-1, 1)
        if jpeg_quality is not None:
            small = compress_jpeg(small / 2 + 0.5, jpeg_quality) * 2 - 1
        array = ((small + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(lq / f"{path.stem}.png")


@torch.inference_mode()
def restore(network: Path, lq: Path, results: Path, device: str) -> None:
    """Write what a restoration network makes of every LQ."""
    results.mkdir(parents=True)
    restorer = load_restorer(network, SCALE).to(torch.device(device))
    for path in images_in(lq):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
        image = pixels.permute(2, 0, 1)[None].float().to(device) / 255
        restored = (restorer(image)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(restored.cpu().numpy()).save(results / f"{path.stem}.png")


def grid_excess(folder: Path, period_px: int) -> float:
    """Return how far the spectrum stands out at the grid's harmonics, the largest, in dB.

    0 for a picture without a pattern; the mean power over all rows, columns and pictures, against
    the frequencies beside it.
    """
    worst = 0.0
    for axis in (0, 1):
        ratios: dict[int, list[float]] = {}
        for path in images_in(folder):
            y = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
            lines = np.swapaxes(y, axis, 1)
            length = lines.shape[1] // period_px * period_px
            window = np.hanning(length)
            power = (np.abs(np.fft.rfft(lines[:, :length] * window)) ** 2).mean(0)
            for harmonic in range(1, period_px // 2):
                center = harmonic * length // period_px
                near, far = GRID_NEIGHBOURS
                beside = [
                    *power[center - far : center - near],
                    *power[center + near : center + far],
                ]
                ratios.setdefault(harmonic, []).append(power[center] / np.median(beside))
        for values in ratios.values():
            worst = max(worst, 10 * float(np.log10(np.exp(np.mean(np.log(values))))))
    return worst


def spectrum_of(folder: Path) -> torch.Tensor:
    """Return the mean logarithm of the power of every frequency, (64, 64)."""
    spectra = []
    for path in images_in(folder):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())
        spectra.append(log_spectrum(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1))
    return torch.stack(spectra).mean(0)


def draw_sheet(columns: dict[str, Path], path: Path) -> None:
    """Draw the crop of every picture that has most detail in the original, a column per method."""
    files = {label: images_in(folder) for label, folder in columns.items()}
    count = len(files["HQ"])
    rows = range(0, count, max(1, count // SHEET_ROWS))[:SHEET_ROWS]
    side = SHEET_CROP_PX
    sheet = Image.new("RGB", (len(columns) * side, LABEL_PX + len(rows) * side), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LABEL_PX - 4)
    for column, label in enumerate(columns):
        draw.text((column * side + 4, 0), label, fill="black", font=font)
    for row, number in enumerate(rows):
        hq = Image.open(files["HQ"][number]).convert("RGB")
        box = busiest_box(hq, side)
        for column, label in enumerate(columns):
            image = Image.open(files[label][number]).convert("RGB")
            if image.size != hq.size:
                image = image.resize(hq.size, Image.Resampling.NEAREST)
            sheet.paste(image.crop(box), (column * side, LABEL_PX + row * side))
    sheet.save(path, quality=90)


def busiest_box(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """Return the square with the strongest gradients."""
    y = np.asarray(image.convert("L"), dtype=np.float64)
    energy = np.abs(np.diff(y, axis=0))[:, 1:] + np.abs(np.diff(y, axis=1))[1:]
    sums = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    blocks = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(blocks.argmax(), blocks.shape)
    return int(left), int(top), int(left) + side, int(top) + side


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hq", type=Path, required=True, help="folder of originals")
    parser.add_argument("--lq", type=Path, help="their LQ partners; degraded here if left out")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--restorer", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, *range(100, 901, 100)])
    parser.add_argument("--preset", default="realesrgan", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jpeg-quality", type=int, help="save the shrunk photographs so")
    parser.add_argument("--keep", type=Path, help="folder for LQ and results")
    parser.add_argument("--perceptual", type=Path, help="SqueezeNet weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="contact sheet to draw")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args = parser.parse_args()

    preset = args.preset if args.jpeg_quality is None else "bicubic"
    others, restorers = (
        {name: Path(path) for name, _, path in (item.partition("=") for item in items)}
        for items in (args.other, args.restorer)
    )
    metrics = [make_metric(name, border_px=SCALE) for name in METRICS]
    if args.perceptual:
        metrics.append(make_perceptual_metric(args.perceptual, device=args.device))
    pipe = TADSRPipeline.from_pretrained(args.model).to(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.keep is None else args.keep
        results, lq = folder / "results", args.lq or folder / "lq"
        if args.lq is None:
            lq.mkdir(parents=True, exist_ok=True)
            degrade(args.hq, lq, preset, args.seed, args.jpeg_quality)
        for name, network in restorers.items():
            others[name] = folder / name
            restore(network, lq, others[name], args.device)
        evaluation = evaluate_model(
            pipe,
            lq,
            args.hq,
            timesteps=args.timesteps,
            outputs=others,
            metrics=metrics,
            save=results,
            model_name=Path(args.model).name,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(evaluation, args.out.with_suffix(".json"))
        plot(evaluation, args.out.with_suffix(".png"))
        folders = {"HQ": args.hq} | {p.name: p for p in sorted(results.iterdir())} | others
        period = pipe.vae.downscale_factor
        periods = {period} if args.jpeg_quality is None else {period, JPEG_BLOCK_PX * SCALE}
        grids = {
            px: {name: round(grid_excess(path, px), 2) for name, path in folders.items()}
            for px in sorted(periods)
        }
        original = spectrum_of(args.hq)
        waves = {
            name: round(DECIBELS * float(peaks_above(spectrum_of(path), original).max()), 2)
            for name, path in folders.items()
        }
        if args.sheet:
            shown = ["bicubic", *(f"t={t}" for t in sorted({*args.timesteps[::3]})), *others, "HQ"]
            named = {"LQ": lq} | {name: folders[name] for name in shown}
            draw_sheet(named, args.sheet)
    print(format_table(evaluation))
    for px, grid in grids.items():
        print(f"excess at the grid of {px} px, dB: {grid}")
    print(f"highest wave above the originals' spectrum, dB: {waves}")
    report = json.loads(args.out.with_suffix(".json").read_text(encoding="utf-8"))
    made = {"preset": preset, "seed": args.seed, "jpeg_quality": args.jpeg_quality}
    degradation = None if args.lq else made
    report |= {
        "machine": describe_machine(),
        "degradation": degradation,
        "grid_excess_db": grids,
        "wave_peak_db": waves,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    args.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
