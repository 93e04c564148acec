"""What the tests of folder runs share: photos, models, what was written, and forked processes."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tadsr.cli import main
from tadsr.cli.model import ModelRequest
from tadsr.folders.manifest import MANIFEST_NAME, read_manifest
from tadsr.folders.restoring import FileRequest, UpscaleSettings
from tadsr.restorer import Restorer

FAST = FileRequest(UpscaleSettings(process_size=0))
NOBODY = 65534


def load(model_dir: Path, device: str = "cpu") -> Restorer:
    return ModelRequest(str(model_dir), dtype="fp32", timestep=1).load(device)


def write_photos(folder: str, count: int, size: tuple[int, int] = (6, 5)) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number:02}.png")


def records(folder: str = "photos_x4") -> dict[str, dict]:
    lines = Path(folder, MANIFEST_NAME).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = [entry for entry in entries if "target" in entry]
    assert len(found) == len({entry["target"] for entry in found}), "done twice"
    return {entry["target"]: entry for entry in found}


def check_whole(folder: str, count: int, size: tuple[int, int]) -> None:
    """Check that a folder holds so many whole images, all of them in the manifest, and no more."""
    names = {path.name for path in Path(folder).iterdir() if "tadsr-manifest" not in path.name}
    assert names == {f"{number:02}.png" for number in range(count)}
    for name in names:
        with Image.open(Path(folder, name)) as image:
            image.load()
            assert image.size == size
    entries = records(folder)
    assert len(entries) == count
    for name, entry in entries.items():
        assert entry["error"] is None
        assert entry["target_bytes"] == os.path.getsize(Path(folder, name))


def wait_for_records(count: int, folder: str = "photos_x4", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(read_manifest(folder)) < count:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def fork(work: Callable[[], object]) -> int:
    """Start a process that has imported already, and return its number."""
    child = os.fork()
    if child == 0:
        code: object = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code if isinstance(code, int) else 1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def upscale_in_a_child(
    *args: object,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> int:
    """Start `tadsr upscale` in a process and a session of its own, with its errors in said.txt."""

    def run() -> None:
        os.setsid()
        before()
        sys.argv = ["tadsr", "upscale", *map(str, args)]
        with (
            open(os.devnull, "w") as sys.stdout,
            open("said.txt", "w", encoding="utf-8", buffering=1) as sys.stderr,
        ):
            try:
                main()
            finally:
                after()

    return fork(run)
