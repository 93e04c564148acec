"""The examples do what they say; that for Ray is in `test_distributed.py`, beside its cluster."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_folder_is_upscaled_and_goes_on(model_dir, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "upscale_folder.py"))["main"]
    photos, sharp = tmp_path / "photos", tmp_path / "sharp"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg"):
        Image.new("RGB", (6, 5), "teal").save(photos / name)
    arguments = [str(photos), str(sharp), "--model", str(model_dir)]
    main(arguments)
    assert capsys.readouterr().out.count("written") == 2
    with Image.open(sharp / "sub" / "b.png") as image:
        assert image.size == (24, 20)
    (sharp / "a.png").unlink()
    main(arguments)
    printed = capsys.readouterr().out
    assert (printed.count("written"), printed.count("skipped ")) == (1, 1)
