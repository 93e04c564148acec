"""Give a tadsr-tiny more latents and a deeper UNet that compute what it computes, to train on.

python examples/recipes/tiny/grow.py tadsr-tiny runs/tiny/grown --latents 16 --layers 5 2 2
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tadsr import TADSRPipeline
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

TOLERANCE = 1e-4


def grow_latents(vae, unet, old_vae, old_unet) -> None:
    """Copy what the latents' channels are read and written by; new ones say nothing yet."""
    old, new = old_vae.config.latent_channels, vae.config.latent_channels
    # The encoder writes means, then log-variances.
    moments = [*range(old), *range(new, new + old)]
    place_rows(vae.encoder.conv_out, old_vae.encoder.conv_out, moments)
    place_square(vae.quant_conv, old_vae.quant_conv, moments)
    place_square(vae.post_quant_conv, old_vae.post_quant_conv, range(old))
    for module, source in (
        (vae.decoder.conv_in, old_vae.decoder.conv_in),
        (unet.conv_in, old_unet.conv_in),
    ):
        module.weight[:, :old] = source.weight
        module.bias.copy_(source.bias)
    # New latents come from the UNet alone, and the decoder does not look at them yet.
    vae.decoder.conv_in.weight[:, old:] = 0
    unet.conv_in.weight[:, old:] *= old_unet.conv_in.weight.std() / unet.conv_in.weight.std()
    unet.conv_out.weight *= old_unet.conv_out.weight.std() / unet.conv_out.weight.std()
    unet.conv_out.bias.zero_()
    unet.conv_out.weight[:old] = old_unet.conv_out.weight
    unet.conv_out.bias[:old] = old_unet.conv_out.bias


def place_rows(module: nn.Conv2d, source: nn.Conv2d, rows) -> None:
    """Put output channels in their places; others give zero."""
    module.weight.zero_()
    module.bias.zero_()
    module.weight[rows] = source.weight
    module.bias[rows] = source.bias


def place_square(module: nn.Conv2d, source: nn.Conv2d, channels) -> None:
    """Put a 1 × 1 convolution on some channels; others pass."""
    channels = torch.tensor(list(channels))
    module.weight.copy_(torch.eye(len(module.weight))[..., None, None])
    module.bias.zero_()
    module.weight[channels[:, None], channels] = source.weight
    module.bias[channels] = source.bias


def deepen(new: UNet2DConditionModel, old: UNet2DConditionModel) -> None:
    """Copy every block; those that are new pass on what they get.

    A level's new ResNets come last on the way down. On the way up, the first one still joins the
    level below with the level's last output, the new ones come next, and then the others.
    """
    for name, module in new.named_children():
        if name not in ("down_blocks", "up_blocks", "conv_in", "conv_out"):
            module.load_state_dict(getattr(old, name).state_dict())
    for blocks, first in (("down_blocks", None), ("up_blocks", 1)):
        for block, source in zip(getattr(new, blocks), getattr(old, blocks), strict=True):
            for kind in ("resnets", "attentions", "downsamplers", "upsamplers"):
                modules, sources = getattr(block, kind, None), getattr(source, kind, None)
                if not modules:
                    continue
                added = len(modules) - len(sources)
                start = len(sources) if first is None else first
                for index, module in enumerate(modules):
                    if start <= index < start + added:
                        pass_on(module)
                    else:
                        place = index if index < start else index - added
                        module.load_state_dict(sources[place].state_dict())


def pass_on(module: nn.Module) -> None:
    """Make a ResNet or a transformer give its first input channels."""
    last = module.conv2 if isinstance(module, ResnetBlock2D) else module.proj_out
    last.weight.zero_()
    last.bias.zero_()
    shortcut = getattr(module, "conv_shortcut", None)
    if shortcut is not None:
        shortcut.weight.copy_(torch.eye(*shortcut.weight.shape[:2])[..., None, None])
        shortcut.bias.zero_()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Write the larger model, after a check that it gives what the smaller one gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 2, 2])
    args = parser.parse_args(arguments)
    pipe = TADSRPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    torch.manual_seed(0)
    vae = TimeAwareAutoencoderKL(**{**pipe.vae.config, "latent_channels": args.latents})
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config,
        in_channels=args.latents,
        out_channels=args.latents,
        layers_per_block=args.layers,
    )
    tensors = pipe.vae.state_dict()
    fitting = {k: t for k, t in vae.state_dict().items() if tensors[k].shape == t.shape}
    vae.load_state_dict({k: tensors[k] for k in fitting}, strict=False)
    deepen(unet, pipe.unet)
    grow_latents(vae, unet, pipe.vae, pipe.unet)
    image = torch.rand(1, 3, 24, 20)
    before = pipe(image, timestep=500, output_type="pt")
    pipe.register_modules(vae=vae.eval(), unet=unet.eval())
    pipe.save_pretrained(args.output)
    grown = TADSRPipeline.from_pretrained(args.output)
    difference = (grown(image, timestep=500, output_type="pt") - before).abs().max()
    assert difference < TOLERANCE, difference
    count = sum(p.numel() for part in (vae, unet) for p in part.parameters())
    print(f"{args.output}: {count / 1e6:.2f} M parameters, {difference:.1e} from {args.model}")


if __name__ == "__main__":
    main()
