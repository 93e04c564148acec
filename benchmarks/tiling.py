"""Is a large image computed in pieces as if it were whole? Exactness, seams, memory and time.

python benchmarks/tiling.py --photo photo.jpg --out benchmarks/results/tiling_cpu.json

The photo is shrunk to 512 × 512 px as LQ for the comparisons with the whole computation
(2048 × 2048 px out), and tiled to larger ones for memory and time. Each measurement of memory runs
in a process of its own. Seconds are on the clock; those of the CPU say the same of a machine that
does other work beside, which the load average tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from machine import describe_machine
from PIL import Image
from torch import Tensor

from tadsr import TADSRPipeline
from tadsr.onestep import TileSpec
from tadsr.onestep.operations import Windows

COMPARED_LQ_PX = 512
PEAK = """
import json, os, resource, sys, time
from PIL import Image
from tadsr import TADSRPipeline
from tadsr.onestep import TileSpec

photo, side, model, max_memory = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
pipe = TADSRPipeline.from_pretrained(model)
lq = Image.open(photo).convert("RGB").resize((512, 512), Image.LANCZOS)
large = Image.new("RGB", (side // 4, side // 4))
for x in range(0, large.width, 512):
    for y in range(0, large.height, 512):
        large.paste(lq, (x, y))
pipe(lq.crop((0, 0, 160, 160)))
spec = TileSpec(max_memory=max_memory) if max_memory else "auto"
started, cpu_started = time.perf_counter(), time.process_time()
result = pipe(large, tiling=spec)
seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
assert result.size == (side, side)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load = os.getloadavg()[0]
print(json.dumps(
    {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "load_average": load}
))
"""


def relative_error(result: Tensor, whole: Tensor) -> float:
    """Return |result − whole| / |whole|."""
    return ((result - whole).norm() / whole.norm()).item()


def describe_difference(result: Tensor, whole: Tensor) -> dict[str, float]:
    """Return how far a result is from the whole, and how rough the difference is.

    A seam is a step in the difference: `roughness` is the mean of the difference's absolute
    gradient, `steepest_line` that of the row or column where it is largest, both in 1/255.
    """
    difference = 255 * (result - whole)
    psnr = 10 * torch.log10(255**2 / difference.square().mean())
    luma = difference.mean(dim=0)
    rows = luma.diff(dim=0).abs().mean(dim=1)
    columns = luma.diff(dim=1).abs().mean(dim=0)
    return {
        "psnr": psnr.item(),
        "roughness": torch.cat([rows, columns]).mean().item(),
        "steepest_line": max(rows.max(), columns.max()).item(),
    }


def shares(windows: Windows) -> Tensor:
    """Return each window's smooth share of its positions, (windows, side); they add up to 1."""
    ramp = torch.sin((torch.arange(windows.side) + 0.5) * (torch.pi / windows.side)).square()
    found = torch.zeros(len(windows.starts), windows.length)
    for row, start in zip(found, windows.starts, strict=True):
        row[start : start + windows.side] = ramp
    found /= found.sum(0)
    parts = zip(found, windows.starts, strict=True)
    return torch.stack([row[start : start + windows.side] for row, start in parts])


@contextmanager
def blended_unet_tiles(pipe: TADSRPipeline, side_px: int) -> Iterator[None]:
    """Run the UNet as others do: on overlapping tiles by themselves, their results blended."""
    whole = pipe.unet.forward

    def tiled(sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, **kwargs):
        side = side_px // pipe.vae.downscale_factor
        rows, columns = Windows(sample.shape[2], side), Windows(sample.shape[3], side)
        total = torch.zeros_like(sample)
        for top, row_share in zip(rows.starts, shares(rows), strict=True):
            for left, column_share in zip(columns.starts, shares(columns), strict=True):
                place = (..., slice(top, top + rows.side), slice(left, left + columns.side))
                (tile,) = whole(sample[place], timestep, prompt_embeds, **kwargs)
                total[place] += tile * row_share[:, None] * column_share
        return (total,)

    with mock.patch.object(pipe.unet, "forward", tiled):
        yield


def compare_with_whole(pipe: TADSRPipeline, lq: Image.Image) -> dict[str, dict[str, float]]:
    """Return the difference from the whole computation for each way to cut."""
    options = {"timestep": 500, "output_type": "pt", "color_fix": "none"}
    whole = pipe(lq, tiling=None, **options)
    report = {}

    def note(name: str, result: Tensor) -> None:
        report[name] = describe_difference(result, whole)
        print(name, report[name], flush=True)

    exact = pipe(lq, tiling=TileSpec(attention_px=0, band_bytes=2**20), **options)
    report["all attention, 1 MiB bands"] = {"relative_error": relative_error(exact, whole)}
    print(report, flush=True)
    for side_px in (512, 768, 1024):
        spec = TileSpec(attention_px=side_px)
        note(f"attention windows of {side_px} px", pipe(lq, tiling=spec, **options))
        with blended_unet_tiles(pipe, side_px):
            note(f"blended UNet tiles of {side_px} px", pipe(lq, tiling=None, **options))
    return report


def compare_positions(pipe: TADSRPipeline, lq: Image.Image) -> dict[str, float]:
    """Return the PSNR of the same part wherever the grid falls, the worst for each way to cut.

    160 stands for equal, since JSON has no infinity.

    A picture that repeats itself has the same part at several places of the grid, and the same
    statistics for all. The last two move the grid by another cut of the picture, which changes
    what the part is seen beside, for the whole computation as well.
    """
    options = {"timestep": 500, "output_type": "pt", "color_fix": "none"}
    spec, count = TileSpec(attention_px=768), 4
    period = lq.width // count
    repeated = Image.new("RGB", (count * period, count * period))
    for number in range(count**2):
        place = (number % count * period, number // count * period)
        repeated.paste(lq.crop((period, period, 2 * period, 2 * period)), place)

    def worst(result: Tensor) -> float:
        parts = result.unflatten(1, (count, -1)).unflatten(3, (count, -1))[:, 1:-1, :, 1:-1]
        errors = (parts - parts[:, :1, :, :1]).square().mean(dim=(0, 2, 4)).flatten()
        return -10 * errors.max().clamp_min(1e-16).log10().item()

    report = {"attention windows of 768 px": worst(pipe(repeated, tiling=spec, **options))}
    report["the whole"] = worst(pipe(repeated, tiling=None, **options))
    with blended_unet_tiles(pipe, 768):
        report["blended UNet tiles of 768 px"] = worst(pipe(repeated, tiling=None, **options))
    shift, inner = 20, 4 * 64  # px of LQ, no divisor of the windows; px of the result
    for name, tiling in {"windows": spec, "the whole": None}.items():
        full = pipe(lq, tiling=tiling, **options)
        moved = pipe(lq.crop((shift, shift, *lq.size)), tiling=tiling, **options)
        a = full[:, 4 * shift + inner : -inner, 4 * shift + inner : -inner]
        psnr = describe_difference(moved[:, inner:-inner, inner:-inner], a)["psnr"]
        report[f"another cut of the picture, {name}"] = psnr
    print(report, flush=True)
    return report


def measure(photo: str, side: int, model: str, max_memory: int) -> dict[str, float]:
    """Return seconds, peak memory and load of one upscaling, in a process of its own."""
    arguments = [photo, str(side), model, str(max_memory)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("seconds", "cpu_seconds"):
        found[f"{name}_per_megapixel"] = found[name] / (side * side / 1e6)
    print(side, max_memory, found, flush=True)
    return found


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", required=True)
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--sides", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--max-memory", type=int, default=1_900_000_000)
    parser.add_argument("--skip-comparison", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = {"machine": describe_machine(), "model": arguments.model, "time": time.ctime()}
    report |= {"photo": Path(arguments.photo).name, "threads": torch.get_num_threads()}
    report["memory_and_time"] = {
        f"{side} px, {limit or 'automatic'}": measure(arguments.photo, side, arguments.model, limit)
        for side in arguments.sides
        for limit in (0, arguments.max_memory)
    }
    if not arguments.skip_comparison:
        lq = Image.open(arguments.photo).convert("RGB")
        lq = lq.resize((COMPARED_LQ_PX, COMPARED_LQ_PX), Image.LANCZOS)
        pipe = TADSRPipeline.from_pretrained(arguments.model)
        report["against the whole, 2048 px"] = compare_with_whole(pipe, lq)
        report["PSNR of the same part elsewhere, 2048 px"] = compare_positions(pipe, lq)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
