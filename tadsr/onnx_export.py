"""Write a model's three stages as ONNX graphs that take any size, for runtimes without torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.export import Dim

from tadsr.checkpoints.save import write_atomically
from tadsr.errors import TADSRError, install
from tadsr.networks.adapters import has_adapters
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep.support import any_size
from tadsr.pipeline import TADSRPipeline
from tadsr.schedule import latents_of, residual_to_x0

ONNX_FORMAT = "tadsr-onnx-1"
"""The `format` in the description beside the graphs."""
DESCRIPTION_FILE = "onnx.json"
EMPTY_PROMPT_FILE = "empty_prompt.npy"

_LIBRARIES = ("onnx", "onnxscript")
# Odd and unequal, so that no size of the example passes for a constant of the network, and such
# that no side is 1 even after the UNet's down-samplers, which torch.export would take for fixed.
_EXAMPLE_BATCH, _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH = 2, 21, 27
# torch.export asks for one branch of every condition in the networks' code, such as whether a side
# is 1; beyond these bounds others are taken, but they compute the same, and no graph keeps a bound.
_MIN_TRACED_SIDE, _MAX_TRACED_SIDE = 17, 2**14
_MAX_TRACED_BATCH = 63
# Above this protobuf cannot hold a graph, so weights lie in a file beside it.
_MAX_GRAPH_BYTES = 1_500_000_000


class _Encoder(nn.Module):
    def __init__(self, vae: TimeAwareAutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, lq: Tensor, timestep: Tensor) -> Tensor:
        return latents_of(self.quant_conv(self.encoder(lq, timestep)), self.scaling_factor)


class _OneStep(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("alphas_cumprod", alphas_cumprod)

    def forward(self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        residual = self.unet(latents, timestep, prompt_embeds, return_dict=False)[0]
        return residual_to_x0(latents, residual, timestep, self.alphas_cumprod)


class _Decoder(nn.Module):
    def __init__(self, vae: TimeAwareAutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor)).clamp(-1, 1)


def export_onnx(pipe: TADSRPipeline, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write encoder.onnx, unet.onnx and decoder.onnx; the folder appears whole or not at all.

    Batch, height and width are free. Beside the graphs lie onnx.json, which describes their inputs
    and outputs, and empty_prompt.npy, the embedding of the empty prompt, (1, L, D).

    Args:
        pipe: The model, in float32, its adapters merged.
        folder: Where to; it must not exist, be empty, or be replaced by `overwrite`.
        overwrite: Replace a folder that exists.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not in float32, or has its adapters apart.
        TADSRError: A library is not installed, or a stage cannot be exported.
        CheckpointError: The folder is not empty or cannot be written.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise TADSRError(
            f"the export needs {' and '.join(missing)}; install them: {install('onnx')}"
        )
    dtypes = {pipe.vae.dtype, pipe.unet.dtype}
    if dtypes != {torch.float32}:
        raise ValueError(f"the model must be in float32, got {dtypes}; load it without torch_dtype")
    if has_adapters(pipe.unet):
        raise ValueError("the model must have its adapters merged; call pipe.merge_adapters()")
    empty_prompt = pipe.encode_prompt([""])
    with write_atomically(Path(folder), overwrite) as filling:
        with torch.no_grad(), any_size(pipe.unet):
            for name, (network, inputs, free, output) in _stages(pipe, empty_prompt).items():
                _export(network.eval(), inputs, free, output, filling / f"{name}.onnx")
        np.save(filling / EMPTY_PROMPT_FILE, empty_prompt.float().cpu().numpy())
        text = json.dumps(_describe(pipe, empty_prompt), indent=2)
        (filling / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
    return Path(folder)


def _stages(pipe: TADSRPipeline, empty_prompt: Tensor) -> dict[str, tuple[Any, ...]]:
    """Return each stage with example inputs by name, their free dimensions, and its output."""
    factor, channels = pipe.vae.downscale_factor, pipe.vae.config.latent_channels
    count, height, width = _EXAMPLE_BATCH, _EXAMPLE_HEIGHT, _EXAMPLE_WIDTH
    device = pipe.unet.device
    lq = torch.zeros(count, 3, factor * height, factor * width, device=device)
    latents = torch.zeros(count, channels, height, width, device=device)
    timestep = torch.arange(count, device=device)
    prompts = empty_prompt.to(device).repeat(count, 1, 1)
    batch = Dim("batch", min=1, max=_MAX_TRACED_BATCH)
    rows, columns = (
        Dim(name, min=_MIN_TRACED_SIDE, max=_MAX_TRACED_SIDE) for name in ("height", "width")
    )
    one = {0: batch}
    image, small = (
        {0: batch, 2: factor * rows, 3: factor * columns},
        {0: batch, 2: rows, 3: columns},
    )
    return {
        "encoder": (
            _Encoder(pipe.vae),
            {"lq": lq, "timestep": timestep},
            {"lq": image, "timestep": one},
            "latents",
        ),
        "unet": (
            _OneStep(pipe.unet, pipe.alphas_cumprod.to(device)),
            {"latents": latents, "timestep": timestep, "prompt_embeds": prompts},
            {"latents": small, "timestep": one, "prompt_embeds": one},
            "pred_x0",
        ),
        "decoder": (_Decoder(pipe.vae), {"latents": latents}, {"latents": small}, "image"),
    }


def _export(
    network: nn.Module,
    inputs: dict[str, Tensor],
    free: dict[str, dict[int, Any]],
    output: str,
    path: Path,
) -> None:
    num_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    try:
        # Left to itself, torch.onnx traces the UNet twice, of which the slower way succeeds.
        program = torch.export.export(
            network, tuple(inputs.values()), dynamic_shapes=tuple(free.values()), strict=False
        )
        torch.onnx.export(
            program,
            f=str(path),
            input_names=list(inputs),
            output_names=[output],
            dynamo=True,
            external_data=num_bytes > _MAX_GRAPH_BYTES,
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:
        cause = error.__cause__ or error  # torch.onnx's own message says what to report to whom
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        raise TADSRError(f"{path.stem} cannot be exported to ONNX: {reason}") from error


def _describe(pipe: TADSRPipeline, empty_prompt: Tensor) -> dict[str, Any]:
    factor, channels = pipe.vae.downscale_factor, pipe.vae.config.latent_channels
    _, num_tokens, width = empty_prompt.shape
    pixels, latents = ["B", 3, f"{factor}*h", f"{factor}*w"], ["B", channels, "h", "w"]
    timestep, prompts = ["B"], ["B", num_tokens, width]
    return {
        "format": ONNX_FORMAT,
        "size_multiple": factor,
        "num_timesteps": len(pipe.alphas_cumprod),
        "image_range": [-1, 1],
        "empty_prompt": EMPTY_PROMPT_FILE,
        "stages": {
            "encoder.onnx": {
                "inputs": {"lq": pixels, "timestep": timestep},
                "outputs": {"latents": latents},
            },
            "unet.onnx": {
                "inputs": {"latents": latents, "timestep": timestep, "prompt_embeds": prompts},
                "outputs": {"pred_x0": latents},
            },
            "decoder.onnx": {"inputs": {"latents": latents}, "outputs": {"image": pixels}},
        },
    }
