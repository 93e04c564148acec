"""Statistics, storage and windows: the laws that the layers build on."""

import resource
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tadsr.onestep.storage as storage_module
from tadsr.errors import TADSRError
from tadsr.onestep import TileSpec
from tadsr.onestep.activations import ChannelStatistics, JoinedActivation
from tadsr.onestep.operations import Windows, attend_in_windows, attend_to_blocks
from tadsr.onestep.storage import BandStorage, PlannedStorage

CPU = torch.device("cpu")


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4, 8]),
    st.floats(-200, 200),
    st.booleans(),
)
def test_statistics_of_bands_make_the_whole_images_norm(bands, groups, offset, is_timed):
    generator = torch.Generator().manual_seed(sum(bands))
    x = torch.randn(2, 8, sum(bands), 5, generator=generator) + offset
    norm = nn.GroupNorm(groups, 8)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    statistics = ChannelStatistics(2, 8, CPU)
    for band in x.split(bands, dim=2):
        statistics.add(band)
    scale, shift = torch.randn(2, 2, 8, generator=generator) if is_timed else (None, None)
    found = statistics.norm(norm, scale, shift)(x, False)
    wanted = norm.double()(x.double())
    if is_timed:
        wanted = wanted * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(
        statistics.variance(correction=1), x.double().var(dim=(2, 3)), rtol=1e-4, atol=1e-6
    )


def test_a_constant_channel_has_no_spread():
    statistics = ChannelStatistics(1, 2, CPU)
    statistics.add(torch.full((1, 2, 4, 4), 3.0))
    statistics.add(torch.full((1, 2, 4, 4), 3.0))
    assert statistics.variance().tolist() == [[0, 0]]
    found = statistics.norm(nn.GroupNorm(2, 2))(torch.full((1, 2, 1, 1), 3.0), False)
    torch.testing.assert_close(found, torch.zeros(1, 2, 1, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0])
def test_what_is_written_in_bands_is_read_in_bands(dtype, limit):
    storage = BandStorage(CPU, device_bytes=limit)
    x = torch.randn(2, 3, 11, 7).to(dtype)
    activation = storage.allocate((2, 3, 11, 7), dtype)
    activation.begin(with_statistics=True)
    for start in (0, 4, 8):
        activation.write(start, x[:, :, start : start + 4])
    for start, stop in ((0, 11), (3, 4), (5, 10)):
        rows = activation.read(start, stop)
        assert rows.is_contiguous(memory_format=torch.channels_last)
        assert rows.equal(x[:, :, start:stop])
        rows.zero_()  # a copy: the next reader sees what was written
    assert activation.statistics.count == 77
    joined = JoinedActivation([activation, activation])
    assert joined.read(2, 5).equal(torch.cat([x, x], 1)[:, :, 2:5])
    assert joined.statistics.mean.shape == (2, 6)
    assert (storage.spilled_bytes > 0) == (limit == 0)
    activation.free()
    activation.free()


def stored(storage, x):
    """Return an activation that holds x."""
    activation = storage.allocate(tuple(x.shape), x.dtype)
    activation.begin(with_statistics=False)
    activation.write(0, x)
    return activation


def test_memory_is_counted_and_given_back():
    x = torch.randn(1, 1, 10, 10)
    room = BandStorage(CPU, device_bytes=4 * 100)
    first, second = stored(room, x), stored(room, x)
    assert room.spilled_bytes == 400
    first.free()
    stored(room, x)
    assert room.spilled_bytes == 400
    second.free()
    assert stored(room, 2 * x).read(0, 10).equal(2 * x)
    assert room.spilled_bytes == 800
    plan = PlannedStorage(CPU)
    first, second = (plan.allocate((1, 1, 1000, 1000), torch.float16) for _ in range(2))
    first.free()
    plan.allocate((1, 1, 500, 1000), torch.float16)
    assert plan.peak_bytes == 4_000_000
    with pytest.raises(RuntimeError, match="no content"):
        second.read(0, 1)


@pytest.mark.parametrize("limit", [2000, 0])
@given(
    height=st.integers(1, 40),
    band=st.integers(1, 40),
    batch=st.integers(1, 2),
    ahead=st.integers(0, 3),
)
def test_rows_that_were_read_make_room_for_those_to_come(limit, height, band, batch, ahead):
    """One activation is read from its start, with rows beyond the band, as another is written."""
    x = torch.randn(batch, 2, height, 3)
    with mock.patch.object(storage_module, "_PART_BYTES", 4 * x[:, :, :1].nbytes):
        room = BandStorage(CPU, device_bytes=limit)
        source, target = stored(room, x), room.allocate(tuple(x.shape), x.dtype)
        target.begin(with_statistics=True)
        for start in range(0, height, band):
            stop = min(start + band, height)
            rows = source.read(max(0, start - ahead), min(stop + ahead, height))
            source.give_up(stop - ahead)
            target.write(start, -rows[:, :, min(start, ahead) :][:, :, : stop - start])
        assert target.read(0, height).equal(-x)
        source.free()
        # Parts that were given back serve again: there is room for what comes, where x fits.
        again = stored(room, x)
        assert again.read(0, height).equal(x)
        assert target.read(0, height).equal(-x)


def test_what_is_given_up_is_held_no_more():
    x = torch.randn(1, 2, 64, 8)
    with mock.patch.object(storage_module, "_PART_BYTES", x.nbytes // 16):
        room = BandStorage(CPU, device_bytes=x.nbytes + x.nbytes // 8)
        source, target = stored(room, x), room.allocate(tuple(x.shape), x.dtype)
        target.begin(with_statistics=False)
        for row in range(64):
            target.write(row, source.read(row, row + 1))
            source.give_up(row + 1)
    assert room.spilled_bytes == 0
    assert target.read(0, 64).equal(x)


def test_a_temporary_file_without_room_is_told():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    storage = BandStorage(CPU, device_bytes=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(TADSRError, match=r"room for 65536 bytes.*TMPDIR"):
            stored(storage, torch.zeros(1, 4, 64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 60, 100])
def test_attention_to_blocks_is_attention_to_all(dtype, size):
    query, key, value = (2 * torch.randn(3, 2, 2, 60, 8)).to(dtype)
    blocks = zip(key.split(size, dim=2), value.split(size, dim=2), strict=True)
    found = attend_to_blocks(query, blocks, scale=1.5)
    wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=1.5)
    at_once = F.scaled_dot_product_attention(query, key, value, scale=1.5)
    assert found.dtype == dtype
    assert (found - wanted).norm() <= 1.2 * (at_once - wanted).norm() + 1e-6 * wanted.norm()


@given(st.integers(1, 300), st.integers(1, 120))
def test_windows_serve_every_position_once_from_well_inside(length, size):
    windows = Windows(length, size)
    served = windows.served
    assert served[0][0] == 0
    assert served[-1][1] == length
    assert all(a[1] == b[0] for a, b in pairwise(served))
    for start, (first, last) in zip(windows.starts, served, strict=True):
        assert start <= first < last <= start + windows.side <= length
        margin = windows.side // 4 - 1
        assert first == 0 or first - start >= margin
        assert last == length or start + windows.side - last >= margin


@pytest.mark.parametrize("side", [7, 8, 40])
def test_attention_in_windows_is_attention_over_the_window(side):
    query, key, value = torch.randn(3, 2, 6, 21, 13)
    rows, columns = Windows(21, side), Windows(13, side)
    found = torch.cat(
        [
            out
            for _, out in attend_in_windows(
                lambda a, b: query[:, :, a:b],
                lambda a, b: (key[:, :, a:b], value[:, :, a:b]),
                rows,
                columns,
                heads=3,
                scale=0.5,
            )
        ],
        dim=2,
    )
    y, x = 11, 12
    top = next(t for t, (a, b) in zip(rows.starts, rows.served, strict=True) if a <= y < b)
    left = next(t for t, (a, b) in zip(columns.starts, columns.served, strict=True) if a <= x < b)
    place = (..., slice(top, top + rows.side), slice(left, left + columns.side))
    keys, values = (t[place].flatten(2).unflatten(1, (3, 2)) for t in (key, value))
    scores = torch.einsum("bhc,bhcn->bhn", query[:, :, y, x].unflatten(1, (3, 2)), keys) * 0.5
    wanted = torch.einsum("bhn,bhcn->bhc", F.softmax(scores, -1), values).flatten(1)
    torch.testing.assert_close(found[:, :, y, x], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"band_bytes": 1000}, {"max_memory": 0}, {"attention_px": 100}, {"attention_px": -1}],
)
def test_sizes_out_of_range_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        TileSpec(**changes)
