"""Diffusers' ways to keep weights off the device; without an accelerator, on the CPU.

accelerate's own hook of `enable_sequential_cpu_offload` cannot bring weights to the CPU (it loses
their class), so that here a hook with its interface does.
"""

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from tadsr.onestep import TileSpec


@pytest.fixture
def pipe(own_pipeline):
    # Networks that come and go are run by their own modules, so that the results are equal.
    own_pipeline.set_engine("eager")
    return own_pipeline


def photo():
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


class OnlyWhileRunning(ModelHook):
    """Keep a layer's own weights on the meta device, except while it runs."""

    execution_device = torch.device("cpu")

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.kept: dict[str, nn.Parameter | None] = dict(module._parameters)
        self.post_forward(module, None)
        return module

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        module._parameters.update(self.kept)
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        for name, kept in self.kept.items():
            if kept is not None:
                module._parameters[name] = nn.Parameter(kept.to("meta"), False)
        return output


class OnlyDuringACall(OnlyWhileRunning):
    """Keep a whole network on the meta device until its hook is called, as beside a GPU."""

    def init_hook(self, network: nn.Module) -> nn.Module:
        self.parts = [(layer, OnlyWhileRunning()) for layer in network.modules()]
        for layer, hook in self.parts:
            hook.init_hook(layer)
        return network

    def pre_forward(self, network: nn.Module, *args, **kwargs):
        for layer, hook in self.parts:
            hook.pre_forward(layer)
        return args, kwargs

    def post_forward(self, network: nn.Module, output):
        return output


def by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(model, "_hf_hook") for model in (pipe.vae, pipe.unet, pipe.text_encoder))


def by_its_own_hook(pipe):
    for network in (pipe.vae, pipe.unet):
        add_hook_to_module(network, OnlyDuringACall())


def by_layer(pipe):
    for model in (pipe.vae, pipe.unet, pipe.text_encoder):
        for layer in list(model.modules()):
            add_hook_to_module(layer, OnlyWhileRunning())
        assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("tiling", [None, TileSpec()], ids=["whole", "bands"])
@pytest.mark.parametrize("offload", [by_model, by_its_own_hook, by_layer])
def test_weights_come_and_go(pipe, offload, tiling):
    expected = pipe(photo(), tiling=tiling, process_size=0)
    pipe.set_engine("auto")
    offload(pipe)
    for _ in range(2):  # they go back after a call
        np.testing.assert_array_equal(pipe(photo(), tiling=tiling, process_size=0), expected)
