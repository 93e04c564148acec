"""The time-aware autoencoder: Stable Diffusion's VAE whose encoder knows the timestep."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import (
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
)
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from tadsr.networks.walk import encode_unmixed

MIN_TIME_CHANNELS = 128
"""Narrowest sinusoidal embedding of the timestep, whatever the encoder's width."""


class TimeAwareEncoder(Encoder):
    """Diffusers' VAE encoder with a timestep's scale and shift in every ResNet block.

    Only the second GroupNorm of a block is modulated: h = GN2(h)·(1 + scale) + shift.

    Source: TADSR (arXiv 2508.16557), time-aware VAE encoder.
    """

    def __init__(self, *, block_out_channels: tuple[int, ...], **encoder_kwargs) -> None:
        super().__init__(block_out_channels=tuple(block_out_channels), **encoder_kwargs)
        time_channels = max(MIN_TIME_CHANNELS, block_out_channels[0])
        embed_channels = 2 * time_channels
        self.time_proj = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, embed_channels)
        for resnet in self.time_conditioned_resnets():
            resnet.time_embedding_norm = "scale_shift"
            resnet.time_emb_proj = nn.Linear(embed_channels, 2 * resnet.out_channels)

    def time_conditioned_resnets(self) -> list[ResnetBlock2D]:
        """Return the blocks that receive the timestep, in forward order."""
        return [m for m in self.modules() if isinstance(m, ResnetBlock2D)]

    def embed_timesteps(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed timesteps (B,) as the vector (B, E) that every block's projection reads."""
        # The sinusoid is computed in float32: 999 has no exact neighbourhood in half precision.
        return self.time_embedding(self.time_proj(timesteps).to(dtype))

    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Encode images to the posterior's moments.

        Args:
            sample: Images, (B, 3, H, W), in [-1, 1].
            timesteps: One timestep per image, (B,), int64.

        Returns:
            Mean and log-variance before `quant_conv`, (B, 2·latent_channels, H/f, W/f).
        """
        temb = self.embed_timesteps(timesteps, sample.dtype)
        return encode_unmixed(_PlainLayers(self, temb), self, sample)


class _PlainLayers:
    """Runs an encoder's layers as diffusers' modules are, for `walk`."""

    def __init__(self, encoder: TimeAwareEncoder, temb: Tensor) -> None:
        self._encoder, self._temb = encoder, temb

    def start(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv(x)

    def resnet(self, block: ResnetBlock2D, h: Tensor) -> Tensor:
        return self._run(block, h, self._temb)

    def attend(self, layer: Attention, h: Tensor) -> Tensor:
        return self._run(layer, h)

    def downsample(self, layer: Downsample2D, h: Tensor) -> Tensor:
        return layer(h)

    def end(self, norm: nn.GroupNorm, conv: nn.Conv2d, h: Tensor) -> Tensor:
        return conv(self._encoder.conv_act(norm(h)))

    def _run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """Run a layer, its activations recomputed in the backward pass where that is asked for."""
        if torch.is_grad_enabled() and self._encoder.gradient_checkpointing:
            return self._encoder._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)


def neutralize_time_layers(vae: TimeAwareAutoencoderKL) -> None:
    """Make every block's scale and shift zero, in place: the encoder ignores the timestep."""
    for resnet in vae.encoder.time_conditioned_resnets():
        nn.init.zeros_(resnet.time_emb_proj.weight)
        nn.init.zeros_(resnet.time_emb_proj.bias)


class TimeAwareAutoencoderKL(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Encode images to latents at a timestep, and decode latents to images.

    The decoder is Stable Diffusion's, without time. Parameter names are diffusers' own plus
    `encoder.time_embedding.*` and `*.time_emb_proj.*`, as in the published weights.

    Args:
        in_channels: Channels of the input image.
        out_channels: Channels of the decoded image.
        down_block_types: "DownEncoderBlock2D" once per level.
        up_block_types: "UpDecoderBlock2D" once per level.
        block_out_channels: Width of each level, finest first; n levels shrink by 2^(n−1).
        layers_per_block: ResNet blocks per encoder level; the decoder has one more.
        act_fn: Activation's name in diffusers.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of every GroupNorm; divides every width.
        sample_size: Side in px the weights were trained at; information only.
        scaling_factor: Latents are the posterior's values times this factor.
        force_upcast: Kept from Stable Diffusion's configuration; information only.
        time_scale_shift: "scale_shift", the only conditioning that exists.
        mid_block_add_attention: Whether the mid blocks attend, with one head of their width.

    Raises:
        ValueError: A block type or the conditioning is unknown, or the lists differ in length.

    Source: TADSR (arXiv 2508.16557), time-aware VAE encoder.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResnetBlock2D",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 512,
        scaling_factor: float = 0.18215,
        force_upcast: bool = True,
        time_scale_shift: str = "scale_shift",
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        if time_scale_shift != "scale_shift":
            raise ValueError(
                f"time_scale_shift must be 'scale_shift', got {time_scale_shift!r}; "
                "no other time conditioning of the encoder is published"
            )
        if set(down_block_types) != {"DownEncoderBlock2D"} or set(up_block_types) != {
            "UpDecoderBlock2D"
        }:
            raise ValueError(
                "block types must be 'DownEncoderBlock2D' and 'UpDecoderBlock2D', got "
                f"{tuple(down_block_types)} and {tuple(up_block_types)}"
            )
        if not len(down_block_types) == len(up_block_types) == len(block_out_channels):
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels must have one entry per "
                f"level, got {len(down_block_types)}, {len(up_block_types)} and "
                f"{len(block_out_channels)}"
            )
        shared = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "act_fn": act_fn,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = TimeAwareEncoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=tuple(down_block_types),
            double_z=True,
            **shared,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=tuple(up_block_types),
            **shared,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @apply_forward_hook
    def encode(self, x: Tensor, timestep: int | Tensor) -> AutoencoderKLOutput:
        """Encode images at a timestep.

        Args:
            x: Images, (B, 3, H, W), in [-1, 1]; H and W multiples of `downscale_factor`.
            timestep: One timestep for all, or one per image, (B,); 0..999.

        Returns:
            `latent_dist`, the posterior over (B, latent_channels, H/f, W/f), unscaled.

        Raises:
            ValueError: The number of timesteps is neither 1 nor B.

        Source: TADSR (arXiv 2508.16557), time-aware VAE encoder.
        """
        timesteps = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if timesteps.numel() not in (1, x.shape[0]):
            raise ValueError(
                f"timestep must be one value or one per image ({x.shape[0]}), "
                f"got {timesteps.numel()}"
            )
        moments = self.quant_conv(self.encoder(x, timesteps.expand(x.shape[0])))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    @apply_forward_hook
    def decode(self, z: Tensor) -> DecoderOutput:
        """Decode latents to images.

        Args:
            z: Unscaled latents, (B, latent_channels, h, w).

        Returns:
            `sample`, images (B, 3, f·h, f·w), about [-1, 1], not clamped.
        """
        return DecoderOutput(sample=self.decoder(self.post_quant_conv(z)))

    def forward(self, x: Tensor, timestep: int | Tensor) -> Tensor:
        """Encode to the posterior mean and decode again, (B, 3, H, W) to (B, 3, H, W)."""
        return self.decode(self.encode(x, timestep).latent_dist.mode()).sample
