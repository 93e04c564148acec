"""Modes, alpha and grey of pictures go through a call."""

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.images import ArrayImage, resize_bicubic
from tadsr.onestep import TileSpec
from tests.crossings import crossed
from tests.small_models import photo, small_pipeline

FAST = {"process_size": 0}


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.mark.parametrize(
    ("mode", "expect"),
    [("L", "L"), ("LA", "LA"), ("RGBA", "RGBA"), ("P", "RGB"), ("CMYK", "RGB"), ("1", "L")],
)
def test_pil_modes(mode, expect, pipe):
    base = Image.fromarray(photo()).convert("RGBA" if mode == "LA" else "RGB")
    assert pipe(base.convert(mode), **FAST).mode == expect


def test_grey_arrays_keep_their_rank(pipe):
    assert pipe(photo()[..., 0], **FAST).shape == (36, 52)
    assert pipe(photo()[..., :1], **FAST).shape == (36, 52, 1)


def test_alpha_is_enlarged_beside_the_colours(pipe):
    rgba = photo(channels=4).clip(1)
    options = {"color_fix": "wavelet", **FAST}  # adain weighs by alpha
    result = pipe(rgba, **options)
    np.testing.assert_array_equal(result[..., :3], pipe(rgba[..., :3].copy(), **options))
    alpha = torch.from_numpy(rgba[..., 3].copy())[None, None].float() / 255
    expect = resize_bicubic(alpha, (36, 52)).clamp(0, 1)[0, 0].numpy() * 255
    assert np.abs(result[..., 3] - expect).max() <= 0.51


def test_orientation_is_applied_and_the_profile_kept(pipe):
    from PIL import ImageCms

    image = Image.fromarray(photo(4, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info |= {"exif": exif.tobytes(), "icc_profile": profile}
    result = pipe(image, scale=1, **FAST)
    assert result.size == (4, 10)
    assert result.info["icc_profile"] == profile


def cutout(kind, hidden):
    """A coloured disc with a hidden colour beside it, and how many of its levels are a byte's."""
    y, x = np.mgrid[:24, :24] - 11.5
    inside = np.hypot(x, y) < 8
    pixels = np.empty((24, 24, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[inside, :3] = (160, 120, 90)
    pixels[..., 3] = inside * 255
    if kind == "LA":
        return Image.fromarray(pixels).convert("LA"), 1
    if kind in ("uint16", "ArrayImage"):
        wide = pixels.astype(np.uint16) * 257
        return (ArrayImage(wide) if kind == "ArrayImage" else wide), 257
    if kind == "P":
        indexed = Image.fromarray(inside.astype(np.uint8))
        indexed.putpalette([*hidden, 160, 120, 90])
        indexed.info["transparency"] = 0
        return indexed, 1
    if kind == "key":
        keyed = Image.fromarray(pixels[..., :3])
        keyed.info["transparency"] = tuple(hidden)
        return keyed, 1
    return Image.fromarray(pixels) if kind == "RGBA" else pixels, 1


CUTOUTS = ("RGBA", "LA", "P", "key", "uint8", "uint16", "ArrayImage")


# What follows the fix is the same for all kinds.
@pytest.mark.parametrize(
    ("kind", "color_fix"),
    crossed(
        [
            *((kind, "adain") for kind in CUTOUTS),
            *((kind, fix) for kind in ("LA", "uint16") for fix in ("wavelet", "none")),
        ],
        CUTOUTS,
        ("adain", "wavelet", "none"),
    ),
)
def test_what_lies_hidden_under_alpha_0_does_not_show(kind, color_fix, pipe):
    results = []
    for hidden in ((160, 120, 90), (0, 0, 0), (255, 0, 255)):
        image, level = cutout(kind, hidden)
        if kind == "key" and hidden[0] == 160:
            continue
        result = pipe(image, color_fix=color_fix, **FAST)
        pixels = getattr(result, "pixels", np.asarray(result)).astype(int)
        results.append(pixels * (pixels[..., -1:] > 0))
    for other in results[1:]:
        assert np.abs(other - results[0]).max() <= level


@pytest.mark.parametrize("tiling", [None, TileSpec(max_memory=1)], ids=["whole", "bands"])
def test_adain_weighs_pixels_by_alpha(tiling, pipe):
    image = np.full((24, 24, 4), 255, np.float32)
    image[:, :12] = (0.2, 0.4, 0.6, 1)
    image[:, 12:] = (0.9, 0.1, 0.1, 1 / 512)
    result = pipe(image, tiling=tiling, **FAST)[:, :40]
    np.testing.assert_allclose(result[..., :3].mean((0, 1)), (0.2, 0.4, 0.6), atol=0.02)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float", "tensor", "PIL", "ArrayImage"])
def test_grey_that_is_stored_in_colours_stays_grey(kind, channels, pipe):
    image = photo(channels=channels)
    image[..., :3] = image[..., :1]
    if channels == 4:
        image[0, :2] = (255, 0, 90, 0)  # cannot be seen
    if kind in ("uint16", "ArrayImage"):
        image = image.astype(np.uint16) * 257
        image = ArrayImage(image) if kind == "ArrayImage" else image
    elif kind == "float":
        image = image.astype(np.float32) / 255
    elif kind == "tensor":
        image = torch.from_numpy(image[..., :1] / 255).float().expand(-1, -1, 3).permute(2, 0, 1)
    elif kind == "PIL":
        image = Image.fromarray(image)
    result = pipe(image, **FAST)
    pixels = np.asarray(getattr(result, "pixels", result))
    colors = pixels if kind == "tensor" else np.moveaxis(pixels[..., :3], -1, 0)
    assert colors.shape == (3, 36, 52)
    assert (colors == colors[:1]).all()
