"""Small real files of every format that is read, made of a photograph."""

import io
from pathlib import Path

import numpy as np
import pillow_heif
import tifffile
from PIL import ExifTags, Image

from tadsr.images import ArrayImage, write_image

PHOTO = Path(__file__).parents[1] / "data" / "kodim19_crop.png"
SIZE = (21, 14)
NUM_FRAMES = 3


def make_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file by its name; the folder is for what is written as a file."""
    photo = Image.open(PHOTO).convert("RGB").resize((2 * SIZE[0], 2 * SIZE[1])).crop((0, 0, *SIZE))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    options = {"exif": exif.tobytes(), "dpi": (300, 300)}
    alpha = photo.copy()
    alpha.putalpha(photo.convert("L"))
    frames = [photo.rotate(40 * number) for number in range(NUM_FRAMES)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 40}
    files = {
        "rgb.png": _saved(photo, "PNG", **options),
        "palette.png": _saved(alpha.quantize(50), "PNG"),
        "gray_alpha.png": _saved(alpha.convert("LA"), "PNG"),
        "rgb.jpg": _saved(photo, "JPEG", **options),
        "progressive.jpg": _saved(photo, "JPEG", progressive=True, optimize=True),
        "cmyk.jpg": _saved(photo.convert("CMYK"), "JPEG"),
        "lossy.webp": _saved(photo, "WEBP", exif=exif),
        "lossless.webp": _saved(alpha, "WEBP", lossless=True),
        "rgb.avif": _saved(photo, "AVIF", **options, speed=10),
        "frames.avif": _saved(frames[0], "AVIF", **animated, speed=10),
        "rgb.tif": _saved(photo, "TIFF", compression="tiff_lzw", dpi=(300, 300)),
        "palette.tif": _saved(photo.quantize(30), "TIFF"),
        "fax.tif": _saved(photo.convert("1"), "TIFF", compression="group4"),
        "pages.tif": _saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "rgb.bmp": _saved(photo, "BMP"),
        "palette.bmp": _saved(photo.quantize(16), "BMP"),
        "rgb.dib": _saved(photo, "DIB"),
        "alpha.tga": _saved(alpha, "TGA", compression="tga_rle"),
        "rgb.gif": _saved(photo, "GIF"),
        "rgb.jp2": _saved(photo, "JPEG2000"),
        "rgb.ppm": _saved(photo, "PPM"),
        "frames.png": _saved(frames[0], "PNG", **animated),
        "frames.webp": _saved(frames[0], "WEBP", **animated, exif=exif),
        "frames.gif": _saved(frames[0], "GIF", **animated),
        # Last: it leaves a JPEG's settings in the frames, which a TIFF then stumbles over.
        "pictures.mpo": _saved(frames[0], "MPO", save_all=True, append_images=frames[1:]),
    }
    bytes_8 = np.asarray(photo)
    wide = bytes_8.astype(np.uint16) * 257
    files["gray16.png"] = _saved(Image.fromarray(wide[..., 0]), "PNG")
    unit = bytes_8.astype(np.float32) / 255
    for name, pixels in {"wide.png": wide, "wide.tif": wide, "float.tif": unit}.items():
        write_image(ArrayImage(pixels, {"exif": exif.tobytes()}), folder / name)
    tifffile.imwrite(folder / "tiled.tif", bytes_8, tile=(16, 16), compression="zlib")
    tifffile.imwrite(folder / "planes.tif", np.moveaxis(wide, 2, 0), planarconfig="separate")
    tifffile.imwrite(folder / "big.tif", wide, bigtiff=True, byteorder=">")
    pillow_heif.from_pillow(photo).save(folder / "rgb.heic", exif=exif.tobytes())
    files |= {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return files


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
