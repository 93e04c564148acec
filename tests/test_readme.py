"""What the README tells a reader to type works as written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tadsr.cli import app
from tadsr.image_io import ArrayImage, read_frames, read_image, write_frames, write_image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the example photo where the README expects it, and a user's own photos."""
    folder = tmp_path / "examples" / "photos"
    folder.mkdir(parents=True)
    photo = folder / "lighthouse.jpg"
    with Image.open(ROOT / "examples" / "photos" / "lighthouse.jpg") as image:
        image.crop((0, 0, 32, 24)).save(photo)  # small, or this would take minutes
    shutil.copy(photo, tmp_path / "photo.jpg")
    (tmp_path / "photos" / "holiday").mkdir(parents=True)
    shutil.copy(photo, tmp_path / "photos" / "holiday" / "one.jpg")
    scan = np.asarray(Image.open(photo)).astype(np.uint16) * 257
    write_image(ArrayImage(scan), tmp_path / "scan16.tif")
    frames = [Image.new("RGB", (8, 6), color) for color in ("orange", "teal")]
    write_frames(frames, tmp_path / "clip.gif", durations_ms=(100, 200))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_code_runs(checkout):
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    with Image.open("lighthouse_x4.png") as image:
        assert image.size == (128, 96)


def test_the_shell_commands_run(checkout):
    commands = [
        shlex.split(line, comments=True)
        for block in code_blocks("sh")
        for line in block.splitlines()
        if line.startswith("tadsr ")
    ]
    assert len(commands) >= 5
    for command in commands:
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, (command, result.output)
    assert Path("photo_x4.png").exists()
    assert Path("sharp.webp").exists()
    assert Path("sharp/holiday/one.jpg").exists()
    assert isinstance(read_image("sharp.png"), ArrayImage)
    assert len(read_frames("clip_x4.png")) == 2


def test_the_first_command_upscales_a_photo_that_exists():
    first = re.search(r"<!-- first run -->\n```sh\n(.*)\n```", README).group(1)
    photo = shlex.split(first.split("tadsr upscale ")[1])[0]
    assert (ROOT / photo).is_file()


def test_files_and_links_exist():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_format_pages_python_code_runs(checkout):
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(block, "formats.md", "exec"), {})
    assert read_image("sharp.png").pixels.dtype == np.uint16
    assert read_frames("clip.webp").durations_ms == (100, 200)


def test_the_training_guides_python_code_runs(checkout, monkeypatch):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    photo = checkout / "examples" / "photos" / "lighthouse.jpg"
    shutil.copy(ROOT / "examples" / "photos" / "lighthouse.jpg", photo)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "training.md", "exec"), {})
    assert (checkout / "runs" / "smoke" / "model" / "model_index.json").is_file()


def test_the_timestep_guides_code_runs(checkout):
    text = (ROOT / "docs" / "timestep.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    # The photo is smaller here, and the network works at its size.
    text = text.replace("384", "32").replace("80, 32, 256", "8, 32, 24").replace("32, 80", "32, 8")
    text = re.sub(r"\b(timesteps?=)", r"process_size=0, \1", text)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), "timestep.md", "exec"), {})
    Image.new("L", (3, 2), 255).save("mask.png")
    Path("regions.json").write_text('{"default": 3}')
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        options = ["--process-size", "0", "--overwrite"]
        if command[1] == "compare":
            shutil.copy("photo_sweep.png", "sheet.png")
            options = []
        result = CliRunner().invoke(app, [*command[1:], *options])
        assert result.exit_code == 0, (command, result.output)


def test_the_training_guide_names_recipes_and_fields_that_exist():
    from tadsr.training import load_recipe

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8") + README
    paths = set(re.findall(r"examples/recipes/[\w/.]+\.yaml", text))
    assert len(paths) >= 5
    for path in paths:
        load_recipe(ROOT / path)


def test_the_tiling_guides_code_runs(checkout):
    text = (ROOT / "docs" / "tiling.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:examples|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    shutil.copy("photo.jpg", "panorama.png")
    # The network works at the size of the photo, which is smaller here.
    python = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    python = re.sub(r"(pipe\(image|huge.tif\")", r"\1, process_size=0", python)
    exec(compile(python, "tiling.md", "exec"), {})
    with Image.open("huge.tif") as image:
        assert image.size == (128, 96)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if "--devices" not in command:  # a process for each, which other tests start
                command += ["--process-size", "0", "--overwrite"]
                result = CliRunner().invoke(app, command[1:])
                assert result.exit_code == 0, (command, result.output)
    (cluster,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    compile(cluster, "tiling.md", "exec")


@pytest.mark.slow
def test_the_onnx_guides_python_code_runs(checkout):
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "onnx.md", "exec"), {})
    with Image.open("onnx_x4.png") as image:
        assert image.size == (128, 96)
