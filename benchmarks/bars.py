"""Compare tadsr-tiny with a restoration network: is it ahead, does the knob work, do blocks stay?

    python benchmarks/bars.py --realsr benchmarks/results/realsr_cpu.json \
        --degraded benchmarks/results/kodak_cpu.json --jpeg benchmarks/results/jpeg_cpu.json

reads what benchmarks/quality.py wrote and prints a line for each bar with what it came to.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

VIVID = 500
"""Timestep from which results must stand beside the network's."""
FAITHFUL_PSNR = {"realsr": 27.10, "degraded": 24.60}
"""PSNR-Y in dB at timestep 1."""
SHARE_ABOVE_BICUBIC = 0.9
JPEG_GRID_PX = "32"


def means(report: dict, metric: str) -> dict[int, float]:
    """Return a metric's mean by timestep."""
    rows = (row for row in report["rows"] if row["timestep"] is not None)
    return {row["timestep"]: row["means"][metric] for row in rows}


def values(report: dict, name: str, metric: str) -> np.ndarray:
    """Return a metric of every image in a row."""
    row = next(row for row in report["rows"] if row["name"] == name)
    return np.array([image[metric] for image in row["images"].values()])


def knob_breaks(report: dict) -> list[str]:
    """Name the steps at which PSNR does not fall or detail does not rise."""
    broken = []
    for metric, sign in (("psnr_y", -1), ("detail", 1)):
        by_timestep = means(report, metric)
        times = sorted(by_timestep)
        broken += [
            f"{metric} {a}→{b}"
            for a, b in itertools.pairwise(times)
            if sign * (by_timestep[b] - by_timestep[a]) <= 0
        ]
    return broken


def distances_over_bicubic(reports: list[dict]) -> dict[int, float]:
    """Return the mean over reports of a timestep's distance relative to bicubic's."""
    ratios: dict[int, list[float]] = {}
    for report in reports:
        bicubic = float(values(report, "bicubic", "squeezenet").mean())
        for timestep, distance in means(report, "squeezenet").items():
            ratios.setdefault(timestep, []).append(distance / bicubic)
    return {t: float(np.mean(found)) for t, found in ratios.items() if len(found) == len(reports)}


def bars_of_pairs(name: str, report: dict, other: str) -> list[tuple[str, bool, str]]:
    """Return a set's bars: what is asked, whether it holds, what it came to."""
    distance, detail = means(report, "squeezenet"), means(report, "detail")
    theirs = values(report, other, "squeezenet")
    vivid = {t: d for t, d in distance.items() if t >= VIVID}
    best = min(vivid, key=vivid.get)
    ahead = {t: float(np.mean(values(report, f"t={t}", "squeezenet") <= theirs)) for t in vivid}
    most = max(ahead, key=ahead.get)
    psnr = means(report, "psnr_y")
    share = float(np.mean(values(report, "t=1", "psnr_y") > values(report, "bicubic", "psnr_y")))
    broken = knob_breaks(report)
    their_detail = float(values(report, other, "detail").mean())
    least = min(detail[t] for t in vivid)
    return [
        (
            f"{name}: SqueezeNet distance at most {other}'s at some t ≥ {VIVID}",
            vivid[best] <= theirs.mean(),
            f"{vivid[best]:.4f} at {best}, {theirs.mean():.4f}",
        ),
        (
            f"{name}: ahead of {other} on half of the images",
            ahead[most] >= 0.5,
            f"{ahead[most]:.0%} at {most}",
        ),
        (
            f"{name}: no vivid result further from the originals than t = 1",
            max(vivid.values()) <= distance[1],
            f"{max(vivid.values()):.4f}, {distance[1]:.4f}",
        ),
        (
            f"{name}: PSNR-Y at t = 1 at least {FAITHFUL_PSNR[name]:.2f} dB",
            psnr[1] >= FAITHFUL_PSNR[name],
            f"{psnr[1]:.2f} dB",
        ),
        (
            f"{name}: t = 1 above bicubic on {SHARE_ABOVE_BICUBIC:.0%}",
            share >= SHARE_ABOVE_BICUBIC,
            f"{share:.0%}",
        ),
        (
            f"{name}: PSNR falls and detail rises with every step",
            not broken,
            ", ".join(broken) or "all",
        ),
        (
            f"{name}: at least {other}'s detail from t = {VIVID} on",
            least >= their_detail,
            f"{least:.2f}, {their_detail:.2f}",
        ),
    ]


def main() -> None:
    """Print all bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("realsr", "degraded", "jpeg"):
        parser.add_argument(f"--{name}", type=Path, help="report of benchmarks/quality.py")
    parser.add_argument("--other", default="RealESRGAN_x4plus", help="the network's name in them")
    args = parser.parse_args()
    bars = []
    pairs = [json.loads(p.read_text(encoding="utf-8")) for p in (args.realsr, args.degraded) if p]
    if pairs:
        ratios = distances_over_bicubic(pairs)
        print("distance over bicubic's:", ", ".join(f"{t}: {r:.3f}" for t, r in ratios.items()))
        print(f"default timestep: {min(ratios, key=ratios.get)}")
    for name in FAITHFUL_PSNR:
        if path := getattr(args, name):
            report = json.loads(path.read_text(encoding="utf-8"))
            if not any(row["name"] == args.other for row in report["rows"]):
                parser.error(
                    f"{path} must have a row of {args.other}, but has none; give its results to "
                    "benchmarks/quality.py by --other, or name another by --other here"
                )
            bars += bars_of_pairs(name, report, args.other)
    if args.jpeg:
        report = json.loads(args.jpeg.read_text(encoding="utf-8"))
        grid = report["grid_excess_db"][JPEG_GRID_PX]
        ours = {name: value for name, value in grid.items() if name.startswith("t=")}
        quality = report["degradation"]["jpeg_quality"]
        figures = ", ".join(f"{name} {value:.2f}" for name, value in ours.items())
        bars.append(
            (
                f"jpeg: no more of the grid of quality {quality} than {args.other}",
                max(ours.values()) <= grid[args.other],
                f"{figures}; {grid[args.other]:.2f} dB",
            )
        )
    for asked, holds, figure in bars:
        print(f"{'yes' if holds else 'no ':3}  {asked}: {figure}")


if __name__ == "__main__":
    main()
