"""The model inside the package: small, whole, and better than doing nothing."""

import json
import shutil
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.checkpoints import inspect_checkpoint
from tadsr.checkpoints.detect import SUMS_NAME, check_sums
from tadsr.degradation import PRESETS, apply_degradation, sample_degradation
from tadsr.errors import CheckpointError
from tadsr.images import resize_bicubic

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "photos" / "lighthouse.jpg"
MAX_BYTES = 30_000_000


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


def test_it_restores_a_degraded_photo_better_than_bicubic(pipe, data_dir):
    with Image.open(data_dir / "kodim19_crop.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    hq = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    gains = []
    for seed in range(4):
        params = sample_degradation(np.random.default_rng(seed), PRESETS["realesrgan"])
        lq = apply_degradation(hq * 2 - 1, params) / 2 + 0.5
        restored = pipe(lq, timestep=1)
        bicubic = resize_bicubic(lq, hq.shape[-2:]).clamp(0, 1)
        error = [(x - hq).square().mean().item() for x in (bicubic, restored)]
        gains.append(10 * np.log10(error[0] / error[1]))  # dB
    assert np.mean(gains) > 0.1
    assert np.median(gains) > 0


RESULTS = {"**Real pairs**": "realsr_cpu", "**Degraded photographs**": "kodak_cpu"}


def read_results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))["rows"]


@pytest.mark.parametrize("heading", RESULTS)
def test_the_cards_figures_are_those_that_were_recorded(heading):
    card = (ROOT / "docs" / "tadsr-tiny.md").read_text("utf-8")
    table = next(part for part in card[card.index(heading) :].split("\n\n") if part[0] == "|")
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    recorded = {}
    for row in read_results(RESULTS[heading]):
        means, wins = row["means"], row["wins_over_bicubic"]
        texts = {"detail": f"{means['detail']:.2f}"}
        for name, digits in (("psnr_y", 2), ("ssim_y", 4), ("squeezenet", 4)):
            if name in means:
                count = f" ({wins[name]})" if name in wins else ""
                texts[name] = f"{means[name]:.{digits}f}{count}"
        label = row["name"].replace("t=", "timestep ").replace("HQ", "the original")
        recorded[label] = [
            texts.get(name, "") for name in ("psnr_y", "ssim_y", "detail", "squeezenet")
        ]
    assert {label: cells for label, *cells in shown} == recorded


@pytest.mark.parametrize("report", RESULTS.values())
def test_the_knob_went_from_faithful_to_vivid_when_it_was_measured(report):
    rows = [row["means"] for row in read_results(report) if row["timestep"] in range(1, 701)]
    assert len(rows) == 6
    for before, after in pairwise(rows):
        assert after["psnr_y"] < before["psnr_y"]
        assert after["detail"] > before["detail"]
    assert rows[-1]["psnr_y"] < rows[0]["psnr_y"] - 0.2


def test_the_timestep_changes_the_picture(pipe):
    with Image.open(EXAMPLE) as image:
        crop = image.crop((100, 100, 164, 164))
    faithful, vivid = (np.asarray(pipe(crop, timestep=t), dtype=float) for t in (1, 999))
    assert np.abs(faithful - vivid).mean() > 0.5


def test_it_knows_the_empty_prompt_only(pipe):
    with pytest.raises(ValueError, match="got 'a lighthouse'"):
        pipe(Image.open(EXAMPLE), prompt="a lighthouse")
