"""The model and the device that a command line names; torch is imported once both make sense."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tadsr.checkpoints.detect import check_source
from tadsr.cli.reporting import UsageError, as_usage_errors, format_bytes
from tadsr.config import EngineName, Precision, torch_dtype
from tadsr.lazily import lasting_imports

if TYPE_CHECKING:
    import torch

    from tadsr.prompts import PromptStyle
    from tadsr.restorer import Restorer

DtypeName = Literal["auto", Precision]
_DEVICE = re.compile(r"auto|cpu|mps|(cuda:)?\d+|cuda")


@dataclass(frozen=True)
class ModelRequest:
    """A model and how it is loaded."""

    source: str
    """As in `TADSRPipeline.from_pretrained`, and so are `adapter` and `tagger`."""
    adapter: str | None = None
    dtype: DtypeName = "auto"
    """Precision of the weights; "auto" is fp16 on CUDA and fp32 elsewhere, with products in bf16
    on a CPU that is faster so."""
    prompt: str | None = None
    """What the model must know; None is neutral."""
    timestep: int | None = None
    """The largest that the model must have; None for its own."""
    tagger: str | None = None
    prompt_style: PromptStyle = "published"
    """How a tagger's words and the prompt are joined."""
    engine: EngineName = "auto"
    """How the networks are run."""
    loras: tuple[tuple[str, float], ...] = ()
    """Files of further LoRAs and their strengths, merged into the weights."""
    is_for_many: bool = False
    """Whether so many images follow that an engine which is slow to load pays."""

    def check(self) -> None:
        """Raise CheckpointError unless the model can exist."""
        check_source(self.source, self.adapter)

    @property
    def name(self) -> str:
        """What the model is called: of a folder the name only, for where it lies may be private."""
        return Path(self.source).resolve().name if os.path.isdir(self.source) else self.source

    def load(self, device: str | torch.device) -> Restorer:
        """Load the model onto a device and check that it takes the prompt and the timestep."""
        import torch

        from tadsr.onestep.openvino import has_openvino

        device = torch.device(device)
        dtype = choose_dtype(self.dtype, device)
        mixes = self.dtype == "auto" and device.type == "cpu"
        pipe: Restorer | None = None
        is_slow_to_load = self.is_for_many and has_openvino()
        if device.type == "cpu" and not (
            self.adapter or self.tagger or self.loras or is_slow_to_load
        ):
            from tadsr.quick import open_quickly

            pipe = open_quickly(self.source, dtype, self.engine, mixes=mixes)
        if pipe is None:
            from tadsr.pipeline import TADSRPipeline  # takes seconds, with diffusers

            pipe = TADSRPipeline.from_pretrained(
                self.source,
                adapter=self.adapter,
                torch_dtype="auto" if mixes else dtype,
                tagger=self.tagger,
                engine=self.engine,
            )
            for source, strength in self.loras:
                pipe.merge_lora(source, scale=strength)
            pipe.to(device)
        pipe.prompt_style = self.prompt_style
        with as_usage_errors():
            pipe.encode_prompt([self.prompt or ""])
            pipe.check_timesteps(
                pipe.default_timestep if self.timestep is None else self.timestep, 1
            )
        return pipe


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the type of weights by its name; "auto" is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return torch_dtype(name)


def check_device_name(name: str) -> str:
    """Return a device's name, whether or not this machine has it."""
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return name


def split_devices(names: str) -> list[str]:
    """Turn "0,1" or "cuda:0,cpu" into names of devices, whether or not this machine has them."""
    parts = [part.strip() for part in names.split(",")]
    if not all(parts):
        raise UsageError(f"--devices must be names with commas between, such as 0,1, got {names!r}")
    return list(map(check_device_name, parts))


def choose_device(name: str) -> torch.device:
    """Return the device of a name, which must exist on this machine."""
    name = f"cuda:{name}" if name.isdecimal() else name
    if name.startswith("cuda") and "torch" not in sys.modules:
        _check_build(name)
    with lasting_imports():
        import torch
    if name == "auto":
        # Not mps, which has not been tested on a real machine.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    num_found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if (device.index or 0) >= num_found:
        raise _missing(name, f"found {num_found} of that kind")
    return device


def _missing(name: str, reason: str) -> UsageError:
    return UsageError(f"--device {name} must exist, but {reason}; use --device cpu or auto")


def _check_build(name: str) -> None:
    """Check that torch is built for CUDA, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py")
    known = runpy.run_path(str(file)) if file.exists() else {}
    if known and known.get("cuda") is known.get("hip") is None:
        raise _missing(name, f"torch {known['__version__']} is a build without it")


def describe(pipe: Restorer, *, reasons: bool = False) -> str:
    """Return where and how a pipeline runs, as a line, and as more of them why."""
    import torch

    from tadsr.onestep.choose import OPENVINO_PX
    from tadsr.onestep.products import choose_products
    from tadsr.onestep.support import unknown_blocks, wrapped_modules

    device, dtype = pipe.device, _name_of(pipe.unet.dtype)
    with torch.no_grad():  # as in a call
        stages = pipe.engine.stages
    name = type(stages).__name__.removesuffix("Stages").lower()
    multiplied = getattr(getattr(stages, "plan", None), "multiplied", None)
    inside = f" with products in {_name_of(multiplied)}" if multiplied else ""
    line = f"on {device}, {dtype}{inside}, engine {name}"
    if not reasons:
        return line
    missing = "" if torch.cuda.is_available() else "; no CUDA device is there"
    against = unknown_blocks(pipe.vae, pipe.unet) + wrapped_modules(pipe.vae, pipe.unet)
    plain = "the networks are Stable Diffusion's" if name == "fused" else "no other is faster here"
    with torch.no_grad():  # or the engine would prepare for gradients
        is_untimed = pipe.engine.is_openvino_untimed()
        is_fused = pipe.engine.is_fused((OPENVINO_PX, OPENVINO_PX))
    if is_untimed:
        plain += "; OpenVINO is timed beside it at the first picture of 512 px"
    elif name == "fused" and not is_fused:
        plain += "; pictures of 512 px and more by OpenVINO, which was faster"
    return "\n".join(
        [
            line,
            f"  device: {device}{missing}, {torch.get_num_threads()} threads of torch on the CPU",
            f"  precision: {dtype}{inside}; {choose_products(device, pipe.unet.dtype).reason}",
            f"  engine: asked for {pipe.engine.choice}; {'; '.join(against) or plain}",
        ]
    )


def memory_remark(pipe: Restorer, tiling: Any) -> str | None:
    """Return that a limit of memory cannot be kept, since what is loaded takes more."""
    from tadsr.onestep.tasks import used_bytes

    limit = getattr(tiling, "max_memory", None)
    if limit is None or (used := used_bytes(pipe.device)) < limit:
        return None
    return (
        f"Warning: --max-memory {format_bytes(limit)} cannot be kept, since the program and the "
        f"model take {format_bytes(used)} by themselves; the rest is kept as small as it goes"
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
