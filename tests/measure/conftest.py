import pytest
import torch
from safetensors.torch import save_file

from tadsr.measure.perceptual import _FIRE


@pytest.fixture(scope="session")
def squeezenet(tmp_path_factory):
    """The file of a SqueezeNet at random weights."""
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
