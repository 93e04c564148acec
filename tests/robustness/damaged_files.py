"""Upscale damaged files, or with damaged checkpoints, and tell what became of each case."""

import faulthandler
import json
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import tadsr
from tadsr import TADSRError, TADSRPipeline
from tadsr.config import UpscaleSettings
from tadsr.errors import ImageWriteError
from tadsr.folders.jobs import Job
from tadsr.folders.restoring import FileRequest, note_about, read_input, restore
from tadsr.images import ArrayImage, count_frames, read_frames, read_image, write_image

from . import damaged_checkpoints
from .corpus import make_files
from .mutations import mutate

SECONDS_A_CASE = 120
"""By the clock, on a machine that does other things as well."""
CPU_SECONDS, MEGABYTES = 5, 1000
"""What a case may take."""
MEMORY_BYTES = 6 * 2**30
RESTORED_PIXELS = 4000
"""Inputs of more pixels, which a changed header may promise, are read only."""
CHECKPOINTS_SHARE = 0.04
TARGETS = (".png", ".tif", ".webp", ".jpg", ".gif", ".bmp")
PACKAGE = str(Path(tadsr.__file__).parent)


def run_numbered(model: Path, folder: Path, seed: int, first: int, count: int, told: Path) -> None:
    """Run cases of a seed by their numbers, and tell of each in a line of JSON.

    It is for a process of its own, which a decoder may bring down: the file at hand then lies in
    FOLDER/in.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    sys.addaudithook(damaged_checkpoints.listen)
    pipe = TADSRPipeline.from_pretrained(model)
    with tempfile.TemporaryDirectory() as place:
        files = make_files(Path(place))
    with tempfile.TemporaryDirectory() as place:
        checkpoint = damaged_checkpoints.make_checkpoint(Path(place))
    with told.open("w", buffering=1) as lines:
        for number in range(first, first + count):
            faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
            rng = Random(f"{seed}-{number}")
            if Random(number).random() < CHECKPOINTS_SHARE:
                case = partial(damaged_checkpoints.run_case, checkpoint, folder, rng)
            else:
                case = partial(run_case, pipe, files, folder, rng, number)
            lines.write(json.dumps({"number": number, **measured(case)}) + "\n")
            faulthandler.cancel_dump_traceback_later()


def measured(run: Callable[[], dict[str, str]]) -> dict[str, Any]:
    """Run a case and add what it took; too much is wrong."""
    begin, before = time.process_time(), _megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    found = run()
    seconds = round(time.process_time() - begin, 2)
    megabytes = round(_megabytes("VmHWM") - before)
    if not found["wrong"] and (seconds > CPU_SECONDS or megabytes > MEGABYTES):
        found["wrong"] = f"took {seconds} s and {megabytes} MB"
    return {**found, "seconds": seconds, "megabytes": megabytes}


def _megabytes(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) / 1e3


def run_case(
    pipe: TADSRPipeline, files: dict[str, bytes], folder: Path, rng: Random, number: int
) -> dict[str, str]:
    """Make a case, run it, and clean up after it unless it went wrong."""
    name = rng.choice(sorted(files))
    data = files[name] if rng.random() < 0.02 else mutate(rng, files[name], list(files.values()))
    suffix = Path(rng.choice(sorted(files)) if rng.random() < 0.1 else name).suffix
    source = folder / "in" / f"{number}{suffix}"
    target = folder / "out" / f"{number}{rng.choice(TARGETS)}"
    for path in (source, target):
        path.parent.mkdir(exist_ok=True)
    source.write_bytes(data)
    request = FileRequest(UpscaleSettings(process_size=0), strip=rng.random() < 0.2)
    try:
        became, wrong = upscale(pipe, Job(source, target), request), ""
    except Exception as error:
        became = type(error).__name__
        wrong = "" if is_ours(error) else traceback.format_exc()
    left = sorted(path.name for path in target.parent.iterdir())
    if left != ([target.name] if became == "upscaled" else []):
        wrong = wrong or f"{became}, and the output folder holds {left}"
    shutil.rmtree(target.parent)
    if not wrong:
        source.unlink()
    return {"file": name, "became": became, "wrong": wrong}


def upscale(pipe: TADSRPipeline, job: Job, request: FileRequest) -> str:
    """Go the way of a folder run's files, and check the result."""
    image = read_input(job, request)
    note_about(job, request)
    width, height = request.output_size(image)
    if image.size[0] * image.size[1] > RESTORED_PIXELS:
        return "only read"
    result = restore(pipe, image, job, request)
    if result is not None:
        write_image(result, job.target, **request.writing(job))
    if count_frames(job.target) > 1:
        found = read_frames(job.target)
        list(found)
    else:
        found = read_image(job.target)
        if not isinstance(found, ArrayImage):
            found.load()
    if found.size != (width, height):
        raise AssertionError(f"must be {width}×{height} px, is {found.size}")
    return "upscaled"


def is_ours(error: BaseException) -> bool:
    """Tell whether an error is one that users are told about, and hides no bug of the library."""
    cause = error.__cause__
    if isinstance(error, ImageWriteError) and cause is not None and not isinstance(cause, OSError):
        return False  # a picture was there, and something in it could not be written
    is_raised_here = [_is_raised_here(each) for each in (error, cause) if each is not None]
    if isinstance(error, TADSRError):
        hides_bug = cause is not None and not isinstance(cause, TADSRError) and is_raised_here[-1]
        return bool(str(error)) and (not hides_bug or isinstance(cause, MemoryError))
    return isinstance(error, ValueError | TypeError) and is_raised_here[0]


def _is_raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(PACKAGE)
