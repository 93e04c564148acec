"""The networks through OpenVINO itself: as plain modules, made once, never for other weights."""

import math
import os
import shutil
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from tadsr.errors import TADSRError, TADSRWarning
from tadsr.onestep import openvino
from tadsr.onestep.openvino import OpenVinoStages, folder_of
from tadsr.onestep.selfcheck import remember_fastest
from tadsr.onestep.stages import FusedStages
from tadsr.onestep.step import OneStepEngine
from tests.small_models import small_unet, small_vae

from .conftest import build_networks, make_inputs

MAX_ERROR = 1 / 255
"""Half a level of 255, in [-1, 1]."""
LARGE_PX = 24
"""For which OpenVINO is tried, here."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def stored(cache, monkeypatch):
    monkeypatch.setenv("TADSR_CACHE", str(cache))
    return cache / "openvino"


def build_smallest():
    """Networks of the fewest layers, whose graphs are made in a second."""
    torch.manual_seed(0)
    vae = small_vae((4, 8), norm_num_groups=2, mid_block_add_attention=False)
    blocks = {f"{way}_block_types": (f"{way.title()}Block2D",) for way in ("down", "up")}
    unet = small_unet((4,), norm_num_groups=2, cross_attention_dim=6, **blocks)
    return vae.requires_grad_(False), unet.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build_smallest()


@torch.no_grad()
def restore(model, alphas_cumprod, choice, **inputs):
    engine = OneStepEngine(*model, alphas_cumprod, choice)
    return engine.restore(*make_inputs(**inputs))


@pytest.mark.parametrize(
    "inputs",
    [{}, {"batch": 2, "height": 40, "width": 24, "timesteps": [3, 900]}],
    ids=["one", "two, odd"],
)
def test_openvino_computes_what_plain_modules_do(stored, alphas_cumprod, inputs):
    model = build_networks()
    expected = restore(model, alphas_cumprod, "eager", **inputs)
    found = restore(model, alphas_cumprod, "openvino", **inputs)
    torch.testing.assert_close(found, expected, atol=MAX_ERROR, rtol=0)


def test_graphs_are_made_once_for_each_model(stored, model, alphas_cumprod):
    restore(model, alphas_cumprod, "openvino")
    folder = folder_of(*model)
    made = {path: path.stat().st_mtime_ns for path in stored.rglob("*")}
    restore(model, alphas_cumprod, "openvino")
    assert {path: path.stat().st_mtime_ns for path in stored.rglob("*")} == made
    assert {path.suffix for path in folder.iterdir()} == {".xml", ".bin"}
    vae, unet = build_smallest()
    assert folder_of(vae, unet) == folder
    # diffusers' own notes: a set, whose order differs between processes, and a place.
    unet.register_to_config(_use_default_values=["dropout", "act_fn"], _name_or_path="elsewhere")
    assert folder_of(vae, unet) == folder
    with torch.no_grad():
        unet.conv_out.bias += 1e-3
    assert folder_of(vae, unet) not in (folder, folder_of(*model))


def test_damaged_graphs_are_made_anew(stored, model, alphas_cumprod):
    expected = restore(model, alphas_cumprod, "openvino")
    folder = folder_of(*model)
    (folder / "decoder.xml").unlink()
    weights = (folder / "encoder.bin").read_bytes()
    (folder / "encoder.bin").write_bytes(weights[: len(weights) // 2])
    torch.testing.assert_close(restore(model, alphas_cumprod, "openvino"), expected)
    assert (folder / "encoder.bin").read_bytes() == weights


@pytest.mark.parametrize(
    ("least", "hints", "later"),
    [(-math.inf, ["bf16"], ["bf16"]), (math.inf, ["bf16", "f32"], ["f32"])],
    ids=["near enough", "too far"],
)
def test_graphs_in_bfloat16_must_keep_the_picture(
    stored, model, alphas_cumprod, monkeypatch, tmp_path, least, hints, later
):
    restore(model, alphas_cumprod, "openvino")
    shutil.copytree(folder_of(*model), tmp_path / "openvino" / folder_of(*model).name)
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path))
    monkeypatch.setattr(openvino, "MIN_PSNR", least)
    compiled, compile_graphs = [], openvino._compile

    def spy(stages, folder, hint):
        compiled.append(hint)
        return compile_graphs(stages, folder, hint)

    monkeypatch.setattr(openvino, "_compile", spy)
    for expected in (hints, later):
        OpenVinoStages(*model, alphas_cumprod, torch.bfloat16)
        assert compiled == expected
        compiled.clear()


def test_graphs_that_cannot_be_kept_are_used(model, alphas_cumprod, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path / "file"))
    with pytest.warns(TADSRWarning, match="cannot be kept in .*TADSR_CACHE names another folder"):
        found = restore(model, alphas_cumprod, "openvino")
    expected = restore(model, alphas_cumprod, "eager")
    torch.testing.assert_close(found, expected, atol=MAX_ERROR, rtol=0)


@pytest.fixture
def ran(monkeypatch):
    """The stages that decoded, in order; those named in `ran.slow` take longer."""
    calls = SimpleNamespace(order=[], slow=None)

    def spy(kind):
        decode = kind.decode

        def run(self, pred_x0):
            calls.order.append(kind)
            time.sleep(0.2 if kind is calls.slow else 0)
            return decode(self, pred_x0)

        monkeypatch.setattr(kind, "decode", run)

    spy(FusedStages)
    spy(OpenVinoStages)
    monkeypatch.setattr("tadsr.onestep.choose.OPENVINO_PX", LARGE_PX)
    monkeypatch.setattr("tadsr.onestep.step.OPENVINO_PX", LARGE_PX)
    return calls


@torch.no_grad()
def test_auto_takes_what_was_the_fastest_for_large_images(stored, model, alphas_cumprod, ran):
    def kind_for(height, **options):
        engine = OneStepEngine(*model, alphas_cumprod, **options)
        engine.restore(*make_inputs(height=height))
        is_fused = engine.is_fused((height, 32))
        (kind,) = ran.order
        ran.order.clear()
        assert is_fused is (kind is FusedStages)
        return kind

    remember_fastest(*model, None, "fused")
    remember_fastest(*model, torch.bfloat16, "openvino")  # says nothing of float32
    assert kind_for(LARGE_PX) is FusedStages
    remember_fastest(*model, None, "openvino")
    assert kind_for(LARGE_PX) is OpenVinoStages
    assert kind_for(LARGE_PX - 8) is FusedStages
    # Of bare layers: the command would have to import diffusers first.
    assert kind_for(LARGE_PX, grow=lambda: model) is FusedStages


@pytest.mark.parametrize("slow", [FusedStages, OpenVinoStages])
@torch.no_grad()
def test_auto_times_openvino_at_the_first_large_image(stored, model, alphas_cumprod, ran, slow):
    (stored.parent / "machine.json").unlink(missing_ok=True)
    faster = OpenVinoStages if slow is FusedStages else FusedStages
    ran.slow = slow
    large, small = make_inputs(height=LARGE_PX), make_inputs(height=LARGE_PX - 8)
    engine = OneStepEngine(*model, alphas_cumprod)
    engine.restore(*small)
    assert ran.order == [FusedStages]
    assert engine.is_openvino_untimed()
    found = engine.restore(*large)
    assert {*ran.order} == {FusedStages, OpenVinoStages}
    assert not engine.is_openvino_untimed()
    expected = OneStepEngine(*model, alphas_cumprod, "eager").restore(*large)
    torch.testing.assert_close(found, expected, atol=MAX_ERROR, rtol=0)
    ran.order.clear()
    for images in (large, small):
        engine.restore(*images)
    OneStepEngine(*build_smallest(), alphas_cumprod).restore(*large)  # which knows, of the first
    assert ran.order == [faster, FusedStages, faster]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that may die is forked")
def test_signals_are_handled_after_another_thread_let_go_of_the_graphs(
    stored, model, alphas_cumprod
):
    engines = [OneStepEngine(*model, alphas_cumprod, "openvino")]
    with torch.no_grad():
        engines[0].restore(*make_inputs())
    gone = weakref.ref(engines[0].stages)
    other = threading.Thread(target=engines.clear)
    other.start()
    other.join()
    assert gone() is None
    child = os.fork()
    if child == 0:  # it has this thread's stack for signals
        try:
            signal.signal(signal.SIGCHLD, lambda *_: None)
            signal.raise_signal(signal.SIGCHLD)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@torch.no_grad()
def test_weights_that_openvino_does_not_take_are_refused(alphas_cumprod):
    vae, unet = build_smallest()
    engine = OneStepEngine(vae, unet.bfloat16(), alphas_cumprod, "openvino")
    with pytest.raises(TADSRError, match=r"torch\.float32 on the CPU, got .*bfloat16"):
        engine.stages  # noqa: B018 - built on first use
