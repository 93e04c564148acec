"""Whole runs on small models: what they change, what they refuse, and how they go on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tadsr import TADSRPipeline
from tadsr.checkpoints import load_adapters, load_checkpoint
from tadsr.errors import TADSRWarning
from tadsr.training import (
    DataConfig,
    RestoredConfig,
    TeacherConfig,
    TimestepRamp,
    Trainer,
    TrainingConfig,
    ValidationConfig,
)
from tadsr.training.losses import mse_per_sample
from tadsr.training.randomness import SampleRandomness

from .conftest import (
    PLAIN,
    PLAIN_STUDENT,
    distillation,
    make_config,
    plain_data,
    read_log,
    trained_tensors,
)

FEW_TEXTS = {"negative_prompt": "degraded photo", "teacher_prompt": ""}


def train_chain(networks, photos, folder, num_steps):
    """Train an autoencoder and a teacher from scratch, each by its own run."""
    sizes = {"steps": num_steps, "save_every": 100}
    config = make_config(networks, photos, folder / "autoencoder", PLAIN, **sizes)
    autoencoder = Trainer(config).train()
    stage = TeacherConfig(degraded_probability=0.5)
    sizes |= {"batch_size": 4, "vae": str(autoencoder)}
    config = make_config(networks, photos, folder / "teacher", stage, **sizes)
    return autoencoder, Trainer(config).train()


@pytest.fixture(scope="module")
def small_chain(networks, photos, tmp_path_factory):
    return train_chain(networks, photos, tmp_path_factory.mktemp("chain"), 3)


def distil_from(teacher, **changes):
    return distillation(
        adapter_rank=0, fake_score_rank=0, teacher=str(teacher), train_decoder=True,
        tavsd_weight=TimestepRamp(0.01, 0.01), **FEW_TEXTS, **changes,
    )  # fmt: skip


def test_the_stages_from_scratch_hand_over(configure, small_chain, photos):
    autoencoder, teacher = small_chain
    trained, given = load_checkpoint(teacher), load_checkpoint(autoencoder)
    torch.testing.assert_close(dict(trained.vae.state_dict()), dict(given.vae.state_dict()))
    assert given.vae.config.scaling_factor != 0.18215
    config = configure(distil_from(teacher, latent_steps=1), vae=str(autoencoder), steps=2)
    model = Trainer(config).train()
    image = Image.open(photos / "0.png").crop((0, 0, 20, 16))
    assert TADSRPipeline.from_pretrained(model)(image, 300, process_size=0).size == (80, 64)


@pytest.mark.slow
def test_the_stages_from_scratch_learn(configure, networks, photos, tmp_path):
    autoencoder, teacher = train_chain(networks, photos, tmp_path, 24)
    history = [line["autoencoder.loss"] for line in read_log(tmp_path / "autoencoder")]
    assert np.mean(history[-4:]) < 0.8 * np.mean(history[:4])
    history = [line["teacher.loss"] for line in read_log(tmp_path / "teacher")]
    assert np.mean(history[-8:]) < 0.95 * np.mean(history[:8])
    stage = distil_from(teacher, latent_steps=8)
    sizes = {"steps": 32, "batch_size": 4, "save_every": 100}
    Trainer(configure(stage, vae=str(autoencoder), **sizes)).train()
    lines = read_log(tmp_path / "run")
    assert all(line["step"] == i + 1 for i, line in enumerate(lines))
    latent = [line["student.latent"] for line in lines[:8]]
    assert np.mean(latent[-4:]) < np.mean(latent[:4])
    mse = [line["student.mse"] for line in lines[8:]]
    assert np.mean(mse[-12:]) < np.mean(mse[:12])
    assert all(np.isfinite(line["fake_score.loss"]) for line in lines)


def test_images_are_compared_with_what_a_restorer_makes_as_the_timestep_says(
    configure, networks, photos, tmp_path
):
    data = plain_data(photos, restored=RestoredConfig(str(tmp_path / "kept"), 4))
    stage = distillation(
        adapter_rank=0, tavsd_weight=TimestepRamp(0, 0), mse_weight=TimestepRamp(0, 0),
        l1_weight=TimestepRamp(1, 1), gradient_weight=TimestepRamp(2, 2),
        restored_share=TimestepRamp(0, 1.5), perceptual_weight=TimestepRamp(3, 3),
        perceptual_restored_share=TimestepRamp(0, 1.5),
    )  # fmt: skip

    def restorer(lq):
        return F.interpolate(1 - lq, scale_factor=4)

    config = configure(stage, data=data)
    trainer = Trainer(config, perceptual=mse_per_sample, restorer=restorer)
    assert TADSRPipeline.from_pretrained(trainer.train())
    log = read_log(tmp_path / "run")[-1]
    assert log["student.loss"] == pytest.approx(
        log["student.l1"] + 2 * log["student.gradient"] + 3 * log["student.perceptual"]
    )
    batch = next(trainer.data.batches(batch_size=3)).to("cpu")
    timesteps, randomness = torch.tensor([0, 333, 999]), SampleRandomness(0, batch.indices)
    share = torch.tensor([0, 0.5, 1.5])[:, None, None, None]
    added = batch.restored - batch.hq
    assert added.mean((-2, -1)).abs().max() > 0.1, "the restorer must shift colours"
    image = batch.hq + share * (added - added.mean((-2, -1), keepdim=True))
    losses = trainer.stage.restoration_losses(image, batch, timesteps, randomness)
    assert losses["loss"] < 1e-6
    assert trainer.stage.restoration_losses(batch.hq, batch, timesteps, randomness)["l1"] > 0.1
    with pytest.raises(ValueError, match=r"data\.restored must say"):
        make_config(networks, photos, tmp_path / "other", stage)


def test_an_encoder_is_fitted_to_a_decoder_that_stays(configure, small_chain):
    autoencoder, _ = small_chain
    stage = dataclasses.replace(PLAIN, train_decoder=False)
    config = configure(stage, vae=str(autoencoder), steps=2)
    fitted, given = load_checkpoint(Trainer(config).train()).vae, load_checkpoint(autoencoder).vae
    assert fitted.config.scaling_factor == given.config.scaling_factor
    states = [dict(vae.decoder.state_dict()) for vae in (fitted, given)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not fitted.encoder.conv_in.weight.equal(given.encoder.conv_in.weight)


@pytest.fixture(scope="module")
def distilled(official, photos, tmp_path_factory):
    """A trainer that has trained, the values of its modules before, and its model."""
    output = tmp_path_factory.mktemp("distilled") / "run"
    data = plain_data(photos, 64)
    config = make_config(official, photos, output, distillation(), data=data, steps=2)
    trainer = Trainer(config)
    before = {
        part: {n: t.detach().clone() for n, t in module.state_dict().items()}
        for part, module in modules_of(trainer.stage).items()
    }
    return trainer, before, trainer.train()


def modules_of(stage):
    return {
        "text_encoder": stage.checkpoint.text_encoder,
        "student": stage.student,
        "teacher": stage.teacher,
    }


def test_distillation_changes_student_and_fake_score_and_nothing_else(distilled):
    trainer, before, _ = distilled
    changed = {
        part: {n for n, t in module.state_dict().items() if not t.equal(before[part][n])}
        for part, module in modules_of(trainer.stage).items()
    }
    assert changed["text_encoder"] == set()
    assert changed["teacher"]
    assert all(".lora_" in name for name in changed["teacher"])
    trained = {n for n, p in trainer.stage.student.named_parameters() if p.requires_grad}
    assert changed["student"] <= trained
    assert {"unet.conv_in.base_layer.weight"} <= changed["student"]
    for part in ("time_emb_proj", "time_embedding", "lora_A.default_decoder", "lora_A.default_oth"):
        assert any(part in name for name in changed["student"]), part
    assert not any("vae.decoder" in n or "post_quant" in n for n in changed["student"])


def test_the_export_restores_as_the_student_did(distilled, official):
    trainer, _, model = distilled
    run = model.parent
    lq = torch.rand(1, 3, 64, 64) * 2 - 1
    expect = trainer.stage.preview(lq, lq, (300,))["t=300"].clamp(-1, 1)
    pipe = TADSRPipeline.from_pretrained(model)
    embeds = pipe.encode_prompt([""]).half().float()  # as training keeps them
    got = pipe.restore(lq, torch.tensor([300]), embeds)
    torch.testing.assert_close(got, expect, atol=1e-4, rtol=0)
    # The published format: the pickle on the base model that it was trained from.
    published = TADSRPipeline.from_pretrained(official, adapter=run / "tadsr.pkl")
    got = published.restore(lq, torch.tensor([300]), embeds)
    torch.testing.assert_close(got, expect, atol=1e-4, rtol=0)
    assert load_adapters(run / "tadsr.pkl").rank_unet == 4
    card = (model / "README.md").read_text()
    assert "2 steps, 4 samples of 64 px" in card
    assert str(run) not in card


def test_plain_stable_diffusion_is_a_starting_point(stable_diffusion, photos, tmp_path):
    config = make_config(stable_diffusion, photos, tmp_path / "run", distillation(), steps=1)
    trainer = Trainer(config)
    vae, lq = trainer.stage.checkpoint.vae, torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(vae(lq, 1), vae(lq, 999))
    model = trainer.train()
    assert not torch.allclose(vae.encode(lq, 1)[0].mean, vae.encode(lq, 999)[0].mean)
    assert load_checkpoint(model, merge_adapters=False).adapters is not None


SWITCHES = {
    "without TAE": {"tae": False},
    "without TAVSD": {"tavsd_weight": TimestepRamp(0, 0)},
    "without blur": {"blur": False},
    "baseline": {"tae": False, "vsd_timestep": "uniform"},
    "as published": {"clamp_image": True, "sample_posterior": True},
    "fixed timestep": {"vsd_timestep": "fixed", "vsd_fixed": 300},
    "published grid": {"timestep_grid": 50, "timestep_range": (1, 999)},
    "adversarial": {"gan_weight": TimestepRamp(0, 0.1), "latent_steps": 1},
    "fake score of adapters": {"fake_score_rank": 4},
    "with decoder": {"train_decoder": True},
    "chroma": {"chroma_mse_weight": TimestepRamp(1, 2), "plain_mse_weight": TimestepRamp(1, 0)},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains(configure, name, small_chain, tmp_path):
    autoencoder, teacher = small_chain
    switches = SWITCHES[name]
    copied = {"adapter_rank": 0, "fake_score_rank": 0}  # attaching adapters takes longest
    stage = distillation(teacher=str(teacher), **{**FEW_TEXTS, **copied, **switches})
    config = configure(stage, vae=str(autoencoder), steps=1 + stage.latent_steps)
    trainer = Trainer(config)
    vae = trainer.stage.checkpoint.vae
    decoder = vae.decoder.conv_out.weight.detach().clone()
    trainer.train()
    line = read_log(tmp_path / "run")[-1]
    stage = trainer.stage.config
    assert ("student.tavsd" in line) == (not stage.tavsd_weight.is_zero)
    assert ("fake_score.loss" in line) == (not stage.tavsd_weight.is_zero)
    assert ("discriminator.loss" in line) == (not stage.gan_weight.is_zero)
    assert decoder.equal(vae.decoder.conv_out.weight) != stage.train_decoder
    x = torch.rand(1, 3, 32, 32)
    knows_time = not torch.equal(vae.encode(x, 1)[0].mean, vae.encode(x, 999)[0].mean)
    assert knows_time == stage.tae


def test_every_weight_of_the_student_counts(configure, small_chain, tmp_path):
    autoencoder, teacher = small_chain
    weights = {"mse": 0.7, "plain_mse": 1.3, "chroma_mse": 2.0, "perceptual": 0.3}
    stage = distillation(
        adapter_rank=0,
        fake_score_rank=0,
        teacher=str(teacher),
        perceptual="lpips",
        tavsd_weight=TimestepRamp(0.4, 0.4),
        guidance=1e5,  # of prompts that hardly differ yet
        gan_weight=TimestepRamp(5, 5),
        **{f"{name}_weight": TimestepRamp(value, value) for name, value in weights.items()},
        **FEW_TEXTS,
    )
    config = configure(stage, vae=str(autoencoder), steps=1)
    Trainer(config, perceptual=mse_per_sample).train()
    line = read_log(tmp_path / "run")[0]
    weights |= {"tavsd": 0.4, "gan": 5}
    parts = {name: weight * line[f"student.{name}"] for name, weight in weights.items()}
    assert all(abs(value) > 1e-3 for value in parts.values()), parts
    assert line["student.loss"] == pytest.approx(sum(parts.values()), rel=1e-4)


class WatchedDistance(torch.nn.Module):
    """A perceptual network that notes the arithmetic that it is computed in."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 3).requires_grad_(False)
        self.seen = set()

    def forward(self, pred, target):
        features = self.conv(pred)
        self.seen |= {pred.dtype, target.dtype, self.conv.weight.dtype, features.dtype}
        return mse_per_sample(features, self.conv(target))


@pytest.mark.parametrize(
    ("stage", "weight"), [(PLAIN_STUDENT, TimestepRamp(1, 1)), (PLAIN, 1.0)], ids=["student", "vae"]
)
def test_perceptual_distances_are_exact_under_every_precision(stage, weight, configure):
    stage = dataclasses.replace(stage, perceptual="lpips", perceptual_weight=weight)
    distance = WatchedDistance()
    Trainer(configure(stage, steps=1, precision="bf16"), perceptual=distance).train()
    assert distance.seen == {torch.float32}


def test_perceptual_distance_begins_elsewhere_on_each_pair(networks, photos, tmp_path):
    most, seen = 3, {}
    for shift in (0, most):
        seen[shift] = []

        def watched(pred, target, kept=seen[shift]):
            kept += zip(pred.detach(), target, strict=True)
            return mse_per_sample(pred, target)

        stage = dataclasses.replace(
            PLAIN_STUDENT,
            perceptual="lpips",
            perceptual_weight=TimestepRamp(1, 1),
            perceptual_shift_px=shift,
        )
        config = make_config(networks, photos, tmp_path / str(shift), stage, steps=1, batch_size=4)
        Trainer(config, perceptual=watched).train()
    found = []
    for whole, part in zip(seen[0], seen[most], strict=True):
        height, width = part[0].shape[-2:]
        places = [
            (top, left)
            for top in range(most + 1)
            for left in range(most + 1)
            if all(
                torch.equal(x[:, top : top + height, left : left + width], y)
                for x, y in zip(whole, part, strict=True)
            )
        ]
        found += places
        assert (height, width) == tuple(side - most for side in whole[0].shape[-2:])
        assert len(places) == 1
    assert len(set(found)) > 1


def test_timesteps_without_adversary_train_without_it(networks, photos, tmp_path):
    lines = []
    for end in (0.0, 0.5):
        gan = {"gan_weight": TimestepRamp(0, end), "timestep_range": (0, 0)}
        stage = dataclasses.replace(PLAIN_STUDENT, perceptual="none", **gan)
        output = tmp_path / str(end)
        Trainer(make_config(networks, photos, output, stage, steps=2)).train()
        lines.append(read_log(output)[-1])
    assert lines[1]["discriminator.loss"] == 0
    assert lines[1]["student.gan"] != 0
    assert lines[1]["student.loss"] == lines[0]["student.loss"]


def test_accumulated_gradients_are_those_of_the_whole_batch(networks, photos, tmp_path):
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        output = tmp_path / str(batch_size)
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        config = make_config(networks, photos, output, PLAIN, **sizes)
        Trainer(config).train()
        results.append(trained_tensors(output, "autoencoder", 3))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=2e-5, rtol=1e-3)


def test_validation_writes_a_picture_and_figures(configure, photos, tmp_path):
    validation = ValidationConfig(
        str(photos), every_steps=2, num_images=2, crop_px=64, timesteps=(1, 800),
        keep_best="psnr_y",
    )  # fmt: skip
    options = {"validation": validation, "ema_decay": 0.9, "trackers": ("tensorboard",)}
    config = configure(PLAIN_STUDENT, **options)
    trainer = Trainer(config, perceptual=mse_per_sample)
    model = trainer.train()
    names = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert names == [f"step_{step:08d}.png" for step in (0, 2, 3)]
    with Image.open(tmp_path / "run" / "samples" / names[-1]) as grid:
        assert grid.size[0] == 64 * 5  # LQ, bicubic, two timesteps, HQ
    assert set(trainer.metrics) == {"bicubic", "t=1", "t=800"}
    assert trainer.metrics["bicubic"]["psnr_y"] > 10
    assert "| bicubic |" in (model / "README.md").read_text()
    (kept,) = (tmp_path / "run").glob("checkpoints/best")
    scores = {
        entry["step"]: np.mean([entry["validation"][f"t={t}"]["psnr_y"] for t in (1, 800)])
        for entry in read_log(tmp_path / "run", "validation")
    }
    assert set(scores) == {0, 2, 3}
    best = max((2, 3), key=scores.get)
    assert json.loads((kept / "progress.json").read_text())["step"] == best
    assert "perceptual" in trainer.metrics["t=1"]
    tracked = EventAccumulator(str(tmp_path / "run" / "tadsr"), {"images": 0}).Reload()
    psnr = tracked.Scalars("validation.t=800.psnr_y")
    assert [event.step for event in psnr] == [0, 2, 3]
    assert psnr[-1].value == pytest.approx(trainer.metrics["t=800"]["psnr_y"])
    (tag,) = tracked.Tags()["images"]
    assert len(tracked.Images(tag)) == 3
    hparams = next((tmp_path / "run").rglob("hparams.yml")).read_text()
    assert "stage.tavsd_weight.start: 0" in hparams
    average = load_file(tmp_path / "run" / "checkpoints" / "step_00000003" / "average.safetensors")
    exported = load_checkpoint(model).unet.state_dict()
    torch.testing.assert_close(exported["conv_in.weight"], average["unet.conv_in.weight"])


def test_what_is_left_open_is_chosen_for_the_model(photos, tmp_path):
    """The form of five lines, with a model that has no teacher and no perceptual library."""
    data = plain_data(photos)
    config = TrainingConfig("tadsr-tiny", data, str(tmp_path / "run"), steps=1, device="cpu")
    with pytest.warns(TADSRWarning) as said:
        trainer = Trainer(config)
    assert len(said) == 2
    assert "without a perceptual distance" in str(said[0].message)
    assert "tadsr-tiny has no teacher beside it: training without TAVSD" in str(said[1].message)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["stage"]
    assert stored["tavsd_weight"]["start"] == stored["perceptual_weight"]["start"] == 0
    start = load_checkpoint("tadsr-tiny")
    trained = TADSRPipeline.from_pretrained(trainer.train())
    assert not trained.unet.conv_in.weight.equal(start.unet.conv_in.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_in_every_precision(precision, official, photos, tmp_path):
    """With accumulation and clipping, where one gradient scale serves two optimizers."""
    config = make_config(
        official, photos, tmp_path / "run", distillation(), precision=precision, device="auto",
        gradient_accumulation_steps=2, gradient_checkpointing=True, channels_last=True,
        data=DataConfig(str(photos), crop_px=64, num_workers=0, degrade_on="device"), steps=6,
    )  # fmt: skip
    trainer = Trainer(config)
    assert trainer.accelerator.device.type == "cuda"
    model = trainer.train()
    lines = read_log(tmp_path / "run")
    assert all(np.isfinite(line["student.loss"]) for line in lines)
    assert TADSRPipeline.from_pretrained(model)(Image.open(photos / "0.png"), 300).size[0] == 448
