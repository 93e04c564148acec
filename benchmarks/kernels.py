"""Are the fused kernels right, and are they faster than torch? Bandwidth against a plain copy.

python benchmarks/kernels.py --out benchmarks/results/kernels_DEVICE.json

At the shapes of Stable Diffusion 2.1's encoder, UNet and decoder for one image of 512 and 1024 px.
Each row is timed only if the kernel is as close to float32 as torch's own half precision is. Times
are medians over replays of a CUDA graph, which hides what launches cost the host, over inputs that
do not fit the GPU's cache. Without a GPU nothing is timed: the kernels are interpreted at small
sizes for parity.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor

from tadsr.kernels import (
    adain_color_fix_uint8,
    add_with_statistics,
    geglu,
    group_norm_silu,
    to_uint8_nhwc,
    wavelet_color_fix_uint8,
)

NUM_GROUPS = 32
EPS = 1e-6
CALLS_PER_REPLAY = 20
REPLAYS = 15
COLD_BYTES = 256 * 2**20
"""Inputs that calls take in turn, together; beyond any GPU's cache."""
MAX_INPUT_SETS = 64
SHRUNK_SIDE_PX = 8
"""Side of what is interpreted."""

# Channels and side of the activations for an image of 512 px.
ENCODER_DECODER = [(128, 512), (128, 256), (256, 512), (256, 256), (256, 128)]
ENCODER_DECODER += [(512, 256), (512, 128), (512, 64)]
UNET = [(320, 64), (640, 64), (960, 64), (320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32)]
UNET += [(640, 16), (1280, 16), (1920, 16), (2560, 16), (1280, 8), (2560, 8)]
RESIDUALS = [(128, 512), (256, 256), (512, 128), (512, 64), (320, 64), (640, 32), (1280, 16)]
FEED_FORWARD = [(1280, 64), (2560, 32), (5120, 16)]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Args:
        name: Operation and shape.
        make: Draws the arguments on a device, in a dtype.
        call: The public function; takes the arguments and `backend`.
        passes: Reads and writes of memory that cannot be avoided, in units of the first argument.
        is_bytes: Whether the result is bytes, which may differ by one.
        other_way: GroupNorm's way for groups of another size, checked and timed beside.
    """

    name: str
    make: Callable[[str, torch.dtype], tuple[Tensor, ...]]
    call: Callable[..., Any]
    passes: float
    is_bytes: bool = False
    other_way: Callable[..., Any] | None = field(default=None, compare=False)


def activations(channels: int, side: int) -> Callable[[str, torch.dtype], tuple[Tensor, ...]]:
    """Return what draws x, a second x and two values per channel."""

    def make(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shape = (1, channels, side, side)
        pair = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        pair = (x.contiguous(memory_format=torch.channels_last) for x in pair)
        return *pair, *torch.randn(2, channels, device=device, dtype=dtype)

    return make


def normalize(x: Tensor, _: Tensor, weight, bias, *, backend=None) -> Tensor:
    """Call GroupNorm + SiLU."""
    return group_norm_silu(x, NUM_GROUPS, weight, bias, EPS, backend=backend)


def normalize_other_way(x: Tensor, _: Tensor, weight, bias) -> Tensor:
    """Take the way for large groups for a small one, and the other way round."""
    from tadsr.kernels.gpu import group_norm
    from tadsr.kernels.gpu.launch import next_power_of_2, run_launches

    group_size = next_power_of_2(x.shape[1] // NUM_GROUPS)
    elements = next_power_of_2(x.shape[2] * x.shape[3]) * group_size
    is_small = elements <= group_norm.WHOLE_GROUP_ELEMENTS
    result, launches = group_norm.plan_group_norm_silu(
        x, NUM_GROUPS, weight, bias, EPS, True, None, None,
        whole_group_elements=0 if is_small else elements,
    )  # fmt: skip
    run_launches(launches, x.device)
    return result


def add(x: Tensor, residual: Tensor, bias: Tensor, *_: Tensor, backend=None) -> Tensor:
    """Call the residual add with statistics."""
    return add_with_statistics(
        x, residual, channel_bias=bias, num_groups=NUM_GROUPS, backend=backend
    )[0]


def hidden(rows: int, width: int) -> Callable[[str, torch.dtype], tuple[Tensor, ...]]:
    """Return what draws a feed-forward layer's hidden values."""
    return lambda device, dtype: (torch.randn(rows, 2 * width, device=device, dtype=dtype),)


def pictures(side: int) -> Callable[[str, torch.dtype], tuple[Tensor, ...]]:
    """Return what draws a decoder's result and its reference."""

    def make(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        image, reference = 2 * torch.rand(2, 1, 3, side, side, device=device) - 1
        return image.to(dtype, memory_format=torch.channels_last), reference

    return make


def to_bytes(image: Tensor, _: Tensor, *, backend=None) -> Tensor:
    """Call the decoder's tail."""
    return to_uint8_nhwc(image, backend=backend)


def make_cases(image_px: int, *, is_shrunk: bool) -> list[Case]:
    """Return all cases of an image's size, or the same operations at small sizes.

    They take turns by operation, so that one that is broken off has measured some of each.
    """
    factor = image_px // 512

    def side_of(side: int) -> int:
        return SHRUNK_SIDE_PX if is_shrunk else factor * side

    norms, adds, gates, ends = [], [], [], []
    for channels, side in ENCODER_DECODER + UNET:
        px = side_of(side)
        # GroupNorm reads twice unless a group stays in registers.
        elements = px * px * (1 << (channels // NUM_GROUPS - 1).bit_length())
        is_small = elements <= 2**14
        # Programs of more than 2^15 elements would not fit their registers.
        other = normalize_other_way if elements <= 2**15 else None
        name = f"group_norm_silu {channels} × {px}²"
        passes = 2 if is_small else 3
        norms.append(Case(name, activations(channels, px), normalize, passes, other_way=other))
    for channels, side in RESIDUALS:
        px = side_of(side)
        name = f"add_with_statistics {channels} × {px}²"
        adds.append(Case(name, activations(channels, px), add, 3))
    for width, side in FEED_FORWARD:
        px = side_of(side)
        gates.append(Case(f"geglu {px * px} × {width}", hidden(px * px, width), geglu, 1.5))
    px = side_of(512)
    # The image is 2 bytes a value, its result 1, the reference 4: in units of the image.
    for name, call, passes in (
        ("to_uint8_nhwc", to_bytes, 1.5),
        ("adain_color_fix_uint8", adain_color_fix_uint8, 4.5),
        ("wavelet_color_fix_uint8", wavelet_color_fix_uint8, 4.5),
    ):
        ends.append(Case(f"{name} {px}²", pictures(px), call, passes, is_bytes=True))
    turns = itertools.zip_longest(norms, adds, gates, ends)
    return [case for turn in turns for case in turn if case is not None]


def find_parity_error(case: Case, device: str, dtype: torch.dtype) -> str | None:
    """Return how a kernel misses the reference, or None if it is as good as torch."""
    arguments = case.make(device, dtype)
    result = case.call(*arguments, backend="triton")
    expected = case.call(*arguments, backend="reference")
    if case.is_bytes:
        difference = (result.int() - expected.int()).abs()
        share = (difference > 0).float().mean().item()
        is_right = difference.max().item() <= 1 and share <= 0.01
        return None if is_right else f"{difference.max().item()} levels apart"
    truth = case.call(*(a.float().contiguous() for a in arguments), backend="reference")
    error = (result.float() - truth).abs().max().item()
    allowed = 2 * (expected.float() - truth).abs().max().item() + 1e-3
    if case.other_way is not None:
        error = max(error, (case.other_way(*arguments).float() - truth).abs().max().item())
    # A comparison with NaN is false.
    return None if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"


def time_us(call: Callable[..., Any], input_sets: Sequence[tuple[Tensor, ...]]) -> float:
    """Return the median time of a call in a CUDA graph, in µs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*input_sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(CALLS_PER_REPLAY, len(input_sets))
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(*input_sets[i % len(input_sets)])
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / calls)
    return statistics.median(times[3:])


def make_input_sets(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Draw inputs until they exceed the cache."""
    first = case.make("cuda", dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    count = min(MAX_INPUT_SETS, max(2, -(-COLD_BYTES // size)))
    return [first, *(case.make("cuda", dtype) for _ in range(count - 1))]


def measure(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Time a kernel, torch's operations in their better layout, and a copy."""
    input_sets = make_input_sets(case, dtype)
    planar = [tuple(a.contiguous() for a in arguments) for arguments in input_sets]
    kernel = time_us(lambda *a: case.call(*a, backend="triton"), input_sets)
    eager = min(
        time_us(lambda *a: case.call(*a, backend="reference"), sets)
        for sets in (input_sets, planar)
    )
    first = input_sets[0][0]
    moved = int(case.passes * first.numel() * first.element_size())
    blocks = [
        tuple(torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda"))
        for _ in range(len(input_sets))
    ]
    copy = time_us(lambda source, target: target.copy_(source), blocks)
    result = {
        "kernel_us": kernel,
        "torch_us": eager,
        "copy_us": copy,
        "kernel_gb_per_s": moved / kernel / 1000,
        "copy_gb_per_s": moved / copy / 1000,
        "times_torch": eager / kernel,
    }
    if case.other_way is not None:
        result["other_way_us"] = time_us(case.other_way, input_sets)
    return result


def main() -> int:
    """Run all cases; the exit code is 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--image-px", type=int, nargs="+", choices=[512, 1024], default=[512, 1024])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    has_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there is nothing to check and nothing to time.")
        return 0
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
        print("No GPU: there is nothing to time. The kernels are interpreted, for parity.")
    torch.manual_seed(0)
    rows, num_wrong = [], 0
    for image_px in options.image_px if has_gpu else [512]:
        for case in {c.name: c for c in make_cases(image_px, is_shrunk=not has_gpu)}.values():
            error = find_parity_error(case, "cuda" if has_gpu else "cpu", dtype)
            row: dict[str, Any] = {"image_px": image_px, "name": case.name, "parity": error or "ok"}
            num_wrong += error is not None
            if has_gpu and error is None:
                row |= measure(case, dtype)
                torch.cuda.empty_cache()
            rows.append(row)
            print(describe(row), flush=True)
            if options.out is not None:  # what there is counts if this is broken off
                report = {"machine": describe_machine(), "dtype": options.dtype, "rows": rows}
                options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    slow = [row["name"] for row in rows if row.get("times_torch", 2) <= 1]
    if slow:
        print("Slower than torch here:", "; ".join(slow))
    return int(num_wrong > 0)


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    line = f"{row['name']:36} parity {row['parity']}"
    if "kernel_us" not in row:
        return line
    line += (
        f"  {row['kernel_us']:8.1f} µs, {row['kernel_gb_per_s']:6.0f} GB/s"
        f" (copy {row['copy_gb_per_s']:6.0f}), torch {row['torch_us']:8.1f} µs"
        f" = {row['times_torch']:.2f} ×"
    )
    return line + (f", other way {row['other_way_us']:.1f} µs" if "other_way_us" in row else "")


if __name__ == "__main__":
    sys.exit(main())
