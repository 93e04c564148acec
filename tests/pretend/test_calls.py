"""Every kind of call on a GPU that is not there: nothing crosses devices, the picture is right."""

import subprocess
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tadsr import TADSRPipeline, TileSpec
from tadsr.errors import TADSRWarning
from tadsr.images import resize_bicubic, resize_bicubic_rows
from tests.crossings import crossed

from .conftest import Machine
from .tensors import PretendDevice

SMALL_BANDS = TileSpec(band_bytes=2**19)
SPILLING = TileSpec(band_bytes=2**19, max_memory=1)
WINDOWS = TileSpec(band_bytes=2**19, attention_px=128)

Call = Callable[..., object]


def picture(height: int = 14, width: int = 18, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def two_sides(height: int = 14, width: int = 18) -> np.ndarray:
    return np.tile(np.where(np.arange(width) < width // 2, 300, 310), (height, 1))


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def in_three_steps(pipe: TADSRPipeline) -> torch.Tensor:
    device, dtype = pipe.unet.device, pipe.unet.dtype
    timesteps, prompt = torch.tensor([300], device=device), pipe.encode_prompt(["a cat"])
    with torch.no_grad():
        latents = pipe.encode_latents((floats(1, 3, 64, 64) * 2 - 1).to(device, dtype), timesteps)
        return pipe.decode_latents(pipe.predict_x0(latents, timesteps, prompt)) / 2 + 0.5


def restored(pipe: TADSRPipeline) -> torch.Tensor:
    device, dtype = pipe.unet.device, pipe.unet.dtype
    lq = (floats(2, 3, 64, 40) * 2 - 1).to(device, dtype)
    timesteps = torch.tensor([500, 100], device=device)
    return pipe.restore(lq, timesteps, pipe.encode_prompt(["", "a cat"])) / 2 + 0.5


def calls() -> dict[str, Call]:
    def call(*args: object, **options: object) -> Call:
        return lambda pipe: pipe(*args, **{"process_size": 0, **options})

    one, two = picture(), [picture(), picture(14, 18, "L").convert("RGB")]
    return {
        "one": call(one),
        "odd": call(picture(13, 19)),
        "scale 3": call(picture(11, 15), scale=3),
        "scale 1": call(picture(40, 50), scale=1),
        "one pixel": call(picture(1, 1)),
        "enlarged": call(picture(6, 8), process_size=48),
        "list": call([*two, picture(12, 12)]),
        "batch": call(floats(2, 3, 12, 16), timestep=[10, 900]),
        "two timesteps": call(two, timestep=[500, 600]),
        "two prompts": call(two, prompt=["", "a cat"]),
        "map": call(one, timestep=two_sides()),
        "map of a list": call(two, timestep=[two_sides(), 300]),
        "sweep": lambda pipe: pipe.sweep(one, [1, 400, 900], process_size=0),
        "alpha": call(picture(mode="RGBA")),
        "grey": call(picture(mode="L")),
        "16 bit": call(np.asarray(picture()).astype(np.uint16) * 257),
        "float": call(floats(3, 12, 16)),
        "generator": lambda pipe: call(one, generator=torch.Generator().manual_seed(3))(pipe),
        "wavelet": call(one, color_fix="wavelet"),
        "no colour fix": call(one, color_fix="none"),
        "never in pieces": call(one, tiling=None),
        "bands": call(one, tiling=SMALL_BANDS),
        "bands, spilled": call(one, tiling=SPILLING),
        "bands, windows": call(picture(33, 8), tiling=WINDOWS),
        "bands, two": call(two, tiling=SMALL_BANDS, timestep=[500, 600]),
        "bands, map": call(one, tiling=SMALL_BANDS, timestep=two_sides()),
        "bands, wavelet": call(one, tiling=SMALL_BANDS, color_fix="wavelet"),
        "bands, generator": lambda pipe: call(
            one, tiling=SMALL_BANDS, generator=torch.Generator().manual_seed(3)
        )(pipe),
        "tensors": restored,
        "three steps": in_three_steps,
    }


CALLS = calls()


def levels(result: object) -> list[np.ndarray]:
    """Return pictures as 0..255, float."""
    if isinstance(result, list | tuple):
        return [values for one in result for values in levels(one)]
    if isinstance(result, torch.Tensor):
        return [result.cpu().float().numpy() * 255]
    values = np.asarray(result)
    return [values / (257 if values.dtype == np.uint16 else 1)]


@pytest.fixture(scope="session")
def wanted(small) -> Callable[[str], list[np.ndarray]]:
    """Compute a call by plain modules on the CPU, once."""
    pipe, known = small(), {}
    pipe.set_engine("eager")

    def compute(name: str) -> list[np.ndarray]:
        if name not in known:
            known[name] = levels(CALLS[name](pipe))
        return known[name]

    return compute


@pytest.fixture(scope="module")
def pipes() -> dict:
    return {}


@pytest.fixture
def run(pretend, small, pipes, wanted):
    """Make a call on a machine, and check its pictures; return what it cost."""

    def make(
        machine: Machine,
        dtype: torch.dtype,
        name: str,
        mean_levels: float,
        first: str | None = None,
    ) -> PretendDevice:
        with pretend(machine) as device:
            pipe = pipes.get((machine, dtype))
            if pipe is None:
                pipe = pipes[machine, dtype] = small().to(machine.kind, dtype)
                if first is not None:
                    CALLS[first](pipe)
            device.forget()
            found = levels(CALLS[name](pipe))
        for one, other in zip(found, wanted(name), strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).mean() < mean_levels
        return device

    return make


SLOW_CALLS = (
    *("bands, spilled", "bands, map", "bands, wavelet", "bands, generator", "map of a list"),
    *("scale 3", "float", "two timesteps"),
)
"""Bands and lists with what is shown of each alone as well, and what other calls show beside more:
"odd" and "scale 1" another size, "batch" floats at two timesteps."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_CALLS)) for n in CALLS]
)
def test_a_modern_gpu_in_half_precision(name, run):
    # Noise is drawn in the type of the latents, and is another in half precision.
    dtype = torch.float32 if "generator" in name else torch.float16
    # A first image brings the weights into the layout that no activation then changes.
    device = run(Machine(), dtype, name, 4, first="one")
    if name in ("one", "list", "two prompts", "grey"):
        assert device.hidden_copies == []


def test_results_do_not_keep_pinned_memory(pretend, small):
    array = np.asarray(picture())
    with pretend() as device:
        pipe = small().to("cuda", torch.float16)
        for image in (array, [array, array], picture()):
            device.pinned.clear()
            result = pipe(image, process_size=0)
            assert device.pinned
            assert [s for s in device.pinned.values() if not s.expired()] == [], type(result)


OTHERS = {
    "modern, float32": (Machine(), torch.float32, 0.1),
    "modern, bfloat16": (Machine(), torch.bfloat16, 8),
    "Turing": (Machine(capability=(7, 5), processors=40), torch.float16, 4),
    "Pascal": (Machine(capability=(6, 1), processors=28), torch.float16, 4),
    "ROCm": (Machine(hip="6.2", processors=304), torch.float16, 4),
    "without Triton": (Machine(has_triton=False), torch.float16, 4),
    "MPS": (Machine(kind="mps", has_triton=False), torch.float16, 4),
}


IN_BANDS = ("without Triton", "MPS")
"""Kinds whose bands are not left to the slow run: the others take the ways of one of these."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(
            *(kind, name),
            marks=[pytest.mark.slow]
            * (name in ("map", "wavelet") or (name == "bands, two" and kind not in IN_BANDS)),
        )
        for kind in OTHERS
        for name in ("two prompts", "bands, two", "map", "wavelet")
    ],
)
def test_other_devices_and_types(kind, name, run):
    run(*OTHERS[kind][:2], name, OTHERS[kind][2])


def test_apples_gpus_need_no_float64_and_no_antialiased_bicubic(pretend):
    image = floats(1, 3, 9, 7)
    expected = resize_bicubic(image, (20, 5))
    with pretend(OTHERS["MPS"][0]):
        x = image.to("mps")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(NotImplementedError, match="bicubic"):
            F.interpolate(x, (20, 5), mode="bicubic", antialias=True)
        rows = [resize_bicubic_rows(x, (20, 5), *part) for part in ((0, 7), (7, 20))]
        for found in (resize_bicubic(x, (20, 5)), torch.cat(rows, dim=2)):
            assert found.device.type == "mps"
            torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_compiled_networks_record_no_graphs_which_other_threads_could_not_replay(
    pretend, small, monkeypatch
):
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraphs", True)  # as by its environment
    with pretend(), torch.no_grad():
        pipe = small().to("cuda", torch.float16)
        pipe.set_engine("compile")
        stages = pipe.engine.stages
        for network in (stages._encoder, stages._unet, stages._decoder):
            assert network.dynamo_ctx.compiler_config["max_autotune"]
            assert not network.dynamo_ctx.compiler_config["triton.cudagraphs"]


def test_the_second_gpu_is_as_good_as_the_first(pretend, small, wanted):
    with pretend() as device:
        found = levels(CALLS["one"](small().to("cuda:1", torch.float16)))
        assert device.current == 0
    assert np.abs(found[0] - wanted("one")[0]).mean() < 4


FAILURES = (
    RuntimeError("Failed to find C compiler."),
    subprocess.CalledProcessError(1, ["gcc"]),
    AssertionError("libcuda.so cannot found!"),
)


@pytest.mark.parametrize(
    ("engine", "failure"),
    crossed(
        [("auto", FAILURES[0]), ("auto", FAILURES[2]), ("eager", FAILURES[1])],
        ("auto", "eager"),
        FAILURES,
    ),
    ids=str,
)
def test_a_broken_triton_costs_one_warning(failure, engine, pretend, small, wanted):
    with pretend(Machine(triton_failure=failure)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TADSRWarning)
        pipe = small().to("cuda", torch.float16)
        pipe.set_engine(engine)
        for name in ("one", "wavelet"):
            found = levels(CALLS[name](pipe))
            assert np.abs(found[0] - wanted(name)[0]).mean() < 4
    messages = [str(w.message) for w in caught if issubclass(w.category, TADSRWarning)]
    assert len(messages) == 1
    assert type(failure).__name__ in messages[0]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("model", "one"), ("sequential", "bands")),
        pytest.param("model", "bands", marks=pytest.mark.slow),
        pytest.param("sequential", "one", marks=pytest.mark.slow),
        *(pytest.param(w, "list", marks=pytest.mark.slow) for w in ("model", "sequential")),
    ],
)
def test_offloaded_weights_come_to_the_device(way, name, pretend, small, wanted):
    with pretend():
        pipe = small()
        getattr(pipe, f"enable_{way}_cpu_offload")(device="cuda")
        for _ in range(2):
            found = levels(CALLS[name](pipe))
            for one, other in zip(found, wanted(name), strict=True):
                assert np.abs(one - other).mean() < 0.5
