"""`tadsr sweep` and `tadsr compare`: what they print and draw."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def sweep(tadsr, model_dir, loaded_once):
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


def test_an_original_adds_figures_and_the_curve(sweep, photo):
    lq, hq = photo("lq.png", size=(10, 8)), photo("original.png", size=(40, 32))
    lines = sweep(lq, "--hq", hq, "-t", "1,999").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["HQ", "bicubic", "t=1", "t=999"]
    assert lines[-1] == "lq.png -> lq_sweep.png, lq_sweep_curve.png"
    assert Image.open("lq_sweep_curve.png").format == "PNG"
    sweep(lq, "--hq", hq, "-t", "1", "-o", "out/s.png", "--plot", "out/c.svg")
    assert {path.name for path in Path("out").iterdir()} == {"s.png", "c.svg"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-t 1,1000", "--timesteps must be in 0..999, got 1000"),
        ("-t 1,,2", "--timesteps must be whole numbers with commas"),
        ("-t 1,1", "--timesteps must be different numbers"),
        ("--crop 1,2,3", "--crop must be 4 whole numbers"),
        ("--crop 0,0,41,4", "--crop must lie inside the result's 40×32 px"),
        ("--crop 0,0,0,4", "and not be empty"),
        ("--plot c.png", "--plot needs --hq"),
        ("--hq lq.png", "the original must have the result's size 40×32 px, got 10×8 px"),
        ("--hq lq.png --plot c.txt -s 1", "a plot must end in one of"),
        ("--tile off --max-memory 1GB", "--max-memory needs pieces"),
    ],
)
def test_misuse_is_told_before_anything_is_written(sweep, photo, args, message):
    photo("lq.png", size=(10, 8))
    assert message in sweep("lq.png", *args.split(), code=2).stderr
    assert [path.name for path in Path().iterdir()] == ["lq.png"]


def test_figures_are_printed_and_a_sheet_is_written(tadsr, photo):
    a, b, hq = (photo(name, size=(40, 32)) for name in ("a.png", "bb.png", "hqq.png"))
    lines = tadsr("compare", a, b, hq).stdout.splitlines()
    assert lines[0].split() == ["psnr_y", "↑", "ssim_y", "↑", "psnr_rgb", "↑", "ssim_rgb", "↑"]
    pairs = ["a.png – bb.png", "a.png – hqq.png", "bb.png – hqq.png"]
    assert [line[:16].strip() for line in lines[1:4]] == pairs
    assert lines[4].startswith("most different: 16×16 px at ")
    assert Image.open("a_vs_bb.png").size == (3 * 330 + 10, 2 * (28 + 256 + 10 + 320 + 10) + 10)
    assert tadsr("compare", a, b, code=1).stderr.startswith("Error: a_vs_bb.png: exists already")
    tadsr("compare", a, b, "--overwrite", "-o", "new/s.jpg", "--width", 64)
    assert Image.open("new/s.jpg").size[0] == 3 * 74 + 10


def test_same_names_in_two_folders_are_told_apart(tadsr, photo):
    a, b = photo("x/a.png", size=(20, 20)), photo("y/a.png", size=(20, 20))
    assert "x/a.png – y/a.png" in tadsr("compare", a, b, "-o", "s.png").stdout
    output = tadsr("compare", a, a, "-o", "u.png").stdout
    assert "x/a.png (1) – x/a.png (2)" in output
    assert output.endswith(f"no pixel of {a} and {a} differs; see u.png\n")
    a.write_bytes(b"no image")
    assert "x/a.png" in tadsr("compare", a, b, "-o", "t.png", code=1).stderr
    assert not Path("t.png").exists()


def test_sizes_that_differ_are_misuse_and_write_nothing(tadsr, photo):
    result = tadsr("compare", photo("a.png", size=(20, 20)), photo("b.png", size=(20, 24)), code=2)
    assert "one size, got 20×20 px (a.png), 20×24 px (b.png)" in result.stderr
    assert not Path("a_vs_b.png").exists()
    tiny = photo("tiny.png", size=(9, 9))
    assert "smaller border" in tadsr("compare", tiny, tiny, "-o", "s.png", code=2).stderr


def test_an_image_with_alpha_and_16_bits_is_compared(tadsr, tmp_path):
    gray = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(gray).save("wide.png")
    Image.fromarray((gray >> 8).astype(np.uint8)).convert("RGBA").save("alpha.png")
    lines = tadsr("compare", "wide.png", "alpha.png").stdout.splitlines()
    assert float(lines[1].split()[3]) > 48
