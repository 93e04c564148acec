"""What `tadsr upscale` reads and writes, beyond plain photographs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageDraw

from tadsr.images import read_frames, read_image

SRGB_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DURATIONS = (50.0, 120.0, 200.0)


@pytest.fixture
def scan(tadsr) -> Path:
    """A 16 bit TIFF of finely stepped colours, sideways, with EXIF."""
    ramp = np.linspace(20000, 24000, 12 * 10).astype(np.uint16).reshape(12, 10, 1)
    tifffile.imwrite(
        "scan16.tif",
        ramp + np.array([0, 500, 900], np.uint16),
        photometric="rgb",
        resolution=(300, 300),
        resolutionunit="INCH",
        iccprofile=SRGB_ICC,
        extratags=[(274, 3, 1, 6, True), (271, 2, 0, "Camera", True)],
    )
    return Path("scan16.tif")


@pytest.fixture
def clip(tadsr) -> Path:
    frames = []
    for number in range(3):
        frame = Image.new("RGBA", (20, 16))
        ImageDraw.Draw(frame).ellipse((number, 2, number + 12, 14), fill=(200, 90, 30))
        frames.append(frame)
    frames[0].save(
        "clip.gif",
        save_all=True,
        append_images=frames[1:],
        duration=list(DURATIONS),
        loop=2,
        disposal=2,
    )
    return Path("clip.gif")


@pytest.mark.parametrize("suffix", [".jpe", ".mpo", ".j2k", ".jpx", ".dib", ".tga"])
def test_less_common_suffixes_are_found_in_folders(upscale, tmp_path, suffix):
    Path("photos").mkdir()
    Image.new("RGB", (6, 5), (200, 90, 30)).save(f"photos/a{suffix}")
    upscale("photos", "sharp/")
    assert read_image("sharp/a.png").size == (24, 20)


@pytest.mark.parametrize("name", ["out.png", "out.tif"])
def test_16_bit_stay_16_bit(upscale, scan, name):
    upscale(scan, name)
    image = read_image(name)
    assert image.pixels.shape == (40, 48, 3)  # turned upright
    assert image.pixels.dtype == np.uint16
    assert (image.pixels % 257 != 0).mean() > 0.9
    assert image.info["icc_profile"] == SRGB_ICC
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    with Image.open(name) as opened:
        assert opened.getexif()[ExifTags.Base.Make] == "Camera"


@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.jpg", "out.webp"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_strip(upscale, scan, name, is_streamed, monkeypatch):
    if is_streamed:
        monkeypatch.setattr("tadsr.folders.restoring.STREAMED_PIXELS", 1)
    upscale(scan, name, "--strip")
    with Image.open(name) as opened:
        opened.load()
        assert opened.size == (48, 40)  # what the orientation said still counts
        assert opened.info["icc_profile"] == SRGB_ICC
        assert ExifTags.Base.Make not in opened.getexif()
    assert b"Camera" not in Path(name).read_bytes()


def test_strip_is_in_the_help(tadsr):
    text = " ".join(tadsr("upscale", "--help").stdout.replace("│", " ").split())
    assert "the ICC profile stays" in text


@pytest.mark.parametrize("args", [(), ("out.webp",), ("out.gif",), ("-f", "webp")])
def test_an_animation_keeps_its_frames_and_times(upscale, clip, args):
    result = upscale(clip, *args)
    (written,) = [path for path in Path().iterdir() if path != clip]
    assert written.suffix == {(): ".png", ("-f", "webp"): ".webp"}.get(args, written.suffix)
    animation = read_frames(written)
    assert animation.durations_ms == DURATIONS
    assert (animation.size, animation.num_plays) == ((80, 64), 3)
    assert len({frame.tobytes() for frame in animation}) == 3
    corner = next(iter(animation)).getpixel((0, 0))
    assert corner[3] == 0
    assert "(80×64, 3 frames, " in result.stdout


def test_frames_are_those_of_the_pipeline(upscale, clip, model_dir):
    from tadsr import TADSRPipeline

    upscale(clip, "-t", 300)
    pipe = TADSRPipeline.from_pretrained(model_dir)
    for found, frame in zip(read_frames("clip_x4.png"), read_frames(clip), strict=True):
        expected = np.asarray(pipe(frame, 300, process_size=0))
        is_visible = expected[..., 3:] > 0
        assert ((np.asarray(found) == expected) | ~is_visible).all()


def test_an_animation_is_not_cut_to_a_still(upscale, clip):
    result = upscale(clip, "out.jpg", code=1)
    assert "JPEG cannot hold an animation of 3 frames; write .png, .webp or .gif" in result.stderr
    assert not Path("out.jpg").exists()


def test_a_folder_with_a_gif(upscale, clip, photo):
    photo("all/a.png")
    clip.rename("all/clip.gif")
    result = upscale("all", "-f", "jpg")
    assert Path("all_x4/a.jpg").exists()
    assert "becomes clip.png, since JPEG cannot hold an animation of 3 frames" in result.stderr
    assert len(read_frames("all_x4/clip.png")) == 3
    upscale("all", "-f", "gif", "-o", "gifs")
    assert len(read_frames("gifs/clip.gif")) == 3
    assert len(read_frames("gifs/a.gif")) == 1


def test_heic(upscale):
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    image = Image.new("RGB", (64, 48), (200, 90, 30))
    pillow_heif.from_pillow(image).save("photo.heic", exif=exif.tobytes())
    # As telephones send it, under another name.
    Path("renamed.jpg").write_bytes(Path("photo.heic").read_bytes())
    for name in ("photo.heic", "renamed.jpg"):
        upscale(name, "-o", "out.png", "--overwrite", "-s", 1)
        with Image.open("out.png") as opened:
            assert opened.size == (64, 48)
            assert np.abs(np.asarray(opened).mean((0, 1)) - (200, 90, 30)).max() < 5
            assert opened.getexif()[ExifTags.Base.Make] == "Camera"
    assert "HEIF" not in Image.OPEN  # Pillow is left as it was


def test_heic_without_its_library(tadsr, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    result = tadsr("upscale", "photo.heic", code=1)
    assert result.stderr == (
        "Error: photo.heic: HEIC needs the library pillow-heif; pip install 'tadsr[heif]', or "
        "convert the file to JPEG or PNG\n"
    )


def test_cmyk_and_palette(upscale):
    Image.new("CMYK", (6, 5), (200, 10, 30, 5)).save("ink.tif")
    upscale("ink.tif", "ink.png")
    with Image.open("ink.png") as opened:
        assert (opened.mode, opened.size) == ("RGB", (24, 20))
    palette = Image.new("P", (6, 5))
    palette.putpalette([0, 0, 0, 250, 240, 10])
    palette.paste(1, (2, 1, 5, 4))
    palette.save("icon.png", transparency=0)
    upscale("icon.png", "large.png")
    with Image.open("large.png") as opened:
        assert opened.mode == "RGBA"
        assert opened.getpixel((0, 0))[3] == 0
        assert opened.getpixel((14, 10))[3] == 255
