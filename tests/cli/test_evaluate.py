import csv
import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def evaluate(tadsr, model_dir, loaded_once):
    """Run `tadsr evaluate` with the small model, as fast as it goes."""

    def run(*args: object, code: int = 0):
        options = ("-m", model_dir, "--process-size", 0, "--device", "cpu")
        return tadsr("evaluate", *args, *options, code=code)

    return run


@pytest.fixture
def folders(photo) -> None:
    for name in ("a.png", "bb.png"):
        photo(f"hq/{name}", size=(32, 24))
        photo(f"lq/{name}", size=(8, 6))
        photo(f"out/{name.replace('.', '_x4.')}", size=(32, 24))


pytestmark = pytest.mark.usefixtures("folders")


def test_outputs_are_compared_with_originals(evaluate):
    result = evaluate("out", "--hq", "hq")
    heading, columns, hq, out = result.stdout.splitlines()
    assert heading == "2 images; mean"
    assert " ".join(columns.split()) == "psnr_y ↑ ssim_y ↑ psnr_rgb ↑ ssim_rgb ↑ detail"
    assert hq.split()[:-1] == ["HQ", "–", "–", "–", "–"]
    assert out.split()[0] == "out"
    assert result.stderr == ""


def test_a_model_is_measured_at_timesteps_beside_others(evaluate):
    args = ("--lq", "lq", "--hq", "hq", "-t", 900, "-t", 1, "theirs=out")
    files = ("--csv", "new/a.csv", "--json", "a.json", "--plot", "a.png", "--save", "kept")
    result = evaluate(*args, *files, "--metric", "psnr_y", "--metric", "detail", "--border", 0)
    names = ["HQ", "bicubic", "t=900", "t=1", "theirs"]
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == names
    assert result.stdout.startswith("2 images; mean (images better than bicubic)\n")
    report = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == names
    assert report["settings"]["model"] == "tiny"
    assert report["settings"]["border_px"] == 0
    assert str(Path.cwd()) not in Path("a.json").read_text() + Path("new/a.csv").read_text()
    with open("new/a.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 5 * 3
    assert Image.open("a.png").format == "PNG"
    assert Image.open("kept/t=900/a.png").size == (32, 24)
    assert sorted(path.name for path in Path("kept").iterdir()) == ["bicubic", "t=1", "t=900"]


def test_without_originals_detail_alone_is_measured(evaluate):
    result = evaluate("out")
    assert result.stdout.splitlines()[1].split() == ["detail"]
    assert [line.split()[0] for line in evaluate("--lq", "lq").stdout.splitlines()[2:]] == [
        *("bicubic", "t=1", "t=500", "t=900")
    ]


def test_missing_images_are_listed_and_may_be_allowed(evaluate):
    Path("out/a_x4.png").unlink()
    result = evaluate("out", "--hq", "hq", code=1)
    assert "a: in HQ but not in out" in result.stderr
    assert "Traceback" not in result.output
    result = evaluate("out", "--hq", "hq", "--allow-missing")
    assert result.stdout.startswith("1 image; mean\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--hq", "hq"), "name folders of results to measure, or --lq"),
        (("out", "--hq", "hq", "-t", 5), "--timestep needs --lq"),
        (("out", "--hq", "hq", "--save", "kept"), "--save needs --lq"),
        (("--lq", "lq", "-t", 1000), "--timestep must be in 0..999, got 1000"),
        (("out", "--border", -1), "--border must be in"),
        (("out", "lq/../out"), "must differ in name, got 'out' twice"),
        (("=out",), "must be FOLDER or NAME=FOLDER, got '=out'"),
        (("bicubic=out", "--hq", "hq"), "must not be named bicubic"),
        (("out", "--metric", "psnr_y"), "must be given for psnr_y"),
        (("out", "--plot", "a.png"), "must have psnr_y"),
        (("out", "--hq", "hq", "--plot", "a.jpg"), "must end in one of .png .svg .pdf"),
    ],
)
def test_misuse_is_explained(evaluate, args, message):
    assert message in evaluate(*args, code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("absent", "--hq", "hq"), "absent must be a folder of images"),
        (("out", "--hq", "large"), "must have its original's size"),
        (("out", "--hq", "hq", "--csv", "hq/a.png/a.csv"), "is not a folder"),
        (("out", "--hq", "hq", "--perceptual", "none.safetensors"), "must be a safetensors file"),
    ],
)
def test_what_fails_is_one_readable_error(evaluate, photo, args, message):
    for name in ("a.png", "bb.png"):
        photo(f"large/{name}", size=(32, 25))
    result = evaluate(*args, code=1)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
