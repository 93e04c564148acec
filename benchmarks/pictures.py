"""Make the pictures of the README and of docs/ with a model.

python benchmarks/pictures.py --model tadsr-tiny

reads what lies in benchmarks/photos and writes docs/images. What lies there was made by

python benchmarks/pictures.py --kodak kodak/ --restorer RealESRGAN_x4plus.pth

which degrades the Kodak photographs as benchmarks/quality.py does, runs the network by spandrel on
the same photographs, and keeps of its results and of the originals the parts that are shown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from quality import SCALE, degrade, restore

from tadsr import TADSRPipeline, TimestepMap
from tadsr.images import write_image
from tadsr.measure.compare import compare_images, draw_comparison
from tadsr.measure.regions import Box
from tadsr.measure.sheet import Panel, draw_sheet
from tadsr.measure.sweep import TimestepSweep

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "benchmarks" / "photos"
SHEETS = {
    "before_after.jpg": {"kodim08": (380, 200), "kodim20": (60, 150), "kodim19": (240, 90)},
    "gallery.jpg": {"kodim05": (60, 180), "kodim01": (430, 200), "kodim16": (420, 110)},
}
"""By sheet and photograph: left and top of the part that is shown, in px of the result."""
PART_PX, CELL_PX, GAP_PX, LABEL_PX = (240, 180), (320, 240), 4, 30
FAITHFUL, VIVID = 1, 900
TIMESTEPS = (FAITHFUL, 300, 500, 700, VIVID)
HOUSE = {"box": [131, 48, 192, 97], "timestep": FAITHFUL, "feather": 2}
"""The white house of kodim08 with its sign, in px of the photograph."""
BORDER = Box(416, 216, 592, 344)
"""Where the house and its neighbour meet, in px of the result."""
QUALITY, PANEL_PX = 85, 280


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--kodak", type=Path, help="folder of the originals, to begin anew")
    parser.add_argument("--restorer", type=Path, help="checkpoint of RealESRGAN_x4plus")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sheets to make, such as gallery")
    options = parser.parse_args(arguments)
    if options.kodak:
        make_photos(options.kodak, options.restorer)
    pipe = TADSRPipeline.from_pretrained(options.model)
    for name, parts in SHEETS.items():
        if options.only is None or Path(name).stem in options.only:
            save(draw_methods(pipe, parts), options.output / name)
    if options.only is None or "timestep" in options.only:
        draw_timesteps(pipe, options.output)


def make_photos(kodak: Path, restorer: Path) -> None:
    """Write the degraded photographs, and the parts of others' results and of the originals."""
    with tempfile.TemporaryDirectory() as scratch:
        lq, results = Path(scratch, "lq"), Path(scratch, "results")
        lq.mkdir()
        degrade(kodak, lq, "realesrgan", 0, None)  # seeded by the place in the folder
        places = {name: place for parts in SHEETS.values() for name, place in parts.items()}
        for path in lq.iterdir():
            if path.stem not in places:
                path.unlink()
        restore(restorer, lq, results, "cpu")
        for name, place in places.items():
            Image.open(lq / f"{name}.png").save(PHOTOS / f"{name}_lq.webp", lossless=True)
            for folder, label in ((results, "realesrgan"), (kodak, "original")):
                with Image.open(folder / f"{name}.png") as image:
                    cut(image, place).save(PHOTOS / f"{name}_{label}.webp", quality=92)


def cut(image: Image.Image, place: tuple[int, int]) -> Image.Image:
    """Return the part of a photograph that is shown."""
    left, top = place
    return image.convert("RGB").crop((left, top, left + PART_PX[0], top + PART_PX[1]))


def draw_methods(pipe: TADSRPipeline, parts: dict[str, tuple[int, int]]) -> Image.Image:
    """Draw a row for each photograph and a column for each method."""
    columns = ["bicubic", "RealESRGAN_x4plus"]
    columns += [f"tadsr, timestep {t}" for t in (FAITHFUL, VIVID)] + ["original"]
    width, height = CELL_PX
    size = (len(columns) * (width + GAP_PX) - GAP_PX, LABEL_PX + len(parts) * (height + GAP_PX))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((column * (width + GAP_PX), 0), label, "black", font_size=22)
    for row, (name, place) in enumerate(parts.items()):
        lq, theirs, original = (
            Image.open(PHOTOS / f"{name}_{label}.webp").convert("RGB")
            for label in ("lq", "realesrgan", "original")
        )
        bicubic = lq.resize((SCALE * lq.width, SCALE * lq.height), Image.Resampling.BICUBIC)
        ours = [cut(result, place) for result in pipe.sweep(lq, (FAITHFUL, VIVID))]
        for column, cell in enumerate([cut(bicubic, place), theirs, *ours, original]):
            enlarged = cell.resize(CELL_PX, Image.Resampling.BICUBIC)
            at = (column * (width + GAP_PX), LABEL_PX + row * (height + GAP_PX))
            sheet.paste(enlarged, at)
    return sheet


def draw_timesteps(pipe: TADSRPipeline, folder: Path) -> None:
    """Write the pictures of docs/timestep.md."""
    photo = Image.open(PHOTOS / "kodim08_lq.webp").convert("RGB")
    results = dict(zip(TIMESTEPS, map(np.asarray, pipe.sweep(photo, TIMESTEPS)), strict=True))
    sweep = TimestepSweep(np.asarray(photo), results)
    save(sweep.draw(panel_px=PANEL_PX), folder / "timestep_sweep.jpg")

    faithful, vivid = results[FAITHFUL], results[VIVID]
    names = (f"timestep {FAITHFUL}", f"timestep {VIVID}")
    found = compare_images(faithful, vivid, names=names)
    compared = draw_comparison(found, faithful, vivid, panel_px=PANEL_PX)
    save(compared, folder / "timestep_compare.jpg")

    regions = {"default": VIVID, "regions": [HOUSE]}
    height, width = faithful.shape[:2]
    values = TimestepMap.from_regions(regions, (photo.height, photo.width)).at(height, width)
    shown = np.repeat(np.uint8(values[..., None].numpy() / 999 * 255), 3, axis=2)
    mapped = np.asarray(pipe(photo, regions))
    panels = [
        Panel(names[0], faithful),
        Panel(f"white house {FAITHFUL}, else {VIVID}", mapped),
        Panel(names[1], vivid),
        Panel("the map", shown),
    ]
    save(draw_sheet(panels, BORDER, panel_px=PANEL_PX), folder / "timestep_map.jpg")


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as a small JPEG file."""
    write_image(sheet, path, quality=QUALITY, overwrite=True)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
