"""One process of `tadsr doctor`: does what it is told and prints each finding as a line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr import kernels
from tadsr.doctor.findings import Finding
from tadsr.kernels.backends import unsupported_reasons
from tadsr.onestep.products import choose_products
from tadsr.onestep.selfcheck import remember_fastest
from tadsr.pipeline import TADSRPipeline

CHECKED_PX = 32
TIMED_PX = 128
SECONDS_PER_WAY = 10
MIN_REPEATS, MAX_REPEATS = 3, 50
MAX_KERNEL_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative error of a kernel, by the type of its input."""
MAX_MEAN_LEVELS = {torch.float32: 0.5, torch.float16: 2.0, torch.bfloat16: 6.0}
"""Mean difference of a picture from that of plain modules in float32 on the CPU, of 255."""
MAX_ODD_BYTES = 0.02


def main(task: str, source: str, device: str, dtype: str, *names: str) -> None:
    """Check or time each of the kernels and engines, or remember an engine."""
    warnings.simplefilter("ignore")
    run = {"check": check, "time": time_engine, "remember": remember_engine}[task]
    for name in names:
        try:
            with torch.no_grad():
                found = run(name, source, torch.device(device), getattr(torch, dtype))
        except Exception as error:
            found = Finding(name, False, f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(asdict(found)), flush=True)  # noqa: T201 - read by the parent


def check(name: str, source: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Compare a kernel or an engine with its reference."""
    kind, _, one = name.partition(" ")
    if kind == "engine":
        return _check_engine(name, source, device, dtype)
    reasons = unsupported_reasons([torch.empty(1, dtype=dtype, device=device)])
    if reasons:
        return Finding(name, None, f"does not run: {'; '.join(reasons)}")
    run, inputs = getattr(kernels, one), kernel_inputs(one, device, dtype)
    results = [run(*inputs[0], **inputs[1], backend=way) for way in ("triton", "reference")]
    found, expected = (result if isinstance(result, tuple) else (result,) for result in results)
    error = max(_error(*pair) for pair in zip(found, expected, strict=True))
    limit = MAX_ODD_BYTES if "uint8" in one else MAX_KERNEL_ERROR[dtype]
    return Finding(name, error < limit, f"error {error:.1e}, {limit:.0e} is allowed")


def kernel_inputs(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of a kernel by its name: shapes of the full model, values of every size."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(device, dtype)
        is_map = drawn.ndim == 4
        return drawn.contiguous(memory_format=torch.channels_last) if is_map else drawn

    if name == "geglu":
        return (values(1024, 2560),), {}
    if name in ("to_uint8_nhwc", "adain_color_fix_uint8", "wavelet_color_fix_uint8"):
        images = values(1, 3, 200, 260) * 0.4, values(1, 3, 200, 260).contiguous() * 0.4
        return images[: 1 if name == "to_uint8_nhwc" else 2], {}
    x, per_channel = values(1, 320, 64, 64), values(320, dtype=torch.float32)
    if name == "add_with_statistics":
        return (x, values(1, 320, 64, 64)), {"channel_bias": per_channel, "num_groups": 32}
    return (x, 32, per_channel, values(320), 1e-5), {"channel_bias": per_channel}


def time_engine(name: str, source: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Return the median time of a 512 × 512 px picture, from image to image."""
    engine = name.partition(" ")[2]
    if engine == "compile" and device.type != "cuda":
        return Finding(name, None, "compiles for minutes on a CPU; not timed")
    is_mixed = (device.type, dtype) == ("cpu", torch.float32)
    if engine == "openvino" and not is_mixed:
        return Finding(name, None, "runs float32 weights on a CPU only; not timed")
    # With products in bfloat16 where they are faster, as for whom engine="auto" is chosen here.
    pipe = _pipeline(source, engine, device, "auto" if is_mixed else dtype)
    photo = _photo(TIMED_PX)
    for _ in range(25 if device.type == "cuda" else 1):  # compiles, measures, records
        pipe(photo)
    times: list[float] = []
    while len(times) < MIN_REPEATS or (sum(times) < SECONDS_PER_WAY and len(times) < MAX_REPEATS):
        begin = time.perf_counter()
        pipe(photo)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    detail = f"{1000 * seconds:.1f} ms a picture, median of {len(times)}"
    return Finding(name, True, detail, seconds)


def remember_engine(name: str, source: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Have `engine="auto"` take this engine from now on."""
    engine = name.partition(" ")[2]
    pipe = _pipeline(source, engine, device, dtype)
    multiplied = choose_products(device, dtype).multiplied
    remember_fastest(pipe.vae, pipe.unet, multiplied, engine)
    return Finding("fastest", True, f'{engine}, which engine="auto" takes from now on')


def _check_engine(name: str, source: str, device: torch.device, dtype: torch.dtype) -> Finding:
    photo = _photo(CHECKED_PX)

    def picture(engine: str, device: torch.device, dtype: torch.dtype) -> np.ndarray:
        pipe = _pipeline(source, engine, device, dtype)
        return np.asarray(pipe(photo, process_size=0)).astype(float)

    expected = picture("eager", torch.device("cpu"), torch.float32)
    difference = np.abs(picture(name.partition(" ")[2], device, dtype) - expected)
    limit = MAX_MEAN_LEVELS[dtype]
    detail = f"{difference.mean():.2f} of 255 levels from plain modules, {limit} are allowed"
    return Finding(name, bool(difference.mean() < limit), detail)


def _pipeline(
    source: str, engine: str, device: torch.device, dtype: torch.dtype | Literal["auto"]
) -> TADSRPipeline:
    return TADSRPipeline.from_pretrained(source, torch_dtype=dtype, engine=engine).to(device)


def _photo(side: int) -> Image.Image:
    ramps = np.linspace(0, 255, side)
    noise = np.random.default_rng(0).normal(0, 12, (side, side, 3))
    pixels = np.stack(np.broadcast_arrays(ramps, ramps[:, None], ramps[::-1]), -1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error; of bytes the share that differs, or 1 where some do by more."""
    difference = found.float() - expected.float()
    if found.dtype == torch.uint8:
        return 1.0 if difference.abs().max() > 1 else difference.abs().mean().item()
    return (difference.norm() / expected.float().norm()).item()


if __name__ == "__main__":
    main(*sys.argv[1:])
