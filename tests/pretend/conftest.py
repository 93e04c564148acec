"""A GPU that is not there, for everything that the package does on one."""

import copy
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tadsr import TADSRPipeline
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tests.small_models import OUTER_ATTENTION, pipeline_of, small_unet, small_vae

from .cuda import stand_in
from .tensors import Functions, PretendDevice, generators

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@dataclass(frozen=True)
class Machine:
    """What kind of device is pretended."""

    kind: str = "cuda"
    capability: tuple[int, int] = (9, 0)
    processors: int = 132
    hip: str | None = None
    has_triton: bool = True
    triton_failure: Exception | None = None
    has_values: bool = True
    total_bytes: int = 80 * 2**30


@pytest.fixture(scope="session")
def guard(tmp_path_factory) -> None:
    """Let this process make tensors on devices that its torch knows nothing of."""
    if COMPILER is None:
        pytest.skip("a device guard must be compiled, and there is no C++ compiler")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU of its own: pytest -m gpu")
    home = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    source = Path(__file__).with_name("guard.cpp")
    command = [COMPILER, "-shared", "-fPIC", "-std=c++20", "-O0", source, "-o", library]
    command += [f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the device guard does not compile: {done.stderr[-500:]}")
    ctypes.CDLL(str(library))


@pytest.fixture
def pretend(guard) -> Callable[..., object]:
    """Enter a context in which there is a device."""

    @contextmanager
    def enter(machine: Machine = Machine()) -> Iterator[PretendDevice]:
        device = PretendDevice(machine.kind, machine.has_values, machine.total_bytes)
        with pytest.MonkeyPatch.context() as patch:
            _forget_what_was_found()
            # Or a module would put the device's memory into a tensor of the CPU's class.
            patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
            patch.setattr(torch, "Generator", generators(machine.kind))
            if machine.kind == "cuda":
                for name, value in stand_in(device, machine.capability, machine.processors).items():
                    patch.setattr(torch.cuda, name, value)
                patch.setattr(torch.version, "hip", machine.hip)
                patch.setattr(torch.version, "cuda", None if machine.hip else "12.8")
            if not machine.has_triton:
                patch.setitem(sys.modules, "triton", None)
            elif machine.kind == "cuda":
                triton = pytest.importorskip("triton")
                from .launches import Triton

                launcher = Triton(device, machine.capability, machine.triton_failure)
                device.variants = launcher.variants
                device.run_operation = launcher.operation
                jit = triton.runtime.jit.JITFunction
                patch.setattr(jit, "run", lambda kernel, *a, **k: launcher.run(kernel, *a, **k))
            with device, Functions(device):
                yield device
            _forget_what_was_found()

    return enter


_searched: set[str] = set()
_clears: list[Callable[[], None]] = []


def _forget_what_was_found() -> None:
    """Clear what the package keeps about devices, wherever it keeps it."""
    for name in [name for name in sys.modules if name.startswith("tadsr.")]:
        if name not in _searched:
            _searched.add(name)
            for key, value in vars(sys.modules[name]).items():
                is_kept = key in ("_failures", "_verdicts")
                clear = value.clear if is_kept else getattr(value, "cache_clear", None)
                _clears.extend([clear] if clear is not None else [])
    for clear in _clears:
        clear()


@pytest.fixture(scope="session")
def small() -> Callable[[], TADSRPipeline]:
    """Build a model that has every kind of layer of the full one, and the fewest of each."""

    torch.manual_seed(0)
    unet, vae = small_unet((16, 32), **OUTER_ATTENTION), small_vae((16, 32))
    prompts = PromptEmbeddings(("", "a cat"), 5, 8)
    for network in (vae, unet, prompts):
        network.eval().requires_grad_(False)
        for values in network.parameters():
            values += 0.02 * torch.randn(values.shape)  # torch's biases hide mistakes
    built = pipeline_of(vae, unet, prompts)
    return lambda: copy.deepcopy(built)
