"""What commands say on the way: our own warnings, plainly and once, and nobody else's."""

import warnings

import pytest
import torch
from PIL import Image

from tadsr.onestep.step import OneStepEngine

CUT = (
    "Warning: memory ran out for the image as a whole, so that it is computed in pieces; "
    "tiling=TileSpec() or --max-memory avoids the first try\n"
)


@pytest.fixture
def little_memory(monkeypatch) -> None:
    def fails(*arguments, **options):
        warnings.warn("a library's own", stacklevel=1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(OneStepEngine, "restore", fails)


PAGES = "a.tif holds several pages, of which the first is read; split it for the others\n"


def scan(path: str, mode: str = "RGB") -> None:
    pages = [Image.new(mode, (6, 5), color) for color in ("#030303", "#090909")]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def test_a_warning_of_ours_is_said_once_and_plainly(upscale, photo, little_memory):
    photo("photos/a.png")
    photo("photos/b.png")
    assert upscale("photos").stderr.endswith("fused\n" + CUT)


def test_quiet_runs_say_nothing(upscale, photo, little_memory):
    assert upscale(photo("a.png"), "--quiet").output == ""


def test_further_pages_are_said_once(upscale, tadsr, tmp_path):
    (tmp_path / "scans").mkdir()
    scan(tmp_path / "scans" / "a.tif")
    said = upscale("scans").stderr
    assert said.endswith(f"\nscans/{PAGES}")
    assert said.count("holds several pages") == 1
    assert upscale("scans", "--overwrite", "--quiet").output == ""
    said = tadsr("degrade", "scans", "small").stderr
    assert said.count(f"Warning: scans/{PAGES}") == 1
    assert "UserWarning" not in said


def test_every_command_says_it_as_a_plain_line(upscale, tadsr, photo, model_dir):
    scan("a.tif")
    photo("b.png")
    line = f"Warning: {PAGES}"
    assert tadsr("compare", "a.tif", "a.tif", "--border", 0, code=2).stderr.startswith(line)
    options = ("-t", 1, "-s", 1, "-m", model_dir, "--process-size", 0)
    assert tadsr("sweep", "a.tif", *options).stderr == line
    scan("a.tif", "L")
    assert upscale("b.png", "--timestep-map", "a.tif").stderr.startswith(line)
