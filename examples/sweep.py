"""Show a photo at several timesteps on one labelled sheet, and say how they differ.

python examples/sweep.py examples/photos/lighthouse.jpg sheet.png --timesteps 1 300 600 900
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tadsr import TADSRPipeline
from tadsr.images import write_image
from tadsr.measure.metrics import detail
from tadsr.measure.pictures import read_rgb8
from tadsr.measure.sweep import TimestepSweep


def main(arguments: Sequence[str] | None = None) -> None:
    """Restore a photo at every timestep and draw the sheet."""
    parser = argparse.ArgumentParser(description="Show a photo at several timesteps.")
    parser.add_argument("photo", help="the file to read")
    parser.add_argument("sheet", help="the picture to write")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 300, 600, 900])
    parser.add_argument("--model", default="tadsr-tiny", help="built-in name, folder or hub id")
    options = parser.parse_args(arguments)

    photo = read_rgb8(options.photo)
    pipe = TADSRPipeline.from_pretrained(options.model)
    results = dict(zip(options.timesteps, pipe.sweep(photo, options.timesteps), strict=True))
    for timestep, image in results.items():
        print(f"timestep {timestep:3}: detail {detail(image):.2f}")
    write_image(TimestepSweep(photo, results).draw(), options.sheet)
    print(options.sheet)


if __name__ == "__main__":
    main()
