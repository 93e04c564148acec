"""The examples do what they say, at a small size; Ray's is in `test_distributed.py`."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr import TADSRPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTO = EXAMPLES / "photos" / "lighthouse.jpg"

pytestmark = pytest.mark.usefixtures("unenlarged")


def run(name, *arguments):
    """Run an example as its command line does."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    with Image.open(PHOTO) as image:
        image.crop((120, 60, 160, 90)).save(path)
    return path


def test_upscale_one(photo, tmp_path):
    run("upscale_one", photo, tmp_path / "sharp.webp", "--timestep", 1, "--scale", 2)
    with Image.open(tmp_path / "sharp.webp") as image:
        assert image.size == (80, 60)


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    assert names["sheet"].size == (3 * 240, 180)


def test_the_readmes_pictures_have_their_photographs(monkeypatch):
    benchmarks = EXAMPLES.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    pictures = importlib.import_module("pictures")
    for sheet, parts in pictures.SHEETS.items():
        assert (EXAMPLES.parent / "docs" / "images" / sheet).is_file()
        for name, (left, top) in parts.items():
            sizes = []
            for label in ("lq", "realesrgan", "original"):
                with Image.open(pictures.PHOTOS / f"{name}_{label}.webp") as image:
                    sizes.append(image.size)
            assert sizes[1:] == [pictures.PART_PX] * 2
            room = [4 * side - part for side, part in zip(sizes[0], sizes[1], strict=True)]
            assert left <= room[0]
            assert top <= room[1]


def test_a_blind_look_has_a_key_that_tells_the_sides(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    blind = importlib.import_module("blind")
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    for folder, color in ((first, "red"), (second, "blue")):
        folder.mkdir()
        for i in range(8):
            Image.new("RGB", (300, 200), color).save(folder / f"{i}.png")
    blind.main(["--first", str(first), "--second", str(second), "--out", str(out), "--seed", "0"])
    key = json.loads((out / "key.json").read_text())
    assert len(key) == 8
    assert set(key.values()) == {"left", "right"}
    for name, side in key.items():
        with Image.open(out / name) as sheet:
            x = sheet.width // 4 * (1 if side == "left" else 3)
            assert sheet.getpixel((x, sheet.height // 4)) == (255, 0, 0)
    (second / "3.png").unlink()
    with pytest.raises(SystemExit):
        blind.main(["--first", str(first), "--second", str(second), "--out", str(out)])
    assert "lacks 3.png" in capsys.readouterr().err


def test_sweep(photo, tmp_path, capsys):
    run("sweep", photo, tmp_path / "sheet.png", "--timesteps", 1, 900)
    printed = capsys.readouterr().out
    assert "timestep   1: detail" in printed
    assert "timestep 900: detail" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 160


def test_timestep_map(photo, tmp_path, capsys):
    box = ("--box", 0, 0, 20, 30, "--feather", 0)
    run("timestep_map", photo, tmp_path / "mapped.png", *box)
    assert "run at 1, 900" in capsys.readouterr().out
    vivid_right = np.where(np.arange(40) < 20, 1, 900)[None].repeat(30, axis=0)
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    with Image.open(photo) as image, Image.open(tmp_path / "mapped.png") as mapped:
        expected, vivid = (np.asarray(pipe(image, t), np.int16) for t in (vivid_right, 900))
        assert np.array_equal(mapped, expected)
        # The part at timestep 1 is the one that the map changes.
        change = abs(expected - vivid).mean(axis=(0, 2))
    assert change[:40].mean() > change[120:].mean()


def test_fine_tune_trains_and_writes_a_model_that_works(photo, tmp_path, capsys):
    output = tmp_path / "run"
    options = ("--steps", 2, "--crop-px", 64, "--batch-size", 1)
    run("fine_tune", PHOTO.parent, output, *options)
    assert "tadsr upscale photo.jpg --model" in capsys.readouterr().out
    losses = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in losses if "student.mse" in entry] == [1, 2]
    trained = TADSRPipeline.from_pretrained(output / "model")
    start = TADSRPipeline.from_pretrained("tadsr-tiny")
    assert not torch.equal(trained.unet.conv_in.weight, start.unet.conv_in.weight)
    with Image.open(photo) as image:
        assert trained(image, process_size=0).size == (160, 120)


@pytest.mark.parametrize(
    "devices", [(), pytest.param(("--devices", "cpu"), marks=pytest.mark.slow)]
)
def test_a_folder_is_upscaled_and_goes_on(devices, model_dir, tmp_path, capsys):
    photos, sharp = tmp_path / "photos", tmp_path / "sharp"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.jpg"):
        Image.new("RGB", (6, 5), "teal").save(photos / name)
    arguments = (photos, sharp, "--model", model_dir)
    run("upscale_folder", *arguments)
    assert capsys.readouterr().out.count("written") == 2
    with Image.open(sharp / "sub" / "b.png") as image:
        assert image.size == (24, 20)
    (sharp / "a.png").unlink()
    run("upscale_folder", *arguments)
    printed = capsys.readouterr().out
    assert (printed.count("written"), printed.count("skipped ")) == (1, 1)
    (photos / "c.png").write_bytes(b"no image")
    run("upscale_folder", *arguments, *devices)
    assert capsys.readouterr().out.endswith("1 of 3 failed\n")
