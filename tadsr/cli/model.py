"""Load the model that the command line named."""

from __future__ import annotations

import torch

from tadsr.cli.model_request import DtypeName, ModelRequest
from tadsr.cli.reporting import as_usage_errors, format_bytes
from tadsr.config import torch_dtype
from tadsr.onestep.memory import used_bytes
from tadsr.onestep.products import choose_products
from tadsr.onestep.support import unknown_blocks, wrapped_modules
from tadsr.quick import open_quickly
from tadsr.restorer import Restorer


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the type of weights by its name; "auto" is float16 on CUDA and float32 elsewhere."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    return torch_dtype(name)


def load_model(request: ModelRequest, device: str | torch.device) -> Restorer:
    """Load a model onto a device and check that it takes the prompt and the timestep."""
    device = torch.device(device)
    dtype = choose_dtype(request.dtype, device)
    pipe: Restorer | None = None
    mixes = request.dtype == "auto" and device.type == "cpu"
    if device.type == "cpu" and not (request.adapter or request.tagger or request.loras):
        pipe = open_quickly(request.source, dtype, request.engine, mixes=mixes)
    if pipe is None:
        from tadsr.pipeline import TADSRPipeline  # takes seconds, with diffusers

        pipe = TADSRPipeline.from_pretrained(
            request.source,
            adapter=request.adapter,
            torch_dtype="auto" if mixes else dtype,
            tagger=request.tagger,
            engine=request.engine,
        )
        for source, strength in request.loras:
            pipe.merge_lora(source, scale=strength)
        pipe.to(device)
    pipe.prompt_style = request.prompt_style
    with as_usage_errors():
        pipe.encode_prompt([request.prompt or ""])
        timestep = pipe.default_timestep if request.timestep is None else request.timestep
        pipe.check_timesteps(timestep, 1)
    return pipe


def describe(pipe: Restorer, *, reasons: bool = False) -> str:
    """Return where and how a pipeline runs, as a line, and as more of them why."""
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
    lines = [
        line,
        f"  device: {device}{missing}, {torch.get_num_threads()} threads of torch on the CPU",
        f"  precision: {dtype}{inside}; {choose_products(device, pipe.unet.dtype).reason}",
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


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
