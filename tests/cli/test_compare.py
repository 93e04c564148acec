from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


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
