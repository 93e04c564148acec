"""Make the pictures of docs/timestep.md with the model inside the package.

python examples/timestep_pictures.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tadsr import TADSRPipeline, TimestepMap
from tadsr.images import write_image
from tadsr.measure.compare import compare_images, draw_comparison
from tadsr.measure.regions import difference_map, find_box
from tadsr.measure.sheet import Panel, draw_sheet
from tadsr.measure.sweep import TimestepSweep

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "examples" / "photos" / "lighthouse.jpg"
OUT = ROOT / "docs" / "images"
PART_PX = (16, 24, 216, 174)  # of the photo: left, top, right, bottom
TIMESTEPS = (1, 300, 500, 700, 900)
FAITHFUL, VIVID = 1, 900
HOUSES = {"box": [0, 50, 200, 128], "timestep": FAITHFUL, "feather": 6}
QUALITY = 75
PANEL_PX = 280


def main() -> None:
    """Write the three pictures."""
    photo = Image.open(PHOTO).crop(PART_PX)
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    results = dict(zip(TIMESTEPS, map(np.asarray, pipe.sweep(photo, TIMESTEPS)), strict=True))
    sheet = TimestepSweep(np.asarray(photo), results).draw(panel_px=PANEL_PX)
    save(sheet, "timestep_sweep.jpg")

    faithful, vivid = results[FAITHFUL], results[VIVID]
    names = (f"timestep {FAITHFUL}", f"timestep {VIVID}")
    found = compare_images(faithful, vivid, names=names)
    save(draw_comparison(found, faithful, vivid, panel_px=PANEL_PX), "timestep_compare.jpg")

    regions = {"default": VIVID, "regions": [HOUSES]}
    height, width = faithful.shape[:2]
    values = TimestepMap.from_regions(regions, (photo.height, photo.width)).at(height, width)
    shown = np.repeat(np.uint8(values[..., None].numpy() / 999 * 255), 3, axis=2)
    mapped = np.asarray(pipe(photo, regions))
    panels = [
        Panel(names[0], faithful),
        Panel(f"houses {FAITHFUL}, else {VIVID}", mapped),
        Panel(names[1], vivid),
        Panel("the map", shown),
    ]
    side = height // 4
    box = find_box([difference_map([faithful, vivid])], (side, side))
    save(draw_sheet(panels, box, panel_px=PANEL_PX), "timestep_map.jpg")


def save(sheet: Image.Image, name: str) -> None:
    """Write a sheet as a small JPEG file."""
    write_image(sheet, OUT / name, quality=QUALITY)
    print(f"{name}: {(OUT / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
