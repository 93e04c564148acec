import pytest
import torch
from safetensors.torch import load_file

from tadsr.degradation.apply import (
    gaussian_kernel,
    generalized_gaussian_kernel,
    plateau_kernel,
    sinc_kernel,
)


@pytest.fixture(scope="module")
def figures(data_dir):
    return load_file(data_dir / "degradation_kernels.safetensors")


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize(
    "kind",
    [
        "iso",
        "aniso",
        "generalized_iso",
        "generalized_aniso",
        "plateau_iso",
        "plateau_aniso",
        "sinc",
    ],
)
def test_kernels_match_the_published_figures(case, kind, figures):
    size, sigma_x, sigma_y, theta, beta_g, beta_p, cutoff = figures[
        f"kernel.{case}.params"
    ].tolist()
    size = int(size)
    if kind.endswith("_iso") or kind == "iso":
        sigma_y, theta = sigma_x, 0.0
    if kind == "sinc":
        kernel = sinc_kernel(size, cutoff)
    elif kind.startswith("generalized"):
        kernel = generalized_gaussian_kernel(size, sigma_x, sigma_y, theta, beta_g)
    elif kind.startswith("plateau"):
        kernel = plateau_kernel(size, sigma_x, sigma_y, theta, beta_p)
    else:
        kernel = gaussian_kernel(size, sigma_x, sigma_y, theta)
    expect = figures[f"kernel.{case}.{kind}"].double()
    torch.testing.assert_close(kernel, expect, atol=1e-6, rtol=0)
    assert kernel.sum().item() == pytest.approx(1)


def test_a_shape_of_one_is_the_gaussian():
    shape = (11, 1.3, 2.7, 0.4)
    torch.testing.assert_close(generalized_gaussian_kernel(*shape, 1.0), gaussian_kernel(*shape))


def test_kernels_are_symmetric_about_their_centre():
    for kernel in (gaussian_kernel(9, 1, 3, 0.7), sinc_kernel(15, 1.2)):
        torch.testing.assert_close(kernel, kernel.flip(0, 1))
