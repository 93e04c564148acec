"""Train tadsr-tiny from scratch, stage by stage; an interrupted stage continues.

train.py autoencoder --data PHOTOS --perceptual squeezenet10.safetensors
train.py student --data PHOTOS --perceptual squeezenet10.safetensors --out tadsr-tiny
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel

from tadsr.checkpoints import save_native
from tadsr.models.prompt_embeddings import PromptEmbeddings
from tadsr.models.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.config import AutoencoderConfig, StudentConfig
from tadsr.training.data import crop_photo, load_photos
from tadsr.training.perceptual import SqueezeNetDistance
from tadsr.training.recipe import load_recipe
from tadsr.training.stages import measure_scaling_factor, train_autoencoder, train_student

HERE = Path(__file__).parent
SCALING_CROPS = 64


def build_models() -> tuple[TimeAwareAutoencoderKL, UNet2DConditionModel, PromptEmbeddings]:
    """Build the three networks at random weights; the UNet's first residual is zero."""
    torch.manual_seed(0)
    configs = yaml.safe_load((HERE / "models.yaml").read_text(encoding="utf-8"))
    vae = TimeAwareAutoencoderKL(**configs["vae"])
    unet = UNet2DConditionModel(**configs["unet"])
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return vae, unet, PromptEmbeddings(**configs["prompt_embeddings"])


def scaling_factor(vae: TimeAwareAutoencoderKL, folder: str, crop_px: int) -> float:
    """Measure 1 / std of the latents on some sharp crops."""
    rng = np.random.default_rng(0)
    photos = load_photos(folder, crop_px)
    picks = rng.integers(len(photos), size=SCALING_CROPS)
    crops = torch.stack([crop_photo(photos[i], crop_px, 1.0, rng) for i in picks])
    return measure_scaling_factor(vae.cpu().eval(), crops)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("autoencoder", "student"))
    parser.add_argument("--data", required=True, help="folder of sharp photographs")
    parser.add_argument("--runs", default="runs/tiny", help="folder of checkpoints")
    parser.add_argument("--perceptual", required=True, help="safetensors file of a SqueezeNet 1.0")
    parser.add_argument("--steps", type=int, help="total steps in place of the recipe's")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--device")
    parser.add_argument("--out", default="tadsr-tiny", help="folder of the finished model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    runs = Path(args.runs)
    overrides = {
        "data.folder": args.data,
        "data.crop_px": args.crop_px,
        "run.total_steps": args.steps,
        "run.batch_size": args.batch_size,
        "run.device": args.device,
    }
    vae, unet, prompt_embeddings = build_models()
    if args.stage == "autoencoder":
        config = load_recipe(
            HERE / "autoencoder.yaml",
            AutoencoderConfig,
            overrides | {"run.output": str(runs / "autoencoder")},
        )
        perceptual = SqueezeNetDistance(args.perceptual).to(config.run.device)
        train_autoencoder(vae, config, perceptual)
        factor = scaling_factor(vae, args.data, config.data.crop_px)
        vae.register_to_config(scaling_factor=factor)
        vae.save_pretrained(runs / "autoencoder" / "vae")
        return
    vae = TimeAwareAutoencoderKL.from_pretrained(runs / "autoencoder" / "vae")
    config = load_recipe(
        HERE / "student.yaml", StudentConfig, overrides | {"run.output": str(runs / "student")}
    )
    train_student(
        vae,
        unet,
        prompt_embeddings,
        make_alphas_cumprod(),
        config,
        SqueezeNetDistance(args.perceptual).to(config.run.device),
    )
    save_native(
        args.out,
        vae=vae,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        prompt_embeddings=prompt_embeddings,
        metadata={"license": "apache-2.0"},
        dtype=torch.float16,
        overwrite=True,
    )


if __name__ == "__main__":
    main()
