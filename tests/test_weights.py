"""The model inside the package: small, whole, and better than doing nothing."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.checkpoints import inspect_checkpoint
from tadsr.checkpoints.detect import SUMS_NAME, check_sums
from tadsr.errors import CheckpointError
from tadsr.image_io import resize_bicubic
from tadsr.training.degradation import PRESETS, apply_degradation, sample_degradation

EXAMPLE = Path(__file__).parent.parent / "examples" / "photos" / "lighthouse.jpg"
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def tiny():
    return TADSRPipeline.from_pretrained("tadsr-tiny")


def test_it_is_small_and_free():
    info = inspect_checkpoint("tadsr-tiny")
    assert sum(c.num_bytes for c in info.components) <= MAX_BYTES
    assert info.licence == "apache-2.0"
    assert info.timestep_range == (0, 999)


def test_its_files_are_checked(tmp_path):
    place = Path(str(resources.files("tadsr"))) / "weights" / "tadsr-tiny"
    folder = Path(shutil.copytree(place, tmp_path / "tadsr-tiny"))
    listed = {line.split()[1] for line in (folder / SUMS_NAME).read_text().splitlines()}
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert listed == files - {SUMS_NAME}
    check_sums(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="missing or damaged; reinstall tadsr"):
        check_sums(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing or damaged; reinstall tadsr"):
        check_sums(folder)


def test_it_restores_a_degraded_photo_better_than_bicubic(tiny, data_dir):
    with Image.open(data_dir / "kodim19_crop.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    hq = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    gains = []
    for seed in range(4):
        params = sample_degradation(np.random.default_rng(seed), PRESETS["realesrgan"])
        lq = apply_degradation(hq * 2 - 1, params) / 2 + 0.5
        restored = tiny(lq, timestep=1)
        bicubic = resize_bicubic(lq, hq.shape[-2:]).clamp(0, 1)
        error = [(x - hq).square().mean().item() for x in (bicubic, restored)]
        gains.append(10 * np.log10(error[0] / error[1]))  # dB
    assert np.mean(gains) > 0.1
    assert np.median(gains) > 0


def test_the_timestep_changes_the_picture(tiny):
    with Image.open(EXAMPLE) as image:
        crop = image.crop((100, 100, 164, 164))
    faithful, vivid = (np.asarray(tiny(crop, timestep=t), dtype=float) for t in (1, 999))
    assert np.abs(faithful - vivid).mean() > 0.5


def test_it_knows_the_empty_prompt_only(tiny):
    with pytest.raises(ValueError, match="got 'a lighthouse'"):
        tiny(Image.open(EXAMPLE), prompt="a lighthouse")
