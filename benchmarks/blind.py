"""Lay two methods' results side by side in random order, to say which one is preferred.

    python benchmarks/blind.py --first results/t=700 --second realesrgan/ --out blind/

writes sheets of middle crops and `key.json`, by image the side that shows the first. Note down what
you prefer before you open that.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

CROP_PX, CELL_PX, GAP_PX, ROWS = 256, 410, 6, 4


def middle(path: Path) -> Image.Image:
    """Cut the middle of a picture, enlarged to a cell."""
    with Image.open(path) as image:
        left, top = ((length - CROP_PX) // 2 for length in image.size)
        crop = image.convert("RGB").crop((left, top, left + CROP_PX, top + CROP_PX))
    return crop.resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)


def main() -> None:
    """Write the sheets, then the key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("first", "second"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="folder of PNGs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="left out, nobody knows the order")
    args = parser.parse_args()
    names = sorted(path.name for path in args.first.glob("*.png"))
    if missing := [name for name in names if not (args.second / name).is_file()]:
        parser.error(f"{args.second} must hold all of {args.first}, but lacks {missing[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    rng, key = random.Random(args.seed), {}
    pitch = CELL_PX + GAP_PX
    for start in range(0, len(names), ROWS):
        sheet = Image.new("RGB", (2 * pitch, ROWS * pitch), "white")
        draw = ImageDraw.Draw(sheet)
        for row, name in enumerate(names[start : start + ROWS]):
            folders = [args.first, args.second]
            rng.shuffle(folders)
            key[name] = "left" if folders[0] == args.first else "right"
            for column, folder in enumerate(folders):
                sheet.paste(middle(folder / name), (column * pitch, row * pitch))
            draw.text((4, row * pitch + 4), name, fill="red")
        sheet.save(args.out / f"sheet_{start // ROWS + 1}.png")
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
