import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tadsr.config import MAX_ENLARGED_ASPECT, UpscaleSettings

SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.floats(1, 8))
def test_output_size_is_the_rounded_product(height, width, scale):
    settings = UpscaleSettings(scale=scale)
    assert settings.output_size(height, width) == (round(scale * height), round(scale * width))


@given(SIDES, SIDES, st.sampled_from([0, 64, 512]))
def test_the_network_never_works_smaller_than_the_output_nor_much_larger(
    height, width, process_size
):
    settings = UpscaleSettings(scale=4, process_size=process_size)
    out, net = settings.output_size(height, width), settings.network_size(height, width)
    assert net[0] >= out[0]
    assert net[1] >= out[1]
    if net != out:
        assert min(out) < process_size
        assert min(net) <= process_size
        rounding = 1 + 1 / min(net)
        assert math.prod(net) <= MAX_ENLARGED_ASPECT * process_size**2 * rounding


@pytest.mark.parametrize(
    ("size", "expect"),
    [
        ((128, 128), (512, 512)),
        ((64, 96), (512, 768)),  # the shorter side becomes 512, as published
        ((200, 300), (800, 1200)),  # large enough: as it is
        ((1, 1), (512, 512)),
    ],
)
def test_known_network_sizes(size, expect):
    assert UpscaleSettings().network_size(*size) == expect


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0.5}, ValueError, "at least 1, got 0.5"),
        ({"scale": math.nan}, ValueError, "finite"),
        ({"scale": math.inf}, ValueError, "finite"),
        ({"scale": "4"}, TypeError, "scale must be a number"),
        ({"color_fix": "addain"}, ValueError, "adain, wavelet, none"),
        ({"process_size": -1}, ValueError, "whole number of at least 0 px"),
        ({"process_size": 1.5}, TypeError, "at least 0 px, got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        UpscaleSettings(**arguments)


def test_no_color_fix_is_none():
    assert UpscaleSettings(color_fix=None) == UpscaleSettings(color_fix="none")
