"""Perceptual distances."""

import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tadsr.errors import TADSRError
from tadsr.measure.perceptual import SqueezeNetDistance, make_perceptual


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
    with pytest.raises(ValueError, match=r"'lpips:FILE', 'dists', 'squeezenet:FILE' or 'none'"):
        make_perceptual("vgg")


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """Random weights where lpips and piq look for theirs."""
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    folder = tmp_path_factory.mktemp("torch")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    vgg16 = torchvision.models.vgg16(weights=None)
    torch.save(vgg16.state_dict(), folder / "checkpoints" / "vgg16-397923af.pth")
    widths = 3 + 64 + 128 + 256 + 512 + 512
    weights = torch.rand(2, 1, widths, 1, 1)
    weights = dict(zip(("alpha", "beta"), weights / weights.sum(), strict=True))  # as DISTS' own
    torch.save(weights, folder / "checkpoints" / "dists_weights.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lpips", "lpips:FILE", "dists"])
def test_the_libraries_distances_have_the_right_values_and_gradients(name, torch_home, monkeypatch):
    library = pytest.importorskip("piq" if name == "dists" else "lpips")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(torch_home))
    distance = make_perceptual(
        name.replace("FILE", str(torch_home / "checkpoints" / "vgg16-397923af.pth"))
    )
    assert not any(p.requires_grad for p in distance.parameters())
    assert not any(m.training for m in distance.modules())
    torch.manual_seed(1)
    target = torch.rand(2, 3, 64, 64) * 1.6 - 0.8
    pred = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    torch.testing.assert_close(distance(target, target), torch.zeros(2), atol=1e-5, rtol=0)
    values = distance(pred, target)
    assert values.shape == (2,)
    assert (values > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "dists":
            own = library.DISTS(reduction="none")(pred / 2 + 0.5, target / 2 + 0.5)
        else:
            own = library.LPIPS(net="vgg", verbose=False)(pred, target).flatten()
    torch.testing.assert_close(values, own, atol=1e-4, rtol=1e-3)
    # The gradient is the slope along itself, and touches no other item.
    (gradient,) = torch.autograd.grad(values[0], pred)
    assert gradient[1].abs().max() == 0
    step = 2e-2 * gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = distance(pred + step, target)[0], distance(pred - step, target)[0]
    slope = (ahead - behind) / (2 * step.norm())
    torch.testing.assert_close(slope, gradient.norm(), rtol=0.05, atol=0)


@pytest.mark.slow
def test_files_that_cannot_be_downloaded_are_named(torch_home, tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(TADSRError, match=r"copy https://.*vgg16-397923af\.pth into .*lpips:FILE"):
        make_perceptual("lpips")
    with pytest.raises(TADSRError, match=r"must be torchvision's VGG16"):
        make_perceptual(f"lpips:{torch_home / 'checkpoints' / 'dists_weights.pt'}")
