"""What an image costs on a GPU that is not there, at the published model's full size."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image

from tadsr import TADSRPipeline, TimeAwareAutoencoderKL
from tadsr.errors import TADSRWarning
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.onestep.banded_layers import Bands
from tadsr.onestep.storage import BandStorage

from .conftest import Machine

MACHINE = Machine(has_values=False)
MAX_WAITS = 1
"""Times that the host waits for the device."""
MAX_LAUNCHES = 684
"""Kernels of an image, in a graph or not."""
MAX_WHOLE_LAUNCHES = 4000
"""Of 2048 × 2048 px as a whole, whose widest attention is in chunks."""
MAX_VARIANTS = 57
"""Triton's compilations for the first image."""
MAX_MORE_VARIANTS = 8
"""And for the first image of another size; for a third there are none."""
NUM_BANDS = 4
MAX_BAND_LAUNCHES = 102
"""Of a ResNet block in four bands; 216 before bands had kernels."""
MAX_BAND_COPIES = 22
"""What they read and write, in activations of the whole; 62 before."""
WHOLE_BYTES = 24 * 2**30
"""Memory of a GPU that computes 2048 × 2048 px as a whole: what it is now; 8 GiB would do."""


@pytest.fixture(scope="module")
def full(official_layout) -> Callable[[], TADSRPipeline]:
    """Build the published model on the device that is there now, without values."""
    configs = official_layout["configs"]

    def build(device: str = "cuda") -> TADSRPipeline:
        with torch.device("meta"):
            vae = TimeAwareAutoencoderKL.from_config(configs["time_vae"])
            unet = UNet2DConditionModel.from_config(configs["unet"])
            prompts = PromptEmbeddings(("",), 77, 1024)
        for network in (vae, unet, prompts):
            network.half().to_empty(device=device).eval().requires_grad_(False)
        scheduler = DDPMScheduler.from_config(configs["scheduler"])
        return TADSRPipeline(vae, unet, scheduler, prompt_embeddings=prompts)

    return build


def photo(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_images_of_512_px_in_steady_state(pretend, full):
    with pretend(MACHINE) as device, warnings.catch_warnings():
        warnings.simplefilter("error", TADSRWarning)
        pipe = full()
        pipe.set_engine("fused")  # what "auto" takes once it has compared it with plain modules
        for _ in range(2):
            device.forget()
            pipe(photo(128, 128))
        assert len(device.waits) <= MAX_WAITS, device.waits
        assert sum(device.launches.values()) <= MAX_LAUNCHES, device.launches
        assert device.hidden_copies == []
        assert len(device.variants) <= MAX_VARIANTS
        first = set(device.variants)
        pipe(photo(180, 270))
        assert len(device.variants - first) <= MAX_MORE_VARIANTS
        second = set(device.variants)
        pipe(photo(256, 256))
        assert set(device.variants) == second


@pytest.mark.slow
def test_an_image_of_2048_px_on_no_large_gpu(pretend, full):
    machine = replace(MACHINE, total_bytes=WHOLE_BYTES)
    with pretend(machine) as device, warnings.catch_warnings():
        warnings.simplefilter("error", TADSRWarning)
        pipe = full()
        pipe(photo(128, 128))  # is compared with plain modules
        device.forget()
        pipe(photo(512, 512))
        # Bands launch seven times as many.
        assert sum(device.launches.values()) <= MAX_WHOLE_LAUNCHES


def test_a_block_in_bands(pretend):
    block = ResnetBlock2D(in_channels=128, out_channels=128, temb_channels=None)
    shape = (1, 128, 64, 2048)
    with pretend(MACHINE) as device, torch.no_grad():
        block.half().to("cuda", memory_format=torch.channels_last)
        storage = BandStorage(torch.device("cuda:0"), uses_kernels=True)
        x = storage.allocate(shape, torch.float16)
        x.begin(with_statistics=True)
        rows = torch.empty(shape, dtype=torch.float16, device="cuda")
        x.write(0, rows.contiguous(memory_format=torch.channels_last))
        device.forget()
        Bands(storage, 3 * rows.nbytes // NUM_BANDS).resnet(block, x, None, consume=True)
        assert sum(device.launches.values()) <= MAX_BAND_LAUNCHES, device.launches
        assert device.moved_bytes <= MAX_BAND_COPIES * rows.nbytes
        assert device.waits + device.pageable + device.hidden_copies == []
