"""The stages of `inherit.py`: what each trains, by which losses, and how it is judged."""

from __future__ import annotations

import numpy as np
import torch
from inherit_figures import Figures
from inherit_losses import (
    BLOCKINESS,
    DETAIL,
    WAVES,
    block_pattern,
    detail_error,
    faithful_error,
    grid_pattern,
    imitation_weight,
    wave_error,
)
from inherit_networks import SCALE, Adversaries, Setting
from inherit_recording import Replayed
from inherit_samples import Pool, chosen, to_images, to_pixels
from torch import Tensor, nn

from tadsr.schedule import NUM_TRAIN_TIMESTEPS
from tadsr.training.data import upsample_lq
from tadsr.training.losses import (
    discriminator_loss,
    generator_loss,
    l1_per_sample,
    mse_per_sample,
)
from tadsr.training.optimization import Muon, is_kernel
from tadsr.training.stages.stage_config import TimestepRamp

JUDGED = (1, 500, 900)
FAITHFUL_BELOW = 50
"""Timesteps of the samples that `Setting.faithful_share` speaks of."""
ADAMW_SHARE = 0.25
"""Of Muon's learning rate, for what Muon does not step."""
PERCEPTUAL_SHARE = 0.2
"""Weight of the perceptual distance beside the mean absolute error, for the decoder."""
IMITATED = {"l1": 1.0, "distance": 0.5, "features": 0.02}
"""Weights of what keeps pictures near the restorer's."""
PERCEPTUAL = TimestepRamp(0.005, 8.0, 0.75)
ADVERSARIES = TimestepRamp(0.0, 1.0)
ADVERSARIES_SHARE = 0.1
"""Length of their gradient as a part of the perceptual distance's, once they know something; a
quarter, by untrained ones, undid in 20 steps what the networks knew."""
ADVERSARIES_STEPS = 300
"""Until the share is full."""
ADVERSARIES_RATE = 4e-4
GRID = 0.1
"""Weight of what repeats with the latents' grid more than it does in the originals."""
SHIFT_PX = 7
"""How far pairs are shifted at random under the perceptual network, which has a grid of its own."""
_MAX_NORM = 1.0


class Stage:
    """One part of the training; its step touches no number that is not on the device."""

    name: str
    needs: tuple[str, ...]
    """What samples consist of: hq, lq, kinds, features, restored."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.batch: dict[str, Tensor] = {}
        self.figures: dict[str, Tensor] = {}
        setting.student.requires_grad_(False)
        for module in self.trained():
            module.requires_grad_(True)
        named = [(n, p) for n, p in setting.student.named_parameters() if p.requires_grad]
        rate = setting.rates[self.name]
        kernels = [p for n, p in named if is_kernel(n, p)]
        others = [p for n, p in named if not is_kernel(n, p)]
        self.parameters = kernels + others
        self.taught = Replayed(self._teach, is_recorded=setting.is_recorded)
        self.optimizers = [
            (Muon(kernels, self._rate(rate)), rate),
            self._adamw(others, ADAMW_SHARE * rate, weight_decay=0.0),
        ]

    def trained(self) -> list[nn.Module]:
        """Return the parts of the student that learn."""
        raise NotImplementedError

    def step(self) -> None:
        """Learn from `batch`."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Judge by photographs that are held out."""
        raise NotImplementedError

    def describe(self, hq: Tensor, lq: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        """Return what is needed of uint8 samples and the numbers of their kinds."""
        kept = {"hq": hq, "lq": lq, "kinds": kinds}
        if "restored" in self.needs or "features" in self.needs:
            kept |= self.taught(lq)
        return {name: kept[name] for name in self.needs}

    def _teach(self, lq: Tensor) -> dict[str, Tensor]:
        """Return what the restorer makes of uint8 LQ images."""
        with self.setting.restorer_autocast():
            features = self.setting.restorer.features(to_images(lq))
            made = {"features": features.to(torch.float16)}
            if "restored" in self.needs:
                made["restored"] = to_pixels(self.setting.restorer.draw(features))
        return made

    def take(self, pool: Pool, step: int, count: int) -> None:
        """Put the batch of a step into its place."""
        rng = np.random.default_rng([self.setting.seed, step, *self.name.encode()])
        batch = pool.draw(rng, count)
        is_faithful = rng.random(count) < self.setting.faithful_share
        ends = np.where(is_faithful, FAITHFUL_BELOW, NUM_TRAIN_TIMESTEPS)
        batch["timesteps"] = torch.from_numpy(rng.integers(ends)).to(self.setting.device)
        for name in ("hq", "lq", "restored"):
            if name in batch:
                batch[name] = to_images(batch[name])
        if "lq" in batch:
            size = [SCALE * side for side in batch["lq"].shape[-2:]]
            batch["lq"] = upsample_lq(batch["lq"], size)
        if "features" in batch:
            batch["features"] = self.setting.whiten(batch["features"])
        pictures = batch.get("hq", batch.get("restored"))
        if pictures is not None:
            left = pictures.shape[-1] - SHIFT_PX
            for name in ("rows", "columns"):
                first = int(rng.integers(SHIFT_PX + 1))
                batch[name] = torch.arange(first, first + left, device=self.setting.device)
        for name, values in batch.items():
            if name in self.batch:
                self.batch[name].copy_(values)
            else:
                self.batch[name] = values

    def set_rates(self, factor: float) -> None:
        """Set learning rates, as parts of the largest."""
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    def state_dict(self) -> dict:
        """Return what going on needs."""
        return {"optimizers": [o.state_dict()["state"] for o, _ in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        for (optimizer, _), stored in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": stored, "param_groups": groups})

    def _rate(self, value: float) -> float | Tensor:
        """Return a rate that a recorded step can read."""
        is_cuda = self.setting.device.type == "cuda"
        return torch.tensor(value, device=self.setting.device) if is_cuda else value

    def _adamw(self, parameters, rate: float, **options) -> tuple[torch.optim.AdamW, float]:
        is_cuda = self.setting.device.type == "cuda"
        return torch.optim.AdamW(parameters, self._rate(rate), capturable=is_cuda, **options), rate

    def _forget_gradients(self) -> None:
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _learn(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
        for optimizer, _ in self.optimizers[:2]:
            optimizer.step()

    def _shifted(self, images: Tensor) -> Tensor:
        rows, columns = self.batch["rows"], self.batch["columns"]
        return images.index_select(2, rows).index_select(3, columns)

    def _note(self, **figures: Tensor) -> None:
        for name, value in figures.items():
            value = value.detach().float().mean()
            self.figures.setdefault(name, torch.empty_like(value)).copy_(value)


class DecoderStage(Stage):
    """Draw the restorer's pictures from its features."""

    name = "decoder"
    needs = ("features", "restored")

    def trained(self) -> list[nn.Module]:
        """Return the decoder's parts."""
        return [self.setting.student.vae.decoder, self.setting.student.vae.post_quant_conv]

    def step(self) -> None:
        """Learn from `batch`."""
        self._forget_gradients()
        image = self.setting.decoded(self.batch["features"])
        l1 = l1_per_sample(image, self.batch["restored"])
        distance = self.setting.perceptual(image, self.batch["restored"])
        (l1 + PERCEPTUAL_SHARE * distance).mean().backward()
        self._learn()
        self._note(l1=l1, distance=distance)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return how far its pictures are from the restorer's."""
        distances = []
        for _, _, features, restored in self.setting.judged:
            image = self.setting.decoded(self.setting.whiten(features)).clamp(-1, 1)
            distances.append(self.setting.perceptual(image, restored))
        return {"held-out distance from the restorer": torch.cat(distances).mean().item()}


class FeaturesStage(Stage):
    """Give the restorer's features."""

    name = "features"
    needs = ("features", "lq")

    def trained(self) -> list[nn.Module]:
        """Return encoder, UNet and prompt."""
        student = self.setting.student
        return [
            student.vae.encoder, student.vae.quant_conv, student.unet, student.prompt_embeddings
        ]  # fmt: skip

    def step(self) -> None:
        """Learn from `batch`."""
        self._forget_gradients()
        batch = self.batch
        latents = self.setting.restored(batch["lq"], batch["timesteps"], decode=False).pred_x0
        error = mse_per_sample(latents, batch["features"])
        error.mean().backward()
        self._learn()
        self._note(error=error)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the share of the features' variance that the latents leave unexplained."""
        errors = dict.fromkeys(JUDGED, 0.0)
        variance = 0.0
        for _, lq, features, _ in self.setting.judged:
            wanted, scale = self.setting.whiten(features), self.setting.whitening[1]
            variance += (wanted * scale).square().sum().item()
            for t in errors:
                latents = self.setting.restored_at(lq, t, decode=False).pred_x0
                errors[t] += ((latents - wanted) * scale).square().sum().item()
        return {f"unexplained variance t={t}": error / variance for t, error in errors.items()}


class ImitateStage(Stage):
    """Draw the restorer's pictures from LQ images, at every timestep alike."""

    name = "imitate"
    needs = ("features", "restored", "lq")

    def trained(self) -> list[nn.Module]:
        """Return all."""
        return [self.setting.student]

    def step(self) -> None:
        """Learn from `batch`."""
        self._forget_gradients()
        batch = self.batch
        pred_x0, image = self.setting.restored(batch["lq"], batch["timesteps"])
        error = mse_per_sample(pred_x0, batch["features"])
        l1 = l1_per_sample(image, batch["restored"])
        shifted, restored = (self._shifted(images) for images in (image, batch["restored"]))
        distance = self.setting.perceptual(shifted, restored)
        parts = {"l1": l1, "distance": distance, "features": error}
        sum(IMITATED[name] * part for name, part in parts.items()).mean().backward()
        self._learn()
        self._note(l1=l1, distance=distance, error=error)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return how far its pictures are from the restorer's, and from the originals."""
        found: dict[str, list[Tensor]] = {}
        for hq, lq, _, restored in self.setting.judged:
            for t in JUDGED:
                image = self.setting.restored_at(lq, t).image.clamp(-1, 1)
                for name, target in {"restorer": restored, "original": hq}.items():
                    distance = self.setting.perceptual(image, target)
                    found.setdefault(f"t={t} from {name}", []).append(distance)
        return {name: torch.cat(values).mean().item() for name, values in found.items()}


class JointStage(Stage):
    """Restore the originals: faithfully at small timesteps, vividly at large ones."""

    name = "joint"
    needs = ("hq", "lq", "restored")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            self.adversaries = Adversaries().to(setting.device)
        self.optimizers.append(
            self._adamw(self.adversaries.parameters(), ADVERSARIES_RATE, betas=(0.5, 0.99))
        )

    def trained(self) -> list[nn.Module]:
        """Return all."""
        return [self.setting.student]

    def step(self) -> None:
        """Learn from `batch`."""
        self._forget_gradients()
        batch, timesteps = self.batch, self.batch["timesteps"]
        image = self.setting.restored(batch["lq"], timesteps).image
        # Gradients meet at the picture, where those of the adversaries get their length.
        leaf = image.detach().requires_grad_()
        shifted, original, restored = (
            self._shifted(images) for images in (leaf, batch["hq"], batch["restored"])
        )
        perceptual = self.setting.perceptual
        with torch.no_grad():
            wanted = perceptual.features(original)
            imitated = perceptual.features(restored)
            theirs = perceptual.compare(imitated, wanted)
        found = perceptual.features(shifted)
        distance, other = (perceptual.compare(found, f) for f in (wanted, imitated))
        is_closer = theirs < distance
        imitation = imitation_weight(timesteps, is_closer)
        faithful = faithful_error(leaf, batch["hq"], batch["lq"], timesteps)
        pattern = (grid_pattern(leaf) - grid_pattern(batch["hq"])).relu()
        l1 = l1_per_sample(leaf, batch["restored"])
        # Not their excess alone, which chance would make of photographs without blocks as well.
        blocks = (block_pattern(leaf) - block_pattern(batch["hq"])).square().mean((1, 2))
        detail = detail_error(leaf, batch["hq"], batch["restored"])
        pixels = faithful + GRID * pattern.square() + BLOCKINESS * blocks
        pixels = pixels + imitation * IMITATED["l1"] * l1 + DETAIL.at(timesteps) * detail
        vivid = PERCEPTUAL.at(timesteps) * distance + imitation * IMITATED["distance"] * other
        share = ADVERSARIES.at(timesteps)
        # What an adversary takes for good is the better of both: of originals alone it would ask
        # for texture that cannot be known.
        example = chosen(is_closer, restored, original)
        exemplary = [chosen(is_closer, *pair) for pair in zip(imitated, wanted, strict=True)]
        self.adversaries.requires_grad_(False).eval()
        scores = self.adversaries(shifted, found)
        fooled = sum(
            w * generator_loss(s) for w, s in zip(Adversaries.WEIGHTS, scores, strict=True)
        )
        waves = wave_error(leaf, batch["hq"])
        by_pixels, by_distance, by_adversaries = (
            torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            for loss in (pixels.mean() + WAVES * waves, vivid.mean(), (share * fooled).mean())
        )
        trust = self.adversaries.trust.add_(1 / ADVERSARIES_STEPS).clamp_(max=1)
        length = trust * ADVERSARIES_SHARE * by_distance.norm() / (by_adversaries.norm() + 1e-12)
        image.backward(by_pixels + by_distance + length * by_adversaries)
        self._learn()
        self.adversaries.requires_grad_(True).train()
        # One pass over both, or its normalisation would step twice.
        features = [torch.cat(pair).detach() for pair in zip(exemplary, found, strict=True)]
        both = self.adversaries(torch.cat([example, shifted.detach()]), features)
        told = sum(discriminator_loss(*scores.chunk(2)) for scores in both)
        (share * told).mean().backward()
        self.optimizers[2][0].step()
        mse = mse_per_sample(leaf, batch["hq"])
        self._note(
            distance=distance, other=other, mse=mse, pattern=pattern, waves=waves,
            blocks=blocks, detail=detail, told=told / len(both),
        )  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Return distances from the originals, PSNR, detail, the grid and the highest wave."""
        return judged_figures(self.setting)

    def state_dict(self) -> dict:
        """Return what going on needs."""
        return super().state_dict() | {"adversaries": self.adversaries.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.adversaries.load_state_dict(state["adversaries"])


@torch.no_grad()
def judged_figures(setting: Setting) -> dict[str, float]:
    """Return what `Figures` has of photographs that are held out."""
    figures = Figures(setting.perceptual)
    for hq, lq, _, restored in setting.judged:
        results = {"bicubic": upsample_lq(lq, hq.shape[-2:]), "restorer": restored}
        for t in JUDGED:
            results[f"t={t}"] = setting.restored_at(lq, t).image
        figures.add(results, hq)
    return figures.means()
