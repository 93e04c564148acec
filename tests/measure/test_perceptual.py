"""Perceptual distances."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tadsr.errors import TADSRError
from tadsr.measure.perceptual import _FIRE, SqueezeNetDistance, make_perceptual


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
