"""Choose device and dtype, and load the model that the command line named."""

from __future__ import annotations

from typing import Literal

import torch

from tadsr.cli.reporting import UsageError, as_usage_errors
from tadsr.config import torch_dtype
from tadsr.engine import EngineName
from tadsr.pipeline import TADSRPipeline
from tadsr.prompts import PromptStyle

DtypeName = Literal["auto", "fp32", "fp16", "bf16"]


def choose_device(name: str) -> torch.device:
    """Turn a device's name into one that is there.

    Args:
        name: "auto", or what torch calls a device: "cpu", "cuda", "cuda:1", "mps".

    Returns:
        The device; for "auto" CUDA if there is any, else the CPU.

    Raises:
        UsageError: It is no device, or this machine does not have it.
    """
    if name == "auto":
        # Not mps: torch has no antialiased bicubic resize there.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    num_found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if (device.index or 0) >= num_found:
        reason = f"found {num_found} of that kind"
        if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
            reason = f"torch {torch.__version__} is a build without it"
        raise UsageError(f"--device {name} must exist, but {reason}; use --device cpu or auto")
    return device


def parse_devices(names: str) -> list[str]:
    """Turn "0,1" or "cuda:0,cpu" into devices that are there.

    Args:
        names: Names for `choose_device`, or the numbers of CUDA devices, with commas between.

    Returns:
        What torch calls them, in that order.

    Raises:
        UsageError: One of them is no device, or not there.
    """
    parts = [part.strip() for part in names.split(",")]
    if not all(parts):
        raise UsageError(f"--devices must be names with commas between, such as 0,1, got {names!r}")
    named = [f"cuda:{part}" if part.isdecimal() else part for part in parts]
    return [str(choose_device(name)) for name in named]


def load_on(
    source: str,
    adapter: str | None,
    dtype: DtypeName,
    prompt: str | None,
    timestep: int,
    device: str | torch.device,
    tagger: str | None = None,
    prompt_style: PromptStyle = "published",
    engine: EngineName = "auto",
) -> TADSRPipeline:
    """Load a pipeline as `load_model` does, with the device last, for `functools.partial`."""
    return load_model(
        source,
        adapter=adapter,
        device=torch.device(device),
        dtype=dtype,
        prompt=prompt,
        timestep=timestep,
        tagger=tagger,
        prompt_style=prompt_style,
        engine=engine,
    )


def load_model(
    source: str,
    *,
    adapter: str | None,
    device: torch.device,
    dtype: DtypeName,
    prompt: str | None,
    timestep: int,
    tagger: str | None = None,
    prompt_style: PromptStyle = "published",
    engine: EngineName = "auto",
) -> TADSRPipeline:
    """Load a pipeline onto a device and check that it takes the prompt and the timestep.

    Args:
        source: As in `TADSRPipeline.from_pretrained`.
        adapter: As in `TADSRPipeline.from_pretrained`.
        device: Where to.
        dtype: Type of the weights; "auto" for float16 on CUDA and float32 elsewhere.
        prompt: Text for all images, or None.
        timestep: Timestep for all images.
        tagger: As in `TADSRPipeline.from_pretrained`.
        prompt_style: How a tagger's words and the prompt are joined.
        engine: As in `TADSRPipeline.set_engine`.

    Returns:
        The pipeline.

    Raises:
        UsageError: The model does not know the prompt or has fewer timesteps.
        CheckpointError: The checkpoint is missing, damaged, unsafe or does not fit.
    """
    if dtype == "auto":
        dtype = "fp16" if device.type == "cuda" else "fp32"
    pipe = TADSRPipeline.from_pretrained(
        source, adapter=adapter, torch_dtype=torch_dtype(dtype), tagger=tagger, engine=engine
    )
    pipe.prompt_style = prompt_style
    pipe.to(device)
    with as_usage_errors():
        pipe.encode_prompt([prompt or ""])
        pipe.check_timesteps(timestep, 1)
    return pipe
