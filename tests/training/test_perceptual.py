"""Perceptual and adversarial losses, and prompts embedded once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tadsr.checkpoints import load_checkpoint
from tadsr.errors import TADSRError
from tadsr.training.adversarial import PatchDiscriminator, discriminator_loss, generator_loss
from tadsr.training.perceptual import _FIRE, SqueezeNetDistance, make_perceptual
from tadsr.training.prompts import PromptEncoder


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    torch.manual_seed(0)
    tensors = {"conv1.weight": torch.randn(96, 3, 7, 7) * 0.01, "conv1.bias": torch.zeros(96)}
    for name, (width, squeeze, expand) in _FIRE.items():
        for part, shape in (
            ("squeeze", (squeeze, width, 1, 1)),
            ("expand1x1", (expand, squeeze, 1, 1)),
            ("expand3x3", (expand, squeeze, 3, 3)),
        ):
            tensors[f"{name}.{part}.weight"] = torch.randn(shape) * 0.1
            tensors[f"{name}.{part}.bias"] = torch.zeros(shape[0])
    path = tmp_path_factory.mktemp("squeezenet") / "net.safetensors"
    save_file(tensors, path)
    return path


def test_squeezenet_distance(squeezenet, tmp_path):
    distance = make_perceptual(f"squeezenet:{squeezenet}")
    image = torch.rand(2, 3, 48, 64) * 2 - 1
    noisy = (image + 0.3 * torch.randn_like(image)).requires_grad_()
    assert distance(image, image).tolist() == [0, 0]
    values = distance(noisy, image)
    assert values.shape == (2,)
    assert (values > 0).all()
    values.sum().backward()
    assert noisy.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    tensors = load_file(squeezenet)
    del tensors["fire5.squeeze.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(TADSRError, match=r"fire5\.squeeze\.bias"):
        SqueezeNetDistance(tmp_path / "less.safetensors")


@pytest.mark.parametrize(("name", "library"), [("lpips", "lpips"), ("dists", "piq")])
def test_a_missing_library_is_one_clear_error(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(TADSRError, match=rf"library {library}.*tadsr\[train\].*perceptual: none"):
        make_perceptual(name)


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match=r"'lpips', 'dists', 'squeezenet:FILE' or 'none'"):
        make_perceptual("vgg")


def test_the_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)

    def draw():
        noise = torch.randn(4, 3, 32, 32)
        return noise, torch.nn.functional.avg_pool2d(noise, 3, 1, 1)

    for _ in range(40):
        real, fake = draw()
        loss = discriminator_loss(discriminator(real), discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = draw()
    assert discriminator(real).shape == (4, 1, 4, 4)
    assert generator_loss(discriminator(fake)).mean() > generator_loss(discriminator(real)).mean()
    assert loss < 0.9


def test_hinge_losses_stop_where_the_scores_are_clear():
    real, fake = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -2.0)
    assert discriminator_loss(real, fake).tolist() == [0, 0]
    assert discriminator_loss(fake, real).tolist() == [3, 3]
    assert generator_loss(real).tolist() == [-2, -2]


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


def test_the_degradation_alone_loads_no_diffusers():
    code = (
        "import sys; from tadsr.training.degradation import apply_degradation;"
        "sys.exit(any(m.split('.')[0] in ('diffusers', 'transformers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_of_training():
    import tadsr.training

    assert set(tadsr.training.__all__) == {
        "AutoencoderConfig", "DataConfig", "DistillationConfig", "OptimizerConfig",
        "TeacherConfig", "TimestepRamp", "Trainer", "TrainingConfig", "ValidationConfig",
        "load_recipe",
    }  # fmt: skip
    for name in tadsr.training.__all__:
        assert getattr(tadsr.training, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tadsr.training.Nothing
