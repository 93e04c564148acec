"""Ways to run the command line on a small model with random weights."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tadsr.cli import app


@pytest.fixture
def tadsr(tmp_path, monkeypatch) -> Callable:
    """Run a command in an empty folder, and check its exit code."""
    monkeypatch.chdir(tmp_path)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*args: object, code: int = 0, input: bytes | None = None):
        result = CliRunner().invoke(app, list(map(str, args)), input=input)
        assert result.exit_code == code, result.output
        return result

    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def upscale(tadsr, model_dir, loaded_once) -> Callable:
    """Run `tadsr upscale` with the small model, as fast as it goes."""

    def run(*args: object, **options: object):
        return tadsr("upscale", *args, "-m", model_dir, "--process-size", 0, **options)

    return run


@pytest.fixture
def imported_once(imported, monkeypatch) -> None:
    """Start workers from a process that has imported already, to save their seconds."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: imported)


@pytest.fixture
def photo(tmp_path) -> Callable[..., Path]:
    """Write a small picture and return its path, relative to the folder that commands run in."""

    def write(name: str, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = len(Image.new(mode, (1, 1)).getbands())
        rng = np.random.default_rng(len(name))
        pixels = rng.integers(0, 256, (size[1], size[0], channels), np.uint8)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
        return Path(name)

    return write
