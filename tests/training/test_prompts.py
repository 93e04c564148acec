"""Prompts embedded once, and the public names of training."""

from __future__ import annotations

import pytest
import torch

import tadsr.training
from tadsr.checkpoints import load_checkpoint
from tadsr.training.prompts import PromptEncoder


def test_prompts_are_embedded_once_and_kept_on_disk(official, tmp_path, golden_pipeline):
    checkpoint = load_checkpoint(official)
    encoder = PromptEncoder(checkpoint, tmp_path)
    texts = ["the cat", "a garden", "the cat"]
    expect = golden_pipeline.encode_prompt(texts)
    torch.testing.assert_close(encoder(texts), expect)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2

    # A second run reads them: with broken weights it could not compute the same.
    again = PromptEncoder(checkpoint, tmp_path)
    with torch.no_grad():
        for parameter in checkpoint.text_encoder.parameters():
            parameter.zero_()
    torch.testing.assert_close(again(texts), expect)
    # Another text encoder does not take them for its own.
    other = PromptEncoder(checkpoint, tmp_path)
    assert not torch.allclose(other(texts), expect)
    # Damaged files are computed anew.
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"broken")
    assert torch.isfinite(PromptEncoder(checkpoint, tmp_path)(texts)).all()


def test_the_public_names_of_training():
    assert set(tadsr.training.__all__) == {
        "AutoencoderConfig", "DataConfig", "DistillationConfig", "OptimizerConfig",
        "TeacherConfig", "TimestepRamp", "Trainer", "TrainingConfig", "ValidationConfig",
        "load_recipe",
    }  # fmt: skip
    for name in tadsr.training.__all__:
        assert getattr(tadsr.training, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tadsr.training.Nothing
