"""What the engine does about a GPU that computes wrongly: it notices, says so once, and goes on."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.errors import TADSRWarning

from .values import tensors_in


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def plain(small):
    pipe = small()
    pipe.set_engine("eager")
    return pipe


@pytest.fixture(scope="module")
def expected(plain, photo) -> np.ndarray:
    return restore(plain, photo)[0]


def restore(pipe, photo) -> tuple[np.ndarray, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TADSRWarning)
        result = np.asarray(pipe(photo, process_size=0)).astype(int)
    return result, [str(w.message) for w in caught if issubclass(w.category, TADSRWarning)]


def spoil(device, operation: str, how) -> None:
    """Have an operation of the package give other values than it should."""
    run = device.run_operation

    def run_wrongly(func, args, kwargs):
        result = run(func, args, kwargs)
        if func.overloadpacket.__name__ == operation:
            how(tensors_in(result)[0].inner)
        return result

    device.run_operation = run_wrongly


def fail(_: torch.Tensor) -> None:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("operation", "how", "reason"),
    [
        ("group_norm_silu", lambda x: x.mul_(1.5), "the encoder differs from plain modules by"),
        ("geglu", lambda x: x.add_(3), "the UNet differs from plain modules by"),
        ("add_with_statistics", fail, "RuntimeError: an illegal memory access"),
        ("adain_color_fix_uint8", lambda x: x.bitwise_xor_(1), "adain colour fix gives wrong"),
        pytest.param(
            *("wavelet_color_fix_uint8", lambda x: x.add_(2), "wavelet colour fix gives wrong"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_kernels_are_left_out_with_one_warning(
    operation, how, reason, pretend, small, photo, expected
):
    with pretend() as device:
        pipe = small().to("cuda", torch.float16)
        spoil(device, operation, how)
        result, messages = restore(pipe, photo)
        assert len(messages) == 1
        assert reason in messages[0]
        assert "tadsr doctor --check --json" in messages[0]
        assert np.abs(result - expected).mean() < 4
        device.forget()
        again, messages = restore(pipe, photo)
        assert messages == []
        assert np.abs(again - expected).mean() < 4
        assert not [name for name in device.launches if name.startswith("triton")]


def test_a_right_device_is_remembered(pretend, small, photo):
    counts = []
    for _ in range(2):  # as in two programs: what was found is forgotten in between
        with pretend() as device:
            pipe = small().to("cuda", torch.float16)
            device.forget()
            assert restore(pipe, photo)[1] == []
            counts.append(device.launches["native_group_norm"])
    assert counts[0] > 0
    assert counts[1] == 0


def test_a_chosen_engine_is_taken_at_its_word(pretend, small, photo):
    with pretend() as device:
        pipe = small().to("cuda", torch.float16)
        pipe.set_engine("fused")
        device.forget()
        restore(pipe, photo)
        assert device.launches["native_group_norm"] == 0


def test_kernels_can_be_switched_off(pretend, small, photo, monkeypatch):
    monkeypatch.setenv("TADSR_KERNELS", "0")
    with pretend() as device:
        pipe = small().to("cuda", torch.float16)
        assert restore(pipe, photo)[1] == []
        assert not [name for name in device.launches if name.startswith("triton")]


@torch.no_grad()
def record_soon(pipe) -> None:
    pipe.set_engine(replace(pipe.engine.stages.plan, record_after=2))


MOST_CALLS = 4
"""A size is recorded at the latest when it came so often."""


def test_graphs_take_new_images_and_timesteps(pretend, small, plain, photo):
    with pretend() as device:
        pipe = small().to("cuda", torch.float32)
        record_soon(pipe)
        for _ in range(MOST_CALLS):
            pipe(photo, process_size=0)
            if device.num_replays:
                break
        before = device.num_replays
        for options in ({"timestep": 20}, {"prompt": "a cat"}, {}):
            found = np.asarray(pipe(photo.rotate(180), process_size=0, **options)).astype(int)
            expected = np.asarray(plain(photo.rotate(180), process_size=0, **options))
            assert np.abs(found - expected).max() <= 1
        assert device.num_replays >= before + 9


def test_a_graph_that_replays_wrongly_is_not_used(pretend, small, photo, monkeypatch):
    with pretend():
        pipe = small().to("cuda", torch.float16)
        record_soon(pipe)
        expected = restore(pipe, photo)[0]
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
        for _ in range(MOST_CALLS):
            result, messages = restore(pipe, photo)
            assert np.abs(result - expected).max() <= 1
            if messages:
                break
        assert len(messages) == 1
        assert "first replay differs" in messages[0]
        assert restore(pipe, photo)[1] == []
