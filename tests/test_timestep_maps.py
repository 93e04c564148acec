"""Maps of timesteps through the whole pipeline, as a whole and in pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tadsr import TADSRPipeline, TimestepMap
from tadsr.onestep import TileSpec
from tests.crossings import crossed

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "lighthouse.jpg"
IN_PIECES = TileSpec(band_bytes=2**18, max_memory=1, attention_px=0)
RAMP = TimestepMap.from_image(np.array([[0, 128, 255]], np.uint8), (1, 999))


@pytest.fixture(scope="module")
def lq():
    return Image.open(PHOTO).crop((150, 60, 191, 113))


def relative_error(found, expect):
    return ((found - expect).norm() / expect.norm()).item()


@settings(max_examples=6)
@given(st.integers(0, 999), st.integers(1, 14), st.integers(1, 14), st.sampled_from([0, 40]))
def test_a_constant_map_equals_the_integer(pipe, timestep, height, width, process_size):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(timestep))
    constant = np.full((3, 2), timestep)
    options = {"process_size": process_size, "color_fix": "none"}
    expect = pipe(image, timestep, tiling=None, **options)
    for tiling in (None, IN_PIECES):
        found = pipe(image, constant, tiling=tiling, **options)
        assert relative_error(found, expect) < 1e-5


# Quick: every pair of an axis, a colour fix and a way, once.
@pytest.mark.parametrize(
    ("axis", "color_fix", "tiling"),
    crossed(
        [
            *((0, "adain", None), (1, "wavelet", None), (0, "none", None)),
            *((1, "adain", IN_PIECES), (0, "wavelet", IN_PIECES), (1, "none", IN_PIECES)),
        ],
        (0, 1),
        ("adain", "wavelet", "none"),
        (None, IN_PIECES),
    ),
)
def test_each_half_of_a_map_is_its_own_result_away_from_the_border(
    pipe, lq, axis, color_fix, tiling
):
    lq = lq.crop((0, 0, 16, 16))
    halves = np.repeat([[1], [900]], 8, axis=0)
    options = {"process_size": 0, "output_type": "pt"}
    options |= {"color_fix": color_fix, "tiling": tiling}
    found = pipe(lq, halves if axis == 0 else halves.T, **options)
    sides = [pipe(lq, t, **options) for t in (1, 900)]
    assert (sides[0] - sides[1]).abs().max() > 0.02
    for own, far in zip(sides, (slice(0, 28), slice(36, 64)), strict=True):
        part = (slice(None), far) if axis == 0 else (slice(None), slice(None), far)
        torch.testing.assert_close(found[part], own[part], rtol=0, atol=1e-5)


def test_a_small_region_is_not_lost(pipe, lq):
    lq = lq.crop((8, 8, 32, 32))
    regions = {"default": 900, "regions": [{"box": [12, 12, 14, 14], "timestep": 1}]}
    options = {"process_size": 0, "output_type": "pt"}
    found = pipe(lq, regions, **options)
    inside = (slice(None), slice(50, 54), slice(50, 54))
    faithful, vivid = (pipe(lq, t, **options) for t in (1, 900))
    torch.testing.assert_close(found[inside], faithful[inside], rtol=0, atol=1e-5)
    assert not torch.equal(faithful[inside], vivid[inside])


@pytest.mark.parametrize("scale", [2, 2.7])
def test_pieces_give_the_whole(pipe, lq, scale):
    lq = lq.crop((0, 0, 21, 25))
    values = np.array([[0, 400], [400, 999]])
    options = {"scale": scale, "process_size": 0, "output_type": "pt"}
    whole = pipe(lq, values, tiling=None, **options)
    found = pipe(lq, values, tiling=IN_PIECES, **options)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)
    assert (whole - pipe(lq, 500, tiling=None, **options)).abs().max() > 0.01


def test_a_map_lies_where_it_should_whatever_the_padding_and_the_networks_size(model_dir):
    pipe = TADSRPipeline.from_pretrained(model_dir)
    image = torch.rand(3, 15, 30)
    regions = {"default": 900, "regions": [{"box": [0, 0, 15, 15], "timestep": 1}]}
    mask = np.array([[1.0, 900.0]]).repeat(15, 1)
    for options in ({"process_size": 0, "scale": 1}, {"process_size": 64, "scale": 2}):
        boxes = pipe(image, regions, **options)
        torch.testing.assert_close(boxes, pipe(image, mask, **options), rtol=0, atol=1e-4)


@pytest.fixture
def small(lq):
    return lq.crop((0, 0, 12, 10))


def test_images_of_a_list_or_batch_have_a_map_each(model_dir, small):
    pipe = TADSRPipeline.from_pretrained(model_dir)
    alone = [np.asarray(pipe(small, t, process_size=0)).astype(int) for t in (RAMP, 300)]
    together = pipe([small, small, small], [RAMP, 300, RAMP], process_size=0)
    for found, expect in zip(together, (*alone, alone[0]), strict=True):
        assert np.abs(np.asarray(found) - expect).max() <= 1
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
    batch = pipe(torch.stack([pixels, pixels]), [RAMP, 300], process_size=0)
    for found, expect in zip(batch, alone, strict=True):
        assert np.abs(found.permute(1, 2, 0).numpy() * 255 - expect).max() <= 1
    for found in pipe([small, small], RAMP, process_size=0):
        assert np.abs(np.asarray(found) - alone[0]).max() <= 1


def test_a_file_in_strips_and_a_seed_go_with_a_map(pipe, small, tmp_path):
    pipe.upscale_to_file(small, tmp_path / "out.png", RAMP, tiling=IN_PIECES, process_size=0)
    expect = np.asarray(pipe(small, RAMP, process_size=0)).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")) - expect).max() <= 1
    seeded = [
        np.asarray(pipe(small, t, process_size=0, generator=torch.Generator().manual_seed(3)))
        for t in (TimestepMap.constant(400), 400)
    ]
    assert np.abs(seeded[0].astype(int) - seeded[1]).max() <= 1


def test_half_precision_is_close(pipe, small):
    half = TADSRPipeline.from_pretrained("tadsr-tiny", torch_dtype=torch.bfloat16)
    results = [p(small, RAMP, process_size=0, output_type="pt") for p in (pipe, half)]
    assert (results[0] - results[1]).abs().mean() < 0.02


def test_wrong_maps_are_refused_before_any_work(pipe, lq, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.setattr(type(pipe), "_embed", fails)
    for timestep, message in (
        (np.full((2, 2), 1200), "0..999, got one of up to 1200"),
        (Image.new("RGB", (2, 2), "red"), "got mode RGB"),
        ({"default": 1, "regions": [{"box": [0, 0, 50, 9], "timestep": 2}]}, "41×53 px"),
        ([np.zeros((2, 2)), 3], r"per image \(1\), got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(lq, timestep)
    with pytest.raises(TypeError, match="whole number"):
        pipe([lq, lq], [np.zeros((2, 2)), "3"])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_a_mask_lies_as_viewers_show_it(mode, orientation, tmp_path):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    image = Image.fromarray(upright.astype(np.uint16) if mode == "I;16" else upright)
    image = image.convert("RGB") if mode == "RGB" else image
    if orientation > 1:
        image = image.transpose(Image.Transpose((0, 3, 1, 5, 2, 6, 4)[orientation - 2]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "mask.png", exif=exif)
    with Image.open(tmp_path / "mask.png") as opened:
        assert np.array_equal(TimestepMap.from_image(opened).values, upright)
