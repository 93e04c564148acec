"""Timestep maps by themselves: where they come from, and resizing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tadsr import TimestepMap
from tadsr.conditioning import TimestepField, run_at
from tadsr.conditioning.field import read_timestep_maps
from tadsr.conditioning.timestep_map import MAX_LEVELS

SIDES = st.integers(1, 40)


@given(SIDES, SIDES, SIDES, SIDES)
def test_a_map_is_resized_as_by_pillows_bilinear_filter(h, w, height, width):
    values = torch.rand(h, w, generator=torch.Generator().manual_seed(h)) * 999
    image = Image.fromarray(values.numpy()).resize((width, height), Image.Resampling.BILINEAR)
    found = TimestepMap(values).at(height, width)
    torch.testing.assert_close(found, torch.from_numpy(np.array(image)), rtol=0, atol=2e-2)


@given(SIDES, SIDES, SIDES, SIDES)
def test_the_weights_of_the_knots_give_the_timestep_back(h, w, height, width):
    values = torch.rand(h, w, generator=torch.Generator().manual_seed(w)) * 999
    found = TimestepMap(values)
    weights = found.weights(height, width)
    assert weights.shape == (len(found.knots), height, width)
    rows = (height // 3, height // 2 + 1)
    assert found.weights(height, width, rows).equal(weights[:, slice(*rows)])
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(height, width))
    knots = torch.tensor(found.knots).float()
    expect = found.at(height, width).clamp(knots[0], knots[-1])
    torch.testing.assert_close((weights * knots[:, None, None]).sum(0), expect, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("values", "knots"),
    [
        ([[7.4]], (7,)),
        ([[1.0, 900.0]], (1, 900)),
        ([[0.0, 999.0, 400.0, 400.0]], (0, 400, 999)),
        (torch.arange(1000.0)[None], (0, 249, 499, 749, 999)),
        # A feathered edge has timesteps of less than a hundredth of the area.
        (torch.cat([torch.full((500,), 100.0), torch.linspace(100, 300, 60)])[None], (100, 300)),
        # However small a place, it gets what was asked for it.
        (torch.cat([torch.full((5000,), 100.0), torch.tensor([600.0])])[None], (100, 600)),
        # A soft edge adds what lies between, not a run for each of its levels.
        (torch.cat([torch.linspace(1, 900, 9), torch.full((91,), 900.0)])[None],
         (1, 225, 450, 675, 900)),
        (torch.arange(20.0).repeat(5, 1).repeat_interleave(4, 1) * 10, None),
    ],
)  # fmt: skip
def test_knots_are_the_ends_what_holds_area_and_what_lies_between(values, knots):
    found = TimestepMap(torch.as_tensor(values)).knots
    if knots is None:  # more levels than can have one each
        assert len(found) <= MAX_LEVELS
        knots = found
        assert (found[0], found[-1]) == (0, 190)
    assert found == knots


def test_regions_get_the_timesteps_that_they_name():
    regions = {
        "default": 900,
        "regions": [
            {"box": [0, 0, 3, 3], "timestep": 400},
            {"box": [90, 90, 93, 93], "timestep": 1},
            {"box": [90, 0, 93, 3], "timestep": 200},
            {"box": [90, 0, 93, 3], "timestep": 300},  # over the one before
        ],
    }
    assert TimestepMap.from_regions(regions, (100, 100)).knots == (1, 300, 400, 900)
    many = [{"box": [x, 0, x + 1, 1], "timestep": 9 * x} for x in range(99)]
    found = TimestepMap.from_regions({"default": 999, "regions": many}, (100, 100)).knots
    assert (found[0], found[-1]) == (0, 999)
    assert len(found) <= MAX_LEVELS + 3


def test_every_position_mixes_the_results_of_its_knots():
    values = torch.tensor([[100.0, 300.0], [300.0, 100.0]]).repeat_interleave(2, 0)
    field = TimestepField((TimestepMap(values), TimestepMap.constant(11)))
    results = run_at(
        field, lambda t: torch.tensor(t).half()[:, None, None, None].expand(2, 3, 4, 2)
    )
    assert [result[:, 0, 0, 0].tolist() for result in results] == [[100, 11], [300, 11]]
    mixed = field.mix(results, (4, 2))
    assert mixed.dtype == torch.float16
    assert (mixed[0] == values).all()
    assert (mixed[1] == 11).all()
    part = field.mix([result[:, :, 1:3] for result in results], (4, 2), (1, 3))
    assert part.equal(mixed[:, :, 1:3])
    assert len(field[1:].maps) == 1
    image = torch.rand(1, 3, 4, 2)
    assert field[1:].mix([image], (4, 2)) is image


def test_the_noise_is_the_same_at_every_knot():
    generator = torch.Generator().manual_seed(3)
    expect = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3))

    def draw(timesteps):
        return torch.randn(1, 1, 2, 2, generator=generator)

    field = TimestepField((TimestepMap(torch.tensor([[1.0, 9.0]])),))
    for timesteps, count in ((field, 2), ([1], 1)):
        generator.manual_seed(3)
        results = run_at(timesteps, draw, generator)
        assert len(results) == count
        assert all(result.equal(expect) for result in results)


def test_images_hold_timesteps_or_are_spread_over_a_range():
    gray = np.array([[0, 51, 255]], np.uint8)
    assert TimestepMap.from_image(Image.fromarray(gray)).values.tolist() == [[0, 51, 255]]
    for image in (
        Image.fromarray(gray),
        Image.fromarray(gray.astype(np.uint16) * 257),
        Image.fromarray(gray.astype(np.int32) * 257),
        gray[..., None],
        gray.astype(np.uint16) * 257,
        torch.from_numpy(gray) / 255,
    ):
        values = TimestepMap.from_image(image, (50, 800)).values
        torch.testing.assert_close(values, torch.tensor([[50.0, 200.0, 800.0]]), rtol=0, atol=1e-3)
    assert TimestepMap.from_image(gray > 60, (800, 50)).values.tolist() == [[800, 800, 50]]
    assert TimestepMap.from_image(np.array([[700, 3]])).values.tolist() == [[700, 3]]
    for mode in ("RGB", "RGBA", "LA", "P"):
        saved = Image.fromarray(gray).convert(mode)
        assert TimestepMap.from_image(saved).values.tolist() == [[0, 51, 255]]
    white = TimestepMap.from_image(Image.new("1", (2, 2), 1), (0, 9)).values
    assert white.tolist() == [[9, 9], [9, 9]]


def test_regions_are_drawn_in_order_and_fade_out():
    regions = {
        "default": 500,
        "regions": [
            {"box": [0, 0, 4, 2], "timestep": 100},
            {"box": [2, 0, 4, 2], "timestep": 900, "feather": 2},
        ],
    }
    values = TimestepMap.from_regions(regions, (3, 7)).values
    # Centres of columns 0 and 1 are 1.5 and 0.5 px away, of columns 4 and 5 as well.
    assert values[0].tolist() == [300, 700, 900, 900, 800, 600, 500]
    assert values[2].tolist()[2:4] == [800, 800]
    assert TimestepMap.from_regions({"default": 7}, (2, 2)).values.unique().tolist() == [7]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TimestepMap(np.zeros((2, 2))), TypeError, "float32 tensor, got ndarray"),
        (lambda: TimestepMap(torch.zeros(2, 2).double()), TypeError, "got torch.float64"),
        (lambda: TimestepMap(torch.zeros(3)), ValueError, r"shape \(height, width\)"),
        (lambda: TimestepMap(torch.full((2, 2), torch.nan)), ValueError, "finite"),
        (lambda: TimestepMap(torch.full((2, 2), -1.0)), ValueError, "at least 0"),
        (lambda: TimestepMap.from_image(Image.new("RGB", (2, 2), 7)), ValueError, "got mode RGB"),
        (lambda: TimestepMap.from_image(Image.new("LA", (2, 2))), ValueError, "transparency"),
        (lambda: TimestepMap.from_image(Image.new("CMYK", (2, 2))), ValueError, "got mode CMYK"),
        (lambda: TimestepMap.from_image(np.zeros((2, 2, 3))), ValueError, r"shape \(H, W\)"),
        (lambda: TimestepMap.from_image("mask.png"), TypeError, "got str"),
        (lambda: TimestepMap.from_image(np.zeros((2, 2)), (1, 2, 3)), ValueError, "2 numbers"),
        (lambda: TimestepMap.from_image(np.zeros((2, 2)), (-1, 2)), ValueError, "got -1"),
        (lambda: TimestepMap.from_image(np.full((2, 2), 2.0), (1, 2)), ValueError, r"in 0..1;"),
        (lambda: TimestepMap.from_image(np.zeros((2, 2), int), (1, 2)), TypeError, "uint8"),
    ],
)
def test_what_is_no_map_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("regions", "error", "message"),
    [
        ([1], TypeError, "must be a mapping, got list"),
        ({}, ValueError, "must have default"),
        ({"default": 1, "region": []}, ValueError, r"no keys but default, regions, got \['region'"),
        ({"default": "1"}, TypeError, "default must be a number, got str"),
        ({"default": True}, TypeError, "default must be a number, got bool"),
        ({"default": 1, "regions": {}}, TypeError, "regions must be a list"),
        ({"default": 1, "regions": [{}]}, ValueError, r"regions\[0\] must have box, timestep"),
        ({"default": 1, "regions": [{"box": [0, 0, 1], "timestep": 1}]}, ValueError, "4 numbers"),
        (
            {"default": 1, "regions": [{"box": [2, 0, 2, 1], "timestep": 1}]},
            ValueError,
            r"x0 < x1 and y0 < y1, got \[2.0, 0.0, 2.0, 1.0\]",
        ),
        (
            {"default": 1, "regions": [{"box": [0, 0, 9, 1], "timestep": 1}]},
            ValueError,
            r"inside the input's 8×4 px",
        ),
    ],
)
def test_wrong_regions_are_refused_with_their_place(regions, error, message):
    with pytest.raises(error, match=message):
        TimestepMap.from_regions(regions, (4, 8))


def test_maps_are_found_among_what_users_give():
    sizes = [(4, 8), (2, 2)]
    for numbers in (500, [1, 2], np.array([1, 2]), torch.tensor([3, 4]), (1, 2)):
        assert read_timestep_maps(numbers, sizes, 999) is None
    known = TimestepMap.constant(3)
    for one in (known, Image.new("L", (2, 2)), np.zeros((2, 2)), {"default": 3}):
        found = read_timestep_maps(one, sizes, 999)
        assert [type(entry) for entry in found] == [TimestepMap] * 2
    found = read_timestep_maps([700, known], sizes, 999)
    assert found[0] == 700
    assert found[1] is known
    boxes = {"default": 3, "regions": [{"box": [0, 0, 1, 1], "timestep": 9}]}
    assert [m.values.shape for m in read_timestep_maps(boxes, sizes, 999)] == sizes
    with pytest.raises(ValueError, match=r"per image \(2\), got 3"):
        read_timestep_maps([known, 1, 2], sizes, 999)
    with pytest.raises(ValueError, match=r"in 0..999, got one of up to 1200"):
        read_timestep_maps(TimestepMap.constant(1200), sizes, 999)
