"""Upscale one photo.

python examples/upscale_one.py examples/photos/lighthouse.jpg lighthouse_x4.png --timestep 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from tadsr import TADSRPipeline
from tadsr.images import read_image, write_image


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a photo, restore it and write the result."""
    parser = argparse.ArgumentParser(description="Upscale one photo.")
    parser.add_argument("photo", help="the file to read")
    parser.add_argument("result", help="the file to write; its suffix chooses the format")
    parser.add_argument("--timestep", type=int, help="0 faithful .. 999 vivid")
    parser.add_argument("--scale", type=float, default=4, help="output size over input size")
    parser.add_argument("--model", default="tadsr-tiny", help="built-in name, folder or hub id")
    options = parser.parse_args(arguments)

    has_cuda = torch.cuda.is_available()
    pipe = TADSRPipeline.from_pretrained(
        options.model, torch_dtype=torch.float16 if has_cuda else torch.float32
    ).to("cuda" if has_cuda else "cpu")
    # Unlike Pillow's open and save, these two keep 16 bit, EXIF, XMP and the colour profile.
    sharp = pipe(read_image(options.photo), timestep=options.timestep, scale=options.scale)
    write_image(sharp, options.result)
    print(f"{options.result}: {sharp.size[0]}×{sharp.size[1]} px")


if __name__ == "__main__":
    main()
