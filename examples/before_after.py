"""Make the README's picture: a crop enlarged by bicubic and restored at two timesteps.

python examples/before_after.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from tadsr import TADSRPipeline

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "examples" / "photos" / "lighthouse.jpg"
OUT = ROOT / "docs" / "images" / "before_after.png"
TIMESTEPS = (1, 900)
CROP_PX = (20, 260, 440, 740)  # of the enlarged picture: left, top, right, bottom
GAP_PX = 6


def main() -> None:
    """Write the picture."""
    image = Image.open(PHOTO)
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    size = (4 * image.width, 4 * image.height)
    panels = {"bicubic": image.resize(size, Image.Resampling.BICUBIC)}
    for timestep in TIMESTEPS:
        panels[f"timestep {timestep}"] = pipe(image, timestep=timestep)
    width, height = CROP_PX[2] - CROP_PX[0], CROP_PX[3] - CROP_PX[1]
    sheet = Image.new("RGB", (len(panels) * (width + GAP_PX) - GAP_PX, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, panel) in enumerate(panels.items()):
        left = column * (width + GAP_PX)
        sheet.paste(panel.crop(CROP_PX), (left, 0))
        draw.text((left + 10, 8), label, "white", stroke_width=2, stroke_fill="black", font_size=20)
    sheet.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
