"""What `tadsr doctor` finds beside a GPU, and that its checks of kernels are right themselves."""

import pytest
import torch

from tadsr.doctor import KERNELS, examine
from tadsr.doctor.child import check

from .conftest import Machine

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_checked(name, pretend):
    with pretend() as device, torch.no_grad():
        found = check(f"kernel {name}", "tadsr-tiny", CUDA, torch.float16)
        assert [launch for launch in device.launches if launch.startswith("triton")]
    assert found.is_right is True, found.detail


def test_a_gpu_is_described(pretend):
    with pretend():
        report = examine("tadsr-tiny", CUDA, torch.float16)
    assert report.device["capability"] == "9.0"
    assert report.engine == "fused"
    assert report.kernel_reasons == ()
    with (
        pretend(Machine(triton_failure=AssertionError("libcuda"))),
        pytest.warns(UserWarning, match="do not run"),
    ):
        report = examine("tadsr-tiny", CUDA, torch.float16)
    assert "AssertionError: libcuda" in report.kernel_reasons[0]
