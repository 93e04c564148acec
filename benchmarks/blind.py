"""Lay two methods' results side by side in random order, to say which one is preferred.

    python benchmarks/blind.py --first results/t=700 --second realesrgan/ --out blind/

writes a sheet for each picture, with its middle enlarged, and `key.json`: which side shows the
first. Note down what you prefer before you open that.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from tadsr.measure.regions import Box
from tadsr.measure.sheet import Panel, draw_sheet

PART_PX, PANEL_PX = 256, 480
SIDES = ("left", "right")


def main(arguments: list[str] | None = None) -> None:
    """Write the sheets, then the key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("first", "second"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of PNGs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="left out, nobody knows the order")
    args = parser.parse_args(arguments)
    names = sorted(path.name for path in args.first.glob("*.png"))
    if missing := [name for name in names if not (args.second / name).is_file()]:
        parser.error(f"{args.second} must hold all of {args.first}, but lacks {missing[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    rng, key = random.Random(args.seed), {}
    for name in names:
        folders = [args.first, args.second]
        rng.shuffle(folders)
        key[name] = SIDES[folders.index(args.first)]
        images = [np.asarray(Image.open(folder / name).convert("RGB")) for folder in folders]
        height, width = images[0].shape[:2]
        left, top = max(0, (width - PART_PX) // 2), max(0, (height - PART_PX) // 2)
        box = Box(left, top, min(width, left + PART_PX), min(height, top + PART_PX))
        panels = [Panel(*pair) for pair in zip(SIDES, images, strict=True)]
        draw_sheet(panels, box, panel_px=PANEL_PX, caption=name).save(args.out / name)
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
