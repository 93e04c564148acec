"""Shared fixtures: the small model in the published layout and its recorded figures."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

# A first call into torch can take longer than hypothesis' 200 ms, which says nothing about a law.
hypothesis.settings.register_profile("tadsr", deadline=None)
hypothesis.settings.load_profile("tadsr")

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_cases() -> list[tuple[int, int, int, str]]:
    return [tuple(case) for case in json.loads((GOLDEN / "cases.json").read_text())]


@pytest.fixture(scope="session")
def official_layout() -> dict:
    return json.loads((DATA / "official_layout.json").read_text())


@pytest.fixture(scope="session")
def golden_pipeline():
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained(GOLDEN / "base", adapter=GOLDEN / "tadsr.pkl")


@pytest.fixture(scope="session")
def unmerged_pipeline():
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained(
        GOLDEN / "base", adapter=GOLDEN / "tadsr.pkl", merge_adapters=False
    )
