"""Keep one part of a photo faithful and let the rest get rich.

python examples/timestep_map.py examples/photos/lighthouse.jpg mapped.png --box 0 130 384 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tadsr import TADSRPipeline, TimestepMap
from tadsr.images import read_image, write_image


def main(arguments: Sequence[str] | None = None) -> None:
    """Restore a photo with a map of two timesteps."""
    parser = argparse.ArgumentParser(description="Keep one part of a photo faithful.")
    parser.add_argument("photo", help="the file to read")
    parser.add_argument("result", help="the file to write")
    parser.add_argument(
        "--box",
        type=int,
        nargs=4,
        required=True,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="the part, in px of the photo",
    )
    parser.add_argument("--inside", type=int, default=1, help="the part's timestep")
    parser.add_argument("--outside", type=int, default=900, help="the timestep of the rest")
    parser.add_argument("--feather", type=int, default=8, help="width of the transition in px")
    parser.add_argument("--model", default="tadsr-tiny", help="built-in name, folder or hub id")
    options = parser.parse_args(arguments)

    photo = read_image(options.photo)
    region = {"box": options.box, "timestep": options.inside, "feather": options.feather}
    regions = {"default": options.outside, "regions": [region]}
    timestep = TimestepMap.from_regions(regions, size=(photo.height, photo.width))
    print(f"the networks run at {', '.join(map(str, timestep.knots))}")

    pipe = TADSRPipeline.from_pretrained(options.model)
    write_image(pipe(photo, timestep=timestep), options.result)
    print(options.result)


if __name__ == "__main__":
    main()
