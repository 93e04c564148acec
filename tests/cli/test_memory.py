"""Freed memory is kept for the next picture, and given back where it is short."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tadsr.onestep import upscaling

PROGRAM = """
import json
import resource
import sys

import numpy as np
import psutil

from tadsr.heap import give_back_freed_memory, keep_freed_memory


def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**26, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if "keep" in sys.argv:
    keep_freed_memory()
first, again = fill(), fill()
held = psutil.Process().memory_info().rss
give_back_freed_memory()
print(json.dumps([first, again, held - psutil.Process().memory_info().rss]))
"""


def run(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_is_taken_once_and_given_back_when_asked():
    first, again, given = run("keep")
    assert first > 10 * again
    assert given > 2**25
    for arguments, environment in (((), {}), (("keep",), {"MALLOC_ARENA_MAX": "8"})):
        first, again, given = run(*arguments, **environment)
        assert again > first / 2
        assert given < 2**25


@pytest.mark.parametrize(
    ("names", "options", "is_kept"),
    [
        (["a.png", "b.png"], [], True),
        (["a.png"], [], False),
        (["a.png", "b.png"], ["--max-memory", "2GB"], False),
    ],
)
def test_several_images_keep_it_and_a_limit_does_not(upscale, names, options, is_kept, monkeypatch):
    kept, given_back = [], []
    command = importlib.import_module("tadsr.cli.upscale")  # by its name it is the function
    monkeypatch.setattr(command, "keep_freed_memory", lambda: kept.append(1))
    monkeypatch.setattr(upscaling, "give_back_freed_memory", lambda: given_back.append(1))
    for name in names:
        Image.new("RGB", (4, 4)).save(name)
    upscale(*names, "out/", *options)
    assert len(kept) == is_kept
    assert bool(given_back) == ("--max-memory" in options)  # bands begin without what is kept
