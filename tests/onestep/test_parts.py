"""The engine's pieces by themselves."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tadsr.onestep import EnginePlan, choose_plan, same_size_ranges
from tadsr.onestep.fused_layers import FusedLayers
from tadsr.onestep.graphs import GraphCache
from tadsr.onestep.operations import attend_in_chunks, group_norm_silu_in_pieces, transposed_weight

SIDES = st.integers(1, 6)


@given(height=SIDES, width=SIDES, channels=st.tuples(SIDES, SIDES), batch=st.integers(1, 2))
def test_one_transposed_convolution_is_enlargement_and_convolution(height, width, channels, batch):
    x = torch.randn(batch, channels[0], height, width, dtype=torch.float64)
    weight = torch.randn(channels[1], channels[0], 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    folded = F.conv_transpose2d(x, transposed_weight(weight), stride=2, padding=1)
    torch.testing.assert_close(folded, expected, atol=1e-12, rtol=0)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 2),
    per_sample=st.booleans(),
    silu=st.booleans(),
    in_place=st.booleans(),
)
def test_normalization_in_pieces_is_group_norm(height, width, batch, per_sample, silu, in_place):
    x = (3 + torch.randn(batch, 8, height, width)).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, batch, 8) if per_sample else torch.randn(2, 8)
    expected = F.group_norm(x.double(), 2, eps=1e-3)
    rows = (v.double().reshape(-1, 8, 1, 1) for v in (weight, bias))
    expected = expected * next(rows) + next(rows)
    expected = F.silu(expected) if silu else expected
    out = x if in_place else None
    result = group_norm_silu_in_pieces(x, 2, weight, bias, 1e-3, silu=silu, out=out)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    assert (result.data_ptr() == x.data_ptr()) is in_place


def test_normalization_in_pieces_keeps_what_torch_loses():
    x = torch.randn(1, 32, 512, 256) + 4
    x = x.contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32), torch.zeros(32)
    result = group_norm_silu_in_pieces(x, 8, ones, zeros, 1e-6, silu=False)
    expected = F.group_norm(x.double(), 8, eps=1e-6)
    assert ((result - expected).norm() / expected.norm()).item() < 1e-6


@pytest.mark.parametrize("score_bytes", [1, 200, 2**20])
def test_attention_in_chunks_is_attention(score_bytes, monkeypatch):
    monkeypatch.setattr("tadsr.onestep.operations.SCORE_BYTES", score_bytes)
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    result = attend_in_chunks(query, key, value, 0.3)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_the_scratch_grows_and_is_used_again():
    layers = FusedLayers(EnginePlan())
    small, large = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 5, 3)
    first = layers._scratch_like(large, torch.float32)
    assert first.shape == large.shape
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert layers._scratch_like(small, torch.float32).data_ptr() == first.data_ptr()
    larger = torch.randn(3, 4, 5, 3)
    assert layers._scratch_like(larger, torch.float32).shape == larger.shape


@given(
    sizes=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=9),
    limit=st.integers(1, 4),
)
def test_batches_are_neighbours_of_one_size(sizes, limit):
    ranges = same_size_ranges(sizes, lambda size: limit)
    assert [i for group in ranges for i in group] == list(range(len(sizes)))
    for group in ranges:
        assert 1 <= len(group) <= limit
        assert len({sizes[i] for i in group}) == 1
    if limit == 4:
        runs = 1 + sum(a != b for a, b in pairwise(sizes)) if sizes else 0
        assert len(ranges) <= runs + len(sizes) // 4


class Recording:
    """In place of a graph, where there is no GPU: which shapes are recorded when."""

    made: list[int]

    def __init__(self, stage, inputs, conditions):
        self.stage = stage
        self.made.append(len(inputs[0]))

    def run(self, inputs, conditions):
        return self.stage(*inputs, *conditions)


def run_sizes(cache, sizes):
    for size in sizes:
        x = torch.full((size,), float(size))
        result, is_finite = cache.run("stage", lambda x: (2 * x, x.isfinite().all()), (x,))
        assert torch.equal(result, 2 * x)
        assert is_finite


@pytest.mark.parametrize(
    ("record_after", "sizes", "recorded"),
    [
        (1, [1, 2, 3], []),
        (1, [1, 2, 3, 1, 1, 2, 1, 2], [1, 2]),
        (4, [1, 2, 1, 1, 2, 1], []),
        (4, [1, 2, 1, 1, 2, 1, 1], [1]),
        # More in rotation than are kept do not push each other out.
        (1, [1, 2, 3, 4, 5] * 20, [1, 2, 3]),
        # The others are not used any more.
        (1, [1, 2, 3, 4, 5] * 20 + [4] * 20, [1, 2, 3, 4]),
    ],
)
def test_shapes_are_recorded_once_they_have_come_often(record_after, sizes, recorded):
    Recording.made = []
    cache = GraphCache(3, record_after, Recording)
    run_sizes(cache, sizes)
    assert Recording.made == recorded
    assert len(cache.graphs) == min(3, len(recorded))


def test_a_shape_that_cannot_be_recorded_is_run_as_it_is_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tries = []

    def record(stage, inputs, conditions):
        tries.append(len(inputs[0]))
        if tries[-1] > 1:
            raise RuntimeError("no memory")
        return Recording(stage, inputs, conditions)

    Recording.made = []
    cache = GraphCache(3, 1, record)
    with pytest.warns(UserWarning, match=r"could not be recorded \(no memory\)") as caught:
        run_sizes(cache, [2, 2, 2, 3, 3, 3, 1, 1, 1])
    assert len(caught) == 1
    assert tries == [2, 3, 1]
    assert len(cache.graphs) == 1
    cache.clear()
    assert not cache.graphs
    assert cache._pool is None


def test_two_pipelines_record_one_after_the_other():
    has_begun, has_met = Event(), Event()
    are_alone = []

    def record(stage, inputs, conditions):
        if not has_begun.is_set():
            has_begun.set()
            are_alone.append(not has_met.wait(0.1))
        else:
            has_met.set()
        return Recording(stage, inputs, conditions)

    Recording.made = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_sizes, GraphCache(3, 1, record), [1, 1])
        assert has_begun.wait(10)
        second = pool.submit(run_sizes, GraphCache(3, 1, record), [2, 2])
        first.result(), second.result()
    assert are_alone == [True]
    assert has_met.is_set()
    assert Recording.made == [1, 2]


def test_a_plan_is_checked_and_fits_the_device():
    with pytest.raises(ValueError, match="upsampling must be one of transposed, enlarged"):
        EnginePlan(upsampling="bilinear")
    with pytest.raises(ValueError, match="record_after must be at least 1, got 0"):
        EnginePlan(record_after=0)
    with pytest.raises(ValueError, match="max_graphs must be at least 3, got 2"):
        EnginePlan(max_graphs=2)
    plan = choose_plan(torch.device("cpu"), torch.float32)
    assert plan.channels_last
    assert not plan.graphs
    assert choose_plan(torch.device("meta"), torch.float32) is None
