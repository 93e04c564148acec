"""Load the model that the command line named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from tadsr.cli.reporting import as_usage_errors, format_bytes
from tadsr.config import torch_dtype
from tadsr.onestep.memory import used_bytes
from tadsr.onestep.plan import EngineName
from tadsr.onestep.support import unknown_blocks, wrapped_modules
from tadsr.prompts import PromptStyle
from tadsr.quick import open_quickly
from tadsr.restorer import Restorer

DtypeName = Literal["auto", "fp32", "fp16", "bf16"]


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the type of weights by its name; "auto" is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return torch_dtype(name)


def load_on(
    source: str,
    adapter: str | None,
    dtype: DtypeName,
    prompt: str | None,
    timestep: int | None,
    device: str | torch.device,
    tagger: str | None = None,
    prompt_style: PromptStyle = "published",
    engine: EngineName = "auto",
    loras: Sequence[tuple[str, float]] = (),
) -> Restorer:
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
        loras=loras,
    )


def load_model(
    source: str,
    *,
    adapter: str | None,
    device: torch.device,
    dtype: DtypeName,
    prompt: str | None,
    timestep: int | None,
    tagger: str | None = None,
    prompt_style: PromptStyle = "published",
    engine: EngineName = "auto",
    loras: Sequence[tuple[str, float]] = (),
) -> Restorer:
    """Load a pipeline onto a device and check that it takes the prompt and the timestep."""
    chosen = choose_dtype(dtype, device)
    pipe: Restorer | None = None
    if device.type == "cpu" and not (adapter or tagger or loras):
        pipe = open_quickly(source, chosen, engine)
    if pipe is None:
        from tadsr.pipeline import TADSRPipeline  # takes seconds, with diffusers

        pipe = TADSRPipeline.from_pretrained(
            source, adapter=adapter, torch_dtype=chosen, tagger=tagger, engine=engine
        )
        for source_of_lora, strength in loras:
            pipe.merge_lora(source_of_lora, scale=strength)
        pipe.to(device)
    pipe.prompt_style = prompt_style
    with as_usage_errors():
        pipe.encode_prompt([prompt or ""])
        pipe.check_timesteps(pipe.default_timestep if timestep is None else timestep, 1)
    return pipe


def describe(pipe: Restorer, *, reasons: bool = False) -> str:
    """Return where and how a pipeline runs, as a line, and as more of them why."""
    device, dtype = pipe.device, str(pipe.unet.dtype).removeprefix("torch.")
    with torch.no_grad():  # as in a call
        stages = pipe.engine.stages
    name = type(stages).__name__.removesuffix("Stages").lower()
    line = f"on {device}, {dtype}, engine {name}"
    if not reasons:
        return line
    missing = "" if torch.cuda.is_available() else "; no CUDA device is there"
    lines = [
        line,
        f"  device: {device}{missing}, {torch.get_num_threads()} threads of torch on the CPU",
        f"  precision: {dtype}; auto is float16 on CUDA and float32 elsewhere",
    ]
    against = unknown_blocks(pipe.vae, pipe.unet) + wrapped_modules(pipe.vae, pipe.unet)
    is_fused = name == "fused"
    plain = "the networks are Stable Diffusion's" if is_fused else "no other is faster here"
    why = "; ".join(against) or plain
    return "\n".join([*lines, f"  engine: asked for {pipe.engine.choice}; {why}"])


def memory_remark(pipe: Restorer, tiling: object) -> str | None:
    """Return that a limit of memory cannot be kept, since what is loaded takes more."""
    limit = getattr(tiling, "max_memory", None)
    used = used_bytes(pipe.device)
    if limit is None or used < limit:
        return None
    return (
        f"Warning: --max-memory {format_bytes(limit)} cannot be kept, since the program and the "
        f"model take {format_bytes(used)} by themselves; the rest is kept as small as it goes"
    )
