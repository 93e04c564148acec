"""Networks with the fewest layers of each kind, at random weights."""

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from tadsr import TADSRPipeline, TimeAwareAutoencoderKL
from tadsr.networks.prompt_embeddings import PromptEmbeddings

OUTER_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "use_linear_projection": True,
}
"""Of the UNet; otherwise its inner level attends."""


def small_vae(widths=(8, 8), *, norm_num_groups=4, **options):
    return TimeAwareAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=norm_num_groups,
        **options,
    ).eval()


def small_unet(widths=(8, 8), *, norm_num_groups=4, **options):
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": widths,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": norm_num_groups,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            **options,
        }
    ).eval()


def pipeline_of(vae, unet, prompts: PromptEmbeddings) -> TADSRPipeline:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return TADSRPipeline(vae=vae, unet=unet, scheduler=scheduler, prompt_embeddings=prompts)


def small_pipeline() -> TADSRPipeline:
    torch.manual_seed(0)
    vae = small_vae((4, 8, 8), norm_num_groups=2, mid_block_add_attention=False)
    unet = small_unet(norm_num_groups=2, cross_attention_dim=6)
    return pipeline_of(vae, unet, PromptEmbeddings(prompts=("", "sharp photo"), embedding_dim=6))


def photo(height=9, width=13, channels=3, dtype=np.uint8) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)
