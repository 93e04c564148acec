from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def sweep(tadsr, model_dir):
    def run(*args: object, code: int = 0):
        options = ("-m", model_dir, "--process-size", 0, "--device", "cpu", "--width", 40)
        return tadsr("sweep", *args, *options, code=code)

    return run


def test_a_sheet_is_written_beside_the_photo(sweep, photo):
    result = sweep(photo("photo.jpg", size=(12, 9)))
    assert result.stdout == "photo.jpg -> photo_sweep.png\n"
    # Eight panels in two rows of four; the part is a square.
    assert Image.open("photo_sweep.png").size == (4 * 50 + 10, 2 * (28 + 30 + 10 + 40 + 10) + 10)
    again = sweep("photo.jpg", code=2)
    assert "photo_sweep.png exists already; --overwrite replaces it" in again.stderr
    sweep("photo.jpg", "--overwrite", "-t", 5, "--crop", "0,0,20,10")
    assert Image.open("photo_sweep.png").size == (3 * 50 + 10, 28 + 30 + 10 + 20 + 10 + 10)


def test_pieces_and_another_engine_change_nothing_that_is_seen(sweep, photo):
    sweep(photo("photo.png", size=(40, 30)), "-t", "5,900")
    sweep("photo.png", "-t", "5,900", "-o", "b.png", "--engine", "eager", "--max-memory", "9GB")
    sheets = [np.asarray(Image.open(name)).astype(int) for name in ("photo_sweep.png", "b.png")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    message = "--max-memory needs pieces"
    assert message in sweep("photo.png", "--tile", "off", "--max-memory", "1GB", code=2).stderr


def test_an_original_adds_figures_and_the_curve(sweep, photo):
    lq, hq = photo("lq.png", size=(10, 8)), photo("original.png", size=(40, 32))
    result = sweep(lq, "--hq", hq, "-t", "1,999")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["HQ", "bicubic", "t=1", "t=999"]
    assert lines[-1] == "lq.png -> lq_sweep.png, lq_sweep_curve.png"
    assert Image.open("lq_sweep_curve.png").format == "PNG"
    sweep(lq, "--hq", hq, "-t", "1", "-o", "out/s.png", "--plot", "out/c.svg")
    assert {path.name for path in Path("out").iterdir()} == {"s.png", "c.svg"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-t", "1,1000"], "--timesteps must be in 0..999, got 1000"),
        (["-t", "1,,2"], "--timesteps must be whole numbers with commas"),
        (["-t", "1,1"], "--timesteps must be different numbers"),
        (["--crop", "1,2,3"], "--crop must be 4 whole numbers"),
        (["--crop", "0,0,41,4"], "--crop must lie inside the result's 40×32 px"),
        (["--crop", "0,0,0,4"], "and not be empty"),
        (["--plot", "c.png"], "--plot needs --hq"),
        (["--hq", "lq.png"], "the original must have the result's size 40×32 px, got 10×8 px"),
        (["--hq", "lq.png", "--plot", "c.txt", "-s", 1], "a plot must end in one of"),
    ],
)
def test_misuse_is_told_before_anything_is_written(sweep, photo, args, message):
    photo("lq.png", size=(10, 8))
    assert message in sweep("lq.png", *args, code=2).stderr
    assert [path.name for path in Path().iterdir()] == ["lq.png"]
