"""The three networks through OpenVINO, as graphs that are made once for each model's weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadsr.errors import TADSRError, TADSRWarning, install
from tadsr.locks import Lock
from tadsr.machine import CACHE_VARIABLE, cache_folder, machine_key, recall, remember
from tadsr.onestep.stages import Checked, EagerStages
from tadsr.onestep.support import any_size
from tadsr.prompts import Prompts
from tadsr.schedule import latents_of, residual_to_x0
from tadsr.version import __version__

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

MIN_PSNR = 45.0
"""In dB, between a picture in float32 and one in bfloat16, where OpenVINO rounds whatever passes
from layer to layer; below it its graphs compute in float32."""
_PROBED_PX, _PROBED_TIMESTEP = 128, 500
_EXAMPLE_SIDE = 17
"""Latents that are traced; odd, so that no size passes for a constant of the network."""
_core_lock = Lock()


def has_openvino() -> bool:
    """Tell whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def check_openvino() -> None:
    """Raise TADSRError unless OpenVINO is installed."""
    if not has_openvino():
        raise TADSRError(f'engine="openvino" needs OpenVINO; install it: {install("openvino")}')


class _Encoder(nn.Module):
    def __init__(self, vae: TimeAwareAutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, lq: Tensor, timesteps: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(lq, timesteps))


class _UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        return self.unet(latents, timesteps, prompt_embeds, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae: TimeAwareAutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


class _Stage(NamedTuple):
    network: nn.Module
    example: tuple[Tensor, ...]


class OpenVinoStages(EagerStages):
    """The modules' graphs, in float32, or in bfloat16 where the picture stays nearly the same.

    Graphs lie in the user's cache folder, by the weights' hash; a changed model makes its own.

    Args:
        multiplied: As in `EnginePlan`.

    Raises:
        TADSRError: OpenVINO is missing, the weights are not float32 on the CPU, or OpenVINO cannot
            convert a network.
    """

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        multiplied: torch.dtype | None = None,
    ) -> None:
        super().__init__(vae, unet, alphas_cumprod)
        check_openvino()
        found = {(tensor.device.type, tensor.dtype) for tensor in (*_floats(vae), *_floats(unet))}
        if found != {("cpu", torch.float32)}:
            kinds = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in found))
            raise TADSRError(
                f'engine="openvino" needs weights in torch.float32 on the CPU, got {kinds}; load '
                "the model without torch_dtype, or choose another engine"
            )
        folder = folder_of(vae, unet)
        key = machine_key(torch.device("cpu"), torch.bfloat16, folder.name)
        is_rounded = multiplied == torch.bfloat16 and recall("openvino", key) is not False
        if is_rounded:
            self._graphs = _graphs(vae, unet, folder, "bf16")
            if recall("openvino", key) is None:
                is_rounded = self._psnr() >= MIN_PSNR
                remember("openvino", key, is_rounded)
        if not is_rounded:
            self._graphs = _graphs(vae, unet, folder, "f32")

    def encode(self, lq: Tensor, timesteps: Sequence[int]) -> Checked:
        """Encode LQ images (B, 3, H, W) in [-1, 1] to the posterior's moments."""
        return _checked(self._run("encoder", lq, torch.tensor(timesteps)))

    def predict_x0(self, latents: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""
        numbers = torch.tensor(timesteps).expand(latents.shape[0])
        embeds = prompts.embeds.expand(latents.shape[0], -1, -1)
        residual = self._run("unet", latents, numbers, embeds)
        return _checked(residual_to_x0(latents, residual, numbers, self.alphas_cumprod))

    def decode(self, pred_x0: Tensor) -> Checked:
        """Decode scaled latents to images (B, 3, H, W), not clamped."""
        return _checked(self._run("decoder", pred_x0 / self.vae.config.scaling_factor))

    @torch.no_grad()
    def _psnr(self) -> float:
        """Return how near to the modules' picture the graphs' is, in dB."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 3, 9, 9, generator=generator) * 2 - 1
        lq = F.interpolate(coarse, size=_PROBED_PX, mode="bilinear")
        width = self.unet.config.cross_attention_dim
        prompts = Prompts(torch.randn(1, 2, width, generator=generator))

        def picture(stages: EagerStages) -> Tensor:
            moments = stages.encode(lq, [_PROBED_TIMESTEP]).values
            latents = latents_of(moments, self.vae.config.scaling_factor)
            pred_x0 = stages.predict_x0(latents, [_PROBED_TIMESTEP], prompts).values
            return stages.decode(pred_x0).values.clamp(-1, 1)

        plain, found = picture(self.of(self.vae, self.unet)), picture(self)
        return (10 * torch.log10(4 / (plain - found).square().mean())).item()

    def _run(self, name: str, *inputs: Tensor) -> Tensor:
        arrays = [
            (x.float() if x.is_floating_point() else x).detach().contiguous().numpy()
            for x in inputs
        ]
        return torch.from_numpy(self._graphs[name](arrays, share_inputs=True)[0])


def _graphs(
    vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, folder: Path, hint: str
) -> dict[str, Callable[..., Any]]:
    """Return a model's graphs, which are made where they are not there yet, or damaged."""
    stages, was_there = _stages(vae, unet), folder.is_dir()
    if was_there:
        with suppress(RuntimeError):
            return _compile(stages, folder, hint)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        filling = Path(tempfile.mkdtemp(prefix=".tadsr-", dir=folder.parent))
    except OSError as error:
        warnings.warn(
            f"OpenVINO's graphs cannot be kept in {folder.parent}: {error.strerror}; they are made "
            f"anew each time, unless {CACHE_VARIABLE} names another folder",
            TADSRWarning,
            stacklevel=2,
        )
        filling = Path(tempfile.mkdtemp(prefix="tadsr-"))
    try:
        _write_graphs(stages, unet, filling)
        if was_there:
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process was faster, or the folder cannot be written
            os.rename(filling, folder)
        return _compile(stages, filling if filling.is_dir() else folder, hint)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


@functools.cache
def _core() -> Any:
    """Load OpenVINO, once and for as long as the process lives.

    It has signals of the thread that loads it handled on a stack of its own, and unmaps that when
    it is unloaded. Unloaded by another thread, it leaves the first one without: the next signal
    with a handler, such as Ctrl-C or the end of a child, would be a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _compile(stages: Iterable[str], folder: Path, hint: str) -> dict[str, Callable[..., Any]]:
    with _core_lock:
        core = _core()
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
    }
    return {name: core.compile_model(folder / f"{name}.xml", "CPU", config) for name in stages}


@torch.no_grad()
def _write_graphs(stages: dict[str, _Stage], unet: nn.Module, folder: Path) -> None:
    # Not openvino.convert_model, which reports its use to OpenVINO's makers.
    from openvino import save_model
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    with any_size(unet), warnings.catch_warnings():
        # Of branches that a trace takes for constant: they compute the same at every size.
        warnings.simplefilter("ignore")
        for name, (network, example) in stages.items():
            try:
                # Unchecked, or each is traced and run once more.
                traced = TorchScriptPythonDecoder(
                    network.eval(), example_input=example, trace_kwargs={"check_trace": False}
                )
                graph = frontend.convert(frontend.load(traced))
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise TADSRError(f"OpenVINO cannot convert the {name}: {reason}") from error
            save_model(graph, folder / f"{name}.xml", compress_to_fp16=False)


def _stages(vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> dict[str, _Stage]:
    side, channels = _EXAMPLE_SIDE, vae.config.latent_channels
    pixels = side * vae.downscale_factor
    timesteps, latents = torch.tensor([1, 2]), torch.zeros(2, channels, side, side)
    embeds = torch.zeros(2, 3, unet.config.cross_attention_dim)
    return {
        "encoder": _Stage(_Encoder(vae), (torch.zeros(2, 3, pixels, pixels), timesteps)),
        "unet": _Stage(_UNet(unet), (latents, timesteps, embeds)),
        "decoder": _Stage(_Decoder(vae), (latents,)),
    }


def folder_of(vae: nn.Module, unet: nn.Module) -> Path:
    """Return a folder by the hash of the weights and of whatever else graphs are made of."""
    digest = hashlib.blake2b(digest_size=20)
    libraries = ("openvino", "torch", "diffusers")
    digest.update(repr([__version__, *map(importlib.metadata.version, libraries)]).encode())
    for network in (vae, unet):
        digest.update(repr(network).encode())
        # Without diffusers' own notes, which hold a set in any order and where it was loaded from.
        config = {k: v for k, v in dict(network.config).items() if not k.startswith("_")}
        digest.update(repr(sorted(config.items(), key=str)).encode())
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy())
    return cache_folder() / "openvino" / digest.hexdigest()


def _checked(values: Tensor) -> Checked:
    """Measure a result by one thread: torch's would wake up between OpenVINO's."""
    array = values.numpy()
    return Checked(values, torch.tensor(np.maximum(array.max(), -array.min())))


def _floats(network: nn.Module) -> Iterator[Tensor]:
    return (t for t in network.state_dict().values() if t.is_floating_point())
