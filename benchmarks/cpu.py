"""Ways to run the networks on a CPU, side by side: ours, plain torch, ONNX Runtime, OpenVINO.

    python benchmarks/cpu.py --rounds 4 --out benchmarks/results/cpu.json
    python benchmarks/cpu.py --ways fused realesrgan --realesrgan realesrgan_x4plus.safetensors

Each way runs in a process of its own and takes the one step on the same image: encoder, step and
decoder, without reading, colour fix and writing. `onnxruntime` and `openvino` are wanted for their
ways only. The CPU's seconds count all threads, so that they stand also where others use the cores.
`bf16` is the fused engine with products in bfloat16, and `auto` what users get by default;
`bf16` is left out where the processor has no instructions for it. `openvino` is at its own default.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe_machine
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tadsr import TADSRPipeline
from tadsr.cli import SPINS
from tadsr.onestep import EnginePlan
from tadsr.onestep.products import cpu_instructions

WAYS = (
    "eager",
    "fused",
    "bf16",
    "auto",
    "compile",
    "onnxruntime",
    "openvino",
    "openvino-f32",
    "realesrgan",
    "realesrgan-bf16",
)
SIZES = ((512, 512), (1024, 1536))
TIMESTEP = 500
MULTIPLY_SIDE, MULTIPLY_CHANNELS = 128, 256
Run = Callable[[], np.ndarray]


def make_lq(height: int, width: int) -> Tensor:
    """Return smooth colours with noise, (1, 3, H, W), in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 64, width // 64, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", antialias=True)
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 1) * 2 - 1


def open_way(way: str, model: str, folder: Path, lq: Tensor, realesrgan: Path | None) -> Run:
    """Return what takes the step on an image."""
    if way.startswith("realesrgan"):
        dtype = torch.bfloat16 if way.endswith("bf16") else torch.float32
        return _realesrgan(realesrgan, lq, dtype)
    if way in ("onnxruntime", "openvino", "openvino-f32"):
        return _graphs(way, folder, lq)
    # As for users: "auto" may multiply in bfloat16, and takes what it finds the fastest.
    dtype = "auto" if way == "auto" else torch.float32
    pipe = TADSRPipeline.from_pretrained(model, torch_dtype=dtype)
    engine = EnginePlan(multiplied=torch.bfloat16) if way == "bf16" else way
    pipe.set_engine(engine)
    embeds = pipe.encode_prompt([""])
    return lambda: pipe.restore(lq, [TIMESTEP], embeds).numpy()


def _graphs(way: str, folder: Path, lq: Tensor) -> Run:
    stages = {name: _graph(way, folder / f"{name}.onnx") for name in ("encoder", "unet", "decoder")}
    image, prompt = lq.numpy(), np.load(folder / "empty_prompt.npy")
    timestep = np.array([TIMESTEP], np.int64)

    def run() -> np.ndarray:
        latents = stages["encoder"]({"lq": image, "timestep": timestep})
        inputs = {"latents": latents, "timestep": timestep, "prompt_embeds": prompt}
        return stages["decoder"]({"latents": stages["unet"](inputs)})

    return run


def _graph(way: str, path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    if way == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]
    import openvino

    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if way == "openvino-f32":
        config["INFERENCE_PRECISION_HINT"] = "f32"
    model = openvino.Core().compile_model(str(path), "CPU", config)
    return lambda inputs: model(inputs)[0]


def _realesrgan(path: Path, lq: Tensor, dtype: torch.dtype) -> Run:
    from safetensors.torch import load_file

    weights = {
        name: value.to(dtype).contiguous(memory_format=torch.channels_last)
        if value.ndim == 4
        else value.to(dtype)
        for name, value in load_file(path).items()
    }
    small = F.interpolate(lq / 2 + 0.5, scale_factor=0.25, mode="area")
    small = small.to(dtype).contiguous(memory_format=torch.channels_last)

    def conv(name: str, x: Tensor, slope: float = 1.0) -> Tensor:
        out = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
        return out if slope == 1 else F.leaky_relu(out, slope)

    def dense(name: str, x: Tensor) -> Tensor:
        parts = [x]
        for number in range(1, 5):
            parts.append(conv(f"{name}.conv{number}", torch.cat(parts, 1), 0.2))
        return x + 0.2 * conv(f"{name}.conv5", torch.cat(parts, 1))

    @torch.no_grad()
    def run() -> np.ndarray:
        first = x = conv("conv_first", small)
        for block in range(23):
            inside = x
            for number in range(1, 4):
                inside = dense(f"body.{block}.rdb{number}", inside)
            x = x + 0.2 * inside
        x = first + conv("conv_body", x)
        for name in ("conv_up1", "conv_up2"):
            x = conv(name, F.interpolate(x, scale_factor=2, mode="nearest"), 0.2)
        return conv("conv_last", conv("conv_hr", x, 0.2)).float().numpy()

    return run


def multiply_rate() -> float:
    """Return the fastest GFLOP a CPU second that a convolution of torch was seen to reach."""
    x = torch.ones(1, MULTIPLY_CHANNELS, MULTIPLY_SIDE, MULTIPLY_SIDE)
    weight = torch.ones(MULTIPLY_CHANNELS, MULTIPLY_CHANNELS, 3, 3)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    seconds = []
    for _ in range(4):
        begin = time.process_time()
        F.conv2d(x, weight, padding=1)
        seconds.append(time.process_time() - begin)
    return 2 * 9 * MULTIPLY_CHANNELS**2 * MULTIPLY_SIDE**2 / min(seconds) / 1e9


def work(options: argparse.Namespace) -> None:
    """Measure one way in this process and print it as JSON."""
    rows = []
    for height, width in options.sizes:
        lq = make_lq(height, width)
        run = open_way(options.way, options.model, options.folder, lq, options.realesrgan)
        begin = time.process_time()
        result = run()
        row: dict[str, Any] = {"size": [width, height], "first_cpu_s": time.process_time() - begin}
        cpu, clock = [], []
        for _ in range(options.repeats):
            before = time.process_time(), time.perf_counter()
            result = run()
            cpu.append(time.process_time() - before[0])
            clock.append(time.perf_counter() - before[1])
        row |= {"cpu_s": min(cpu), "clock_s": statistics.median(clock)}
        truth = options.truths / f"eager_{height}.npy"
        if options.way == "eager":
            np.save(truth, result)
        elif truth.exists() and not options.way.startswith("realesrgan"):
            mse = float(np.mean((result.clip(-1, 1) - np.load(truth)) ** 2))
            row["psnr_db"] = 10 * math.log10(4 / max(mse, 1e-20))
        rows.append(row)
    print(json.dumps(rows))


def _best(rounds: list[Any]) -> Any:
    """Return each size's row with the least of all rounds' times, or why a round has none."""
    for rows in rounds:
        if isinstance(rows, str):
            return rows
    times = ("first_cpu_s", "cpu_s", "clock_s")
    return [
        {**row[0], **{name: min(each[name] for each in row) for name in times}}
        for row in zip(*rounds, strict=True)
    ]


def main() -> None:
    """Run the ways in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    default = [way for way in WAYS if way != "compile" and not way.startswith("realesrgan")]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=default)
    parser.add_argument("--realesrgan", type=Path, help="weights of RealESRGAN_x4plus")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="heights in px")
    parser.add_argument(
        "--model", default="tadsr-tiny", help="or a folder, as of benchmarks/full_size.py"
    )
    parser.add_argument("--graphs", type=Path, help="what `tadsr export onnx` made of the model")
    parser.add_argument("--repeats", type=int, default=3, help="of each way in a round")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of all ways in turns; the best of a way counts"
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--truths", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = [size for size in SIZES if size[0] in options.sizes]
    if options.way:
        work(options)
        return
    report: dict[str, Any] = {"machine": describe_machine(), "threads": torch.get_num_threads()}
    report["model"] = options.model
    report["load"] = round(os.getloadavg()[0], 1)
    report["rounds"] = options.rounds
    report |= {"gflop_per_cpu_s": multiply_rate(), "ways": {}}
    heights = [str(height) for height, _ in options.sizes]
    with tempfile.TemporaryDirectory() as name:
        folder = options.graphs or Path(name, "graphs")
        if options.graphs is None and {"onnxruntime", "openvino", "openvino-f32"} & {*options.ways}:
            from tadsr.onnx_export import export_onnx

            export_onnx(TADSRPipeline.from_pretrained(options.model), folder)
        rounds: dict[str, list[Any]] = {}
        for number, way in product(range(options.rounds), sorted(options.ways, key=WAYS.index)):
            if way == "bf16" and not cpu_instructions():
                rounds[way] = ["left out: the processor has no instructions for bfloat16"]
                continue
            command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
            command += ["--truths", name, "--model", options.model]
            command += ["--sizes", *heights, "--repeats", str(options.repeats)]
            command += ["--realesrgan", str(options.realesrgan)] if options.realesrgan else []
            # As the command line sets them, for all ways alike: tensors in large pages, and threads
            # that do not wait awake.
            environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": SPINS}
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
            rows = json.loads(last) if done.returncode == 0 else f"failed: {last}"
            print(number, way, rows, flush=True)
            rounds.setdefault(way, []).append(rows)
        report["ways"] |= {way: _best(tried) for way, tried in rounds.items()}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
