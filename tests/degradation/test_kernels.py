import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tadsr.degradation.apply import make_kernel
from tadsr.degradation.presets import KERNEL_KINDS
from tadsr.degradation.sample import KernelParams


@pytest.fixture(scope="module")
def figures(data_dir):
    return load_file(data_dir / "degradation_kernels.safetensors")


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("kind", [*KERNEL_KINDS, "sinc"])
def test_kernels_match_the_published_figures(case, kind, figures):
    size, sigma_x, sigma_y, theta, beta_g, beta_p, cutoff = figures[
        f"kernel.{case}.params"
    ].tolist()
    if not kind.endswith("aniso"):
        sigma_y, theta = sigma_x, 0.0
    beta = beta_p if kind.startswith("plateau") else beta_g
    kernel = make_kernel(KernelParams(kind, int(size), sigma_x, sigma_y, theta, beta, cutoff))
    torch.testing.assert_close(kernel, figures[f"kernel.{case}.{kind}"].float(), atol=1e-6, rtol=0)
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))  # symmetric about its centre


def test_a_shape_of_one_is_the_gaussian():
    shape = KernelParams("generalized_aniso", 11, 1.3, 2.7, 0.4, 1.0)
    assert make_kernel(shape).equal(make_kernel(dataclasses.replace(shape, kind="aniso")))
