"""Make the README's picture: a crop enlarged by bicubic and restored at two timesteps.

python examples/before_after.py
python examples/before_after.py photo.jpg --panel RealESRGAN=photo_realesrgan_x4.png

A panel of another method is a picture of the photo at four times its size, made by that method's
own program: its weights are not part of this repository.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from tadsr import TADSRPipeline

ROOT = Path(__file__).parents[1]
GAP_PX = 6


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    photos = ROOT / "examples" / "photos"
    parser.add_argument("photo", type=Path, nargs="?", default=photos / "lighthouse.jpg")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/images/before_after.png")
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 900])
    parser.add_argument("--panel", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument(
        "--crop", type=int, nargs=4, default=[20, 260, 440, 740], metavar="PX",
        help="left, top, right and bottom in the enlarged picture",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    image = Image.open(options.photo).convert("RGB")
    pipe = TADSRPipeline.from_pretrained(options.model)
    size = (4 * image.width, 4 * image.height)
    panels = {"bicubic": image.resize(size, Image.Resampling.BICUBIC)}
    for name, _, path in (panel.partition("=") for panel in options.panel):
        panels[name] = Image.open(path).convert("RGB")
        if panels[name].size != size:
            parser.error(f"{path} must have {size[0]}×{size[1]} px, got {panels[name].size}")
    for timestep, result in zip(
        options.timesteps, pipe.sweep(image, options.timesteps), strict=True
    ):
        panels[f"timestep {timestep}"] = result
    left, top, right, bottom = options.crop
    width, height = right - left, bottom - top
    sheet = Image.new("RGB", (len(panels) * (width + GAP_PX) - GAP_PX, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, panel) in enumerate(panels.items()):
        x = column * (width + GAP_PX)
        sheet.paste(panel.crop(options.crop), (x, 0))
        draw.text((x + 10, 8), label, "white", stroke_width=2, stroke_fill="black", font_size=20)
    sheet.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
