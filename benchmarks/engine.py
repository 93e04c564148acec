"""How fast is one step, and is it right? The ways to run the full-size networks, side by side.

python benchmarks/engine.py --out benchmarks/results/engine_DEVICE.json

Weights are random, in the published shapes, as speed does not depend on their values, or those of a
`--model`. Each way runs in a process of its own, which ends at a deadline, so that the whole fits
`--budget-s`; what could not be measured is named, and the report is written anew after every way.
Nothing is timed whose result is not right: a way's picture is compared first
with that of the plain modules in float64, from which plain modules are some way off themselves,
and then in every case with that of the plain modules in its own type.
Ways:

eager      diffusers' modules with merged adapters
fused      tadsr's engine, what `pipe.to("cuda", torch.float16)` uses
published  adapters kept apart, a text encoder for every image, resizing and colours on the CPU
compile    torch.compile on diffusers' modules ("max-autotune" on CUDA)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from engine_ways import Way, make_photos
from machine import describe_machine

from tadsr.onestep import EnginePlan

WAYS = ("eager", "fused", "published", "compile")
"""In order of importance."""
KEPT_S = 20
"""Kept for every way that is still to come, in seconds, up to half of what is left."""
COMPILE_S = 120
"""Compiling gets nowhere in less."""
SHORT_S = 240
"""Of less time than this only the first cases are measured."""
SHORT_CASES = 3
CASES = (
    *((512, 1), (1024, 1), (512, 4), (2048, 1)),
    *((512, 16), (1024, 4), (1024, 16), (2048, 4), (2048, 16)),
)
"""Side in px and batch, in order of importance."""
MAX_PIXELS = 16 * 512 * 512
"""Largest output, batch × side², that is timed on a GPU."""
SECONDS_PER_CASE = 1.0
WARM_UPS = 3
"""Calls in which a GPU's kernels are compiled and its memory is taken."""
CALLS_BEFORE_GRAPHS = 10
"""Timed calls of a shape that is not recorded yet."""
FP32_ERROR = 1e-5
"""Relative error in float32 that is never too much; nor is that of plain modules."""
MIN_PSNR_DB = 50.0
"""Of half precision that is always enough; so is that of plain modules in half precision."""
MAX_PLAIN_ERROR = 1e-3
MIN_PLAIN_PSNR_DB = 30.0
"""Of plain modules in float32 and in half precision: beyond, something is broken."""
PSNR_SLACK_DB = {"fused": 0.5, "compile": 0.5, "published": 3.0}
"""How far a way may be below plain modules; adapters kept apart round more often."""
PICTURE_PSNR_DB, PICTURE_SLACK_DB = 45.0, 8.0
"""Of a case's picture against plain modules': always enough, and how far it may be below what plain
modules themselves reach against the truth, as both round."""


def compare(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the relative error and the PSNR of values in [-1, 1]."""
    relative = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
    mse = float(np.mean((found.clip(-1, 1) - truth.clip(-1, 1)) ** 2))
    return {"relative_error": relative, "psnr_db": float(10 * np.log10(4 / max(mse, 1e-20)))}


def wrong(error: dict[str, float], dtype: torch.dtype, limits: dict[str, float]) -> str | None:
    """Return why a result is not right, or None."""
    if dtype == torch.float32:
        is_right = error["relative_error"] <= limits["relative_error"]
    else:
        is_right = error["psnr_db"] >= limits["psnr_db"]
    # A comparison with NaN is false.
    return None if is_right else f"wrong: {error}, where {limits} is needed"


def work(options: argparse.Namespace) -> None:
    """Measure one way in this process once it is told to, and write after every case."""
    if not sys.stdin.readline():
        return  # whoever started this has ended
    # TensorFloat-32 is no truth.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    diffusers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    truth_file, report_file = options.folder / "truth.npy", options.folder / f"{options.way}.json"
    report: dict[str, Any] = {"way": options.way, "cases": []}

    def save() -> None:
        part = report_file.with_suffix(".part")
        part.write_text(json.dumps(report), encoding="utf-8")
        part.replace(report_file)

    photo = make_photos(1, CASES[0][0])[0]
    if options.way == "truth":
        way = Way("eager", options.device, torch.float64, options.model)
        np.save(truth_file, way.picture(photo))
        return
    way = Way(options.way, options.device, dtype, options.model)
    begin = time.perf_counter()
    picture = way.picture(photo)
    report["first_call_s"] = time.perf_counter() - begin
    truth = np.load(truth_file)
    report["error"] = compare(picture, truth)
    limits = {"relative_error": FP32_ERROR, "psnr_db": MIN_PSNR_DB}
    plain = options.folder / "eager.json"
    if options.way == "eager":
        limits = {"relative_error": MAX_PLAIN_ERROR, "psnr_db": MIN_PLAIN_PSNR_DB}
    elif plain.exists():
        own = json.loads(plain.read_text("utf-8"))["error"]
        limits["relative_error"] = max(FP32_ERROR, own["relative_error"])
        limits["psnr_db"] = min(MIN_PSNR_DB, own["psnr_db"] - PSNR_SLACK_DB[options.way])
    report["wrong"] = wrong(report["error"], dtype, limits)
    save()
    if report["wrong"]:
        return
    cases = CASES[:SHORT_CASES] if options.budget_s < SHORT_S else CASES
    if not way.is_cuda:
        cases = cases[:1]
    if options.way == "compile":
        cases = cases[:2]  # every shape is compiled anew, for minutes
    seconds = SECONDS_PER_CASE * min(1.0, options.budget_s / SHORT_S)
    plain_psnr = MIN_PSNR_DB
    if plain.exists():
        plain_psnr = json.loads(plain.read_text("utf-8"))["error"]["psnr_db"]
    min_psnr = min(PICTURE_PSNR_DB, plain_psnr - PICTURE_SLACK_DB)
    for side, batch in cases:
        case: dict[str, Any] = {"side_px": side, "batch": batch}
        try:
            if batch * side * side > MAX_PIXELS:
                case["error"] = f"left out: more than {MAX_PIXELS} px of output"
            else:
                picture_file = options.folder / f"picture_{side}_{batch}.npy"
                case |= measure(way, side, batch, picture_file, min_psnr, seconds)
                if way.records(batch, side) and (side, batch) == CASES[0]:
                    replayed = report["replayed_error"] = compare(way.picture(photo), truth)
                    report["wrong"] = wrong(replayed, dtype, limits)
        except RuntimeError as error:  # out of memory, or what a kernel raises
            case["error"] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
        report["cases"].append(case)
        save()
        print(describe(options.way, case), flush=True)


@torch.no_grad()
def measure(
    way: Way, side: int, batch: int, picture_file: Path, min_psnr: float, seconds: float
) -> dict[str, Any]:
    """Time pictures in, pictures out, and the networks alone, if the pictures are right.

    Args:
        seconds: For repetitions of a call, and of each network.
    """
    photos = make_photos(batch, side)
    result: dict[str, Any] = {}
    if way.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UPS if way.is_cuda else 1):
        pictures = way(photos)
    if way.records(batch, side):
        result["seconds_before_graphs"] = way.seconds(
            lambda: way(photos), seconds, CALLS_BEFORE_GRAPHS
        )
        for _ in range(EnginePlan.record_after - WARM_UPS - CALLS_BEFORE_GRAPHS):
            way(photos)
        result["recording_seconds"] = way.seconds(lambda: way(photos), seconds, 1)
        pictures = way(photos)
    pictures = np.stack([np.asarray(picture) for picture in pictures])
    if way.name == "eager":
        np.save(picture_file, pictures)
    elif picture_file.exists():
        psnr = compare(pictures / 127.5 - 1, np.load(picture_file) / 127.5 - 1)["psnr_db"]
        if not psnr >= min_psnr:
            return {"error": f"wrong: {psnr:.1f} dB from plain modules, not {min_psnr:.1f}"}
    begin, num_before = time.process_time(), way.num_calls
    result["seconds"] = way.seconds(lambda: way(photos), seconds)
    # What others do on the machine changes the time on the clock more than this.
    result["cpu_seconds"] = (time.process_time() - begin) / (way.num_calls - num_before)
    result["images_per_second"] = batch / result["seconds"]
    result["peak_gib"] = way.peak_gib()
    stages = way.stages(photos)
    for name, stage in stages.items():
        for _ in range(2 if way.is_cuda else 0):
            stage()
        result[f"{name}_seconds"] = way.seconds(stage, seconds, None if way.is_cuda else 1)
    return result


def describe(way: str, case: dict[str, Any]) -> str:
    """Return a case as a line of text."""
    line = f"{way:10} {case['side_px']:5} px × {case['batch']:2}"
    if "error" in case:
        return f"{line}  {case['error']}"
    stages = ", ".join(
        f"{n} {1000 * case[f'{n}_seconds']:.1f}" for n in ("encoder", "unet", "decoder")
    )
    if "seconds_before_graphs" in case:
        stages += f"; without graphs {1000 * case['seconds_before_graphs']:.1f}"
        stages += f", recording {1000 * case['recording_seconds']:.1f}"
    return (
        f"{line}  {1000 * case['seconds']:9.1f} ms  {case['images_per_second']:6.1f} images/s  "
        f"{case['peak_gib']:5.1f} GiB  ({stages} ms)"
    )


def main() -> int:
    """Run all ways; the exit code is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for everything")
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--model", help="measure this model, not one of full size")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    is_cuda = options.device != "cpu"
    options.dtype = options.dtype or ("float16" if is_cuda else "float32")
    if options.way:
        work(options)
        return 0
    # A CPU compiles for minutes what then runs once.
    default = [way for way in WAYS if is_cuda or way in ("eager", "fused")]
    ways = [way for way in WAYS if way in (options.ways or default)]
    if options.model is not None and "published" in ways:
        ways.remove("published")  # its adapters are merged, and its text encoder may be missing
    deadline = time.monotonic() + options.budget_s
    results, missing, has_failed = [], [], False
    with tempfile.TemporaryDirectory() as folder:
        # A GPU waits for no processor: what is measured later is imported beside.
        waiting = {way: start(way, options, folder) for way in ("truth", *ways) if is_cuda}
        for number, way in enumerate(("truth", *ways)):
            left = deadline - time.monotonic()
            process = waiting.pop(way, None) or start(way, options, folder)
            if way == "compile" and is_cuda and left < COMPILE_S:
                missing.append(f"{way}: left out, as compiling takes minutes")
                left = 0
            later = [other for other in ways[number:] if other != "compile"]
            code = finish(process, max(left - KEPT_S * len(later), left / 2))
            if code is None and left > 0:
                missing.append(f"{way}: what is not listed was not reached in the time there is")
            elif code:
                missing.append(f"{way}: ended with {code}")
                has_failed = True
            report = Path(folder) / f"{way}.json"
            if report.exists():
                results.append(json.loads(report.read_text("utf-8")))
            if options.out is not None:
                write(options, results, missing)
    for result in results:
        error = result["error"]
        print(
            f"{result['way']:10} first call {result['first_call_s']:.1f} s, relative error "
            f"{error['relative_error']:.1e}, {error['psnr_db']:.1f} dB {result['wrong'] or ''}"
        )
        for case in result["cases"]:
            print(describe(result["way"], case))
    print_ratios(results)
    print("\n".join(missing))
    wrong_cases = (case.get("error", "") for result in results for case in result["cases"])
    has_failed |= any(error.startswith("wrong") for error in wrong_cases)
    return int(has_failed or any(result["wrong"] for result in results) or not results)


def start(way: str, options: argparse.Namespace, folder: str) -> subprocess.Popen[str]:
    """Start a process that measures a way, which waits to be told."""
    command = [sys.executable, __file__, "--way", way, "--folder", folder]
    command += ["--device", options.device, "--dtype", options.dtype]
    command += ["--budget-s", str(options.budget_s)]
    command += ["--model", options.model] if options.model else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], seconds: float) -> int | None:
    """Tell a process to go on; return how it ended, or None where the time did not do."""
    try:
        if seconds > 0:
            process.communicate("go\n", timeout=seconds)
            return process.returncode
    except subprocess.TimeoutExpired:
        pass
    process.kill()
    process.wait()
    return None


def write(options: argparse.Namespace, results: list[dict[str, Any]], missing: list[str]) -> None:
    """Write what there is."""
    report = {"machine": describe_machine(), "dtype": options.dtype}
    report["model"] = options.model or "random weights of full size"
    report |= {"threads": torch.get_num_threads(), "ways": results, "missing": missing}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_ratios(results: list[dict[str, Any]]) -> None:
    """Print how many times faster than each other way the engine is."""
    cases = {
        (result["way"], case["side_px"], case["batch"]): case
        for result in results
        for case in result["cases"]
        if "seconds" in case
    }
    for (way, side, batch), case in cases.items():
        own = cases.get(("fused", side, batch))
        if way != "fused" and own is not None:
            times = (f"{case[n] / own[n]:.2f}" for n in ("seconds", "cpu_seconds"))
            clock, cpu = times
            print(
                f"{side} px × {batch}: fused is {clock} × {way} by the clock, {cpu} × in CPU time"
            )


if __name__ == "__main__":
    sys.exit(main())
