"""Whole runs on small models: what they change, what they refuse, and how they go on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tadsr import TADSRError, TADSRPipeline
from tadsr.checkpoints import load_adapters, load_checkpoint
from tadsr.errors import CheckpointError, DataError, TADSRWarning, Terminated, TrainingError
from tadsr.training import (
    AutoencoderConfig,
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    RestoredConfig,
    TeacherConfig,
    TimestepRamp,
    Trainer,
    TrainingConfig,
    ValidationConfig,
)
from tadsr.training.data import open_data
from tadsr.training.failures import explain_worker_failure
from tadsr.training.losses import mse_per_sample
from tadsr.training.randomness import SampleRandomness
from tadsr.training.run_folder import locked

QUICK = OptimizerConfig(learning_rate=2e-3)
FEW_TEXTS = {"negative_prompt": "degraded photo", "teacher_prompt": ""}


def make_config(model, photos, output, stage, **changes):
    settings = {
        "data": DataConfig(str(photos), crop_px=32, num_workers=0),
        "optimizer": QUICK,
        "steps": 3,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 2,
        "device": "cpu",
    }
    return TrainingConfig(model=str(model), output=str(output), stage=stage, **settings | changes)


def distillation(**changes):
    settings = {"perceptual_weight": TimestepRamp(0, 0), "fake_score_optimizer": QUICK}
    return DistillationConfig(**settings | changes)


def read_log(output, kind="steps_per_second"):
    lines = [json.loads(s) for s in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def trained_tensors(output, network, step):
    return load_file(output / "checkpoints" / f"step_{step:08d}" / f"{network}.safetensors")


@pytest.fixture(scope="module")
def small_chain(networks, photos, tmp_path_factory):
    """An autoencoder and a teacher trained from scratch, each by its own run."""
    folder = tmp_path_factory.mktemp("chain")
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, folder / "autoencoder", stage, steps=20, save_every=100)
    autoencoder = Trainer(config).train()
    stage = TeacherConfig(degraded_probability=0.5)
    config = make_config(
        networks, photos, folder / "teacher", stage, steps=24, vae=str(autoencoder), batch_size=4,
        save_every=100,
    )  # fmt: skip
    return folder, autoencoder, Trainer(config).train()


def test_the_stages_from_scratch_learn_and_hand_over(small_chain, networks, photos, tmp_path):
    folder, autoencoder, teacher = small_chain
    history = [line["autoencoder.loss"] for line in read_log(folder / "autoencoder")]
    assert np.mean(history[-4:]) < 0.8 * np.mean(history[:4])
    history = [line["teacher.loss"] for line in read_log(folder / "teacher")]
    assert np.mean(history[-8:]) < 0.95 * np.mean(history[:8])
    trained, given = load_checkpoint(teacher), load_checkpoint(autoencoder)
    for name, tensor in given.vae.state_dict().items():
        torch.testing.assert_close(trained.vae.state_dict()[name], tensor)
    assert given.vae.config.scaling_factor != 0.18215

    stage = distillation(
        adapter_rank=0, teacher=str(teacher), latent_steps=8, train_decoder=True,
        tavsd_weight=TimestepRamp(0.01, 0.01), **FEW_TEXTS,
    )  # fmt: skip
    config = make_config(
        networks, photos, tmp_path / "run", stage, vae=str(autoencoder), steps=32, batch_size=4,
        save_every=100,
    )  # fmt: skip
    model = Trainer(config).train()
    lines = read_log(tmp_path / "run")
    assert all(line["step"] == i + 1 for i, line in enumerate(lines))
    latent = [line["student.latent"] for line in lines[:8]]
    assert np.mean(latent[-4:]) < np.mean(latent[:4])
    mse = [line["student.mse"] for line in lines[8:]]
    assert np.mean(mse[-12:]) < np.mean(mse[:12])
    assert all(np.isfinite(line["fake_score.loss"]) for line in lines)
    image = Image.open(photos / "0.png")
    assert TADSRPipeline.from_pretrained(model)(image, 300, process_size=0).size == (448, 384)


def test_images_are_compared_with_what_a_restorer_makes_as_the_timestep_says(
    networks, photos, tmp_path
):
    data = DataConfig(
        str(photos), crop_px=32, num_workers=0, restored=RestoredConfig(str(tmp_path / "kept"), 4)
    )
    stage = distillation(
        adapter_rank=0, tavsd_weight=TimestepRamp(0, 0), mse_weight=TimestepRamp(0, 0),
        l1_weight=TimestepRamp(1, 1), gradient_weight=TimestepRamp(2, 2),
        restored_share=TimestepRamp(0, 1.5), perceptual_weight=TimestepRamp(3, 3),
        perceptual_restored_share=TimestepRamp(0, 1.5),
    )  # fmt: skip

    def restorer(lq):
        return F.interpolate(1 - lq, scale_factor=4)

    trainer = Trainer(
        make_config(networks, photos, tmp_path / "run", stage, data=data),
        perceptual=mse_per_sample,
        restorer=restorer,
    )
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


def test_an_encoder_is_fitted_to_a_decoder_that_stays(small_chain, networks, photos, tmp_path):
    _, autoencoder, _ = small_chain
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0, train_decoder=False)
    config = make_config(
        networks, photos, tmp_path / "run", stage, vae=str(autoencoder), steps=2
    )  # fmt: skip
    fitted, given = load_checkpoint(Trainer(config).train()).vae, load_checkpoint(autoencoder).vae
    assert fitted.config.scaling_factor == given.config.scaling_factor
    for name, tensor in given.decoder.state_dict().items():
        torch.testing.assert_close(fitted.decoder.state_dict()[name], tensor, rtol=0, atol=0)
    assert not fitted.encoder.conv_in.weight.equal(given.encoder.conv_in.weight)


@pytest.fixture(scope="module")
def distilled(official, photos, tmp_path_factory):
    """A trainer that has trained, the values of its modules before, and its model."""
    output = tmp_path_factory.mktemp("distilled") / "run"
    data = DataConfig(str(photos), crop_px=64, num_workers=0)
    config = make_config(official, photos, output, distillation(), data=data)
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
    assert "3 steps, 6 samples of 64 px" in card
    assert str(run) not in card


def test_plain_stable_diffusion_is_a_starting_point(stable_diffusion, photos, tmp_path):
    config = make_config(stable_diffusion, photos, tmp_path / "run", distillation(),
                         data=DataConfig(str(photos), crop_px=64, num_workers=0))  # fmt: skip
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
    "copied fake score": {"fake_score_rank": 0},
    "with decoder": {"train_decoder": True},
    "chroma": {"chroma_mse_weight": TimestepRamp(1, 2), "plain_mse_weight": TimestepRamp(1, 0)},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains(name, small_chain, networks, photos, tmp_path):
    _, autoencoder, teacher = small_chain
    switches = SWITCHES[name]
    stage = distillation(adapter_rank=0, teacher=str(teacher), **{**FEW_TEXTS, **switches})
    config = make_config(networks, photos, tmp_path / "run", stage, vae=str(autoencoder), steps=2)
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


def test_every_weight_of_the_student_counts(small_chain, networks, photos, tmp_path):
    _, autoencoder, teacher = small_chain
    weights = {"mse": 0.7, "plain_mse": 1.3, "chroma_mse": 2.0, "perceptual": 0.3}
    stage = distillation(
        adapter_rank=0,
        teacher=str(teacher),
        perceptual="lpips",
        tavsd_weight=TimestepRamp(0.4, 0.4),
        gan_weight=TimestepRamp(0.2, 0.2),
        **{f"{name}_weight": TimestepRamp(value, value) for name, value in weights.items()},
        **FEW_TEXTS,
    )
    config = make_config(networks, photos, tmp_path / "run", stage, vae=str(autoencoder), steps=1)
    Trainer(config, perceptual=mse_per_sample).train()
    line = read_log(tmp_path / "run")[0]
    weights |= {"tavsd": 0.4, "gan": 0.2}
    parts = {name: weight * line[f"student.{name}"] for name, weight in weights.items()}
    assert all(abs(value) > 1e-5 for value in parts.values()), parts
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


def test_perceptual_distances_are_exact_under_every_precision(networks, photos, tmp_path):
    stages = {
        "student": distillation(
            adapter_rank=0, perceptual="lpips", perceptual_weight=TimestepRamp(1, 1),
            tavsd_weight=TimestepRamp(0, 0),
        ),
        "autoencoder": AutoencoderConfig(perceptual="lpips", perceptual_weight=1.0),
    }  # fmt: skip
    for name, stage in stages.items():
        distance = WatchedDistance()
        output = tmp_path / name
        config = make_config(networks, photos, output, stage, steps=1, precision="bf16")
        Trainer(config, perceptual=distance).train()
        assert distance.seen == {torch.float32}, name


def test_a_short_run_has_the_full_learning_rate(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(
        networks, photos, tmp_path / "run", stage, steps=20, optimizer=OptimizerConfig()
    )
    Trainer(config).train()
    assert {line["autoencoder.lr"] for line in read_log(tmp_path / "run")} == {5e-5}
    slow = OptimizerConfig(warmup_steps=3)
    config = dataclasses.replace(config, optimizer=slow, output=str(tmp_path / "slow"))
    with pytest.warns(TADSRWarning, match="warm-up of autoencoder takes 3 of the run's 20 steps"):
        Trainer(config)


def test_a_run_of_an_older_version_goes_on(networks, photos, tmp_path):
    config = make_config(networks, photos, tmp_path / "run", distillation(
        adapter_rank=0, tavsd_weight=TimestepRamp(0, 0)))  # fmt: skip
    Trainer(config)
    path = tmp_path / "run" / "config.json"
    older = json.loads(path.read_text())
    del older["stage"]["clamp_image"], older["data"]["lq_resize"]
    path.write_text(json.dumps(older))
    Trainer(config)
    older["stage"]["blurred"] = older["stage"].pop("blur")
    path.write_text(json.dumps(older))
    with pytest.raises(TADSRError, match=r"differs in .*stage\.blur"):
        Trainer(config)


def test_perceptual_distance_begins_elsewhere_on_each_pair(networks, photos, tmp_path):
    most, seen = 3, {}
    for shift in (0, most):
        seen[shift] = []

        def watched(pred, target, kept=seen[shift]):
            kept += zip(pred.detach(), target, strict=True)
            return mse_per_sample(pred, target)

        stage = distillation(
            adapter_rank=0,
            perceptual="lpips",
            perceptual_weight=TimestepRamp(1, 1),
            perceptual_shift_px=shift,
            tavsd_weight=TimestepRamp(0, 0),
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
        stage = distillation(
            adapter_rank=0,
            perceptual="none",
            tavsd_weight=TimestepRamp(0, 0),
            gan_weight=TimestepRamp(0, end),
            timestep_range=(0, 0),
        )
        output = tmp_path / str(end)
        Trainer(make_config(networks, photos, output, stage, steps=2)).train()
        lines.append(read_log(output)[-1])
    assert lines[1]["discriminator.loss"] == 0
    assert lines[1]["student.gan"] != 0
    assert lines[1]["student.loss"] == lines[0]["student.loss"]


def test_accumulated_gradients_are_those_of_the_whole_batch(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        output = tmp_path / str(batch_size)
        config = make_config(
            networks, photos, output, stage, batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        Trainer(config).train()
        results.append(trained_tensors(output, "autoencoder", 3))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=2e-5, rtol=1e-3)


def test_validation_writes_a_picture_and_figures(networks, photos, tmp_path):
    validation = ValidationConfig(
        str(photos), every_steps=2, num_images=2, crop_px=64, timesteps=(1, 800),
        keep_best="psnr_y",
    )  # fmt: skip
    stage = distillation(adapter_rank=0, tavsd_weight=TimestepRamp(0, 0))
    config = make_config(
        networks, photos, tmp_path / "run", stage, validation=validation, ema_decay=0.9,
        trackers=("tensorboard",),
    )  # fmt: skip
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_requests_save_and_the_next_run_goes_on(number, networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="lpips", perceptual_weight=0.1)
    config = make_config(networks, photos, tmp_path / "run", stage, steps=6, save_every=100)
    calls = []

    def interrupted(pred, target):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return mse_per_sample(pred, target)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(error, match=r"step 3 of 6; saved in .*_00000003\. .* goes on") as caught:
        Trainer(config, perceptual=interrupted).train()
    assert type(caught.value) is error
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    Trainer(config, perceptual=mse_per_sample).train()
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_loss_gone_wrong_stops_with_the_state_before_it(bad, networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="lpips", perceptual_weight=1.0)
    config = make_config(networks, photos, tmp_path / "run", stage, steps=30, save_every=100)
    calls = []

    def breaking(pred, target):
        calls.append(1)
        return mse_per_sample(pred, target) * (bad if len(calls) == 25 else 1)

    with pytest.raises(TrainingError, match=r"step 24, samples \[48, 49\] \(.+\.png"):
        Trainer(config, perceptual=breaking).train()
    saved = tmp_path / "run" / "checkpoints" / "failed_00000024"
    assert json.loads((saved / "progress.json").read_text())["step"] == 24
    assert all(t.isfinite().all() for t in load_file(saved / "autoencoder.safetensors").values())


def test_old_checkpoints_are_pruned(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage, steps=5, save_every=1)
    Trainer(config).train()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005"]


def test_a_finished_run_is_exported_again_and_a_longer_one_goes_on(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    model = Trainer(config).train()
    shutil.rmtree(model)
    assert Trainer(config).train() == model
    assert model.is_dir()
    Trainer(dataclasses.replace(config, steps=5)).train()
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_what_is_left_open_is_chosen_for_the_model(photos, tmp_path):
    """The form of five lines, with a model that has no teacher and no perceptual library."""
    data = DataConfig(str(photos), crop_px=32, num_workers=0)
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


@pytest.mark.parametrize("rank", [0, 2])
def test_any_checkpoint_of_a_run_is_a_model(rank, networks, photos, tmp_path):
    stage = distillation(adapter_rank=rank, tavsd_weight=TimestepRamp(0, 0))
    config = make_config(networks, photos, tmp_path / "run", stage, ema_decay=0.5)
    with pytest.raises(TrainingError, match="no step is done yet; train first"):
        Trainer(config).export()
    model = Trainer(config).train()
    names = ("vae", "unet")
    expected = {n: getattr(load_checkpoint(model), n).state_dict() for n in names}

    def check(source, is_equal=True):
        found = TADSRPipeline.from_pretrained(source)
        same = {
            tensor.equal(getattr(found, name).state_dict()[key])
            for name in names
            for key, tensor in expected[name].items()
        }
        assert same == {True} if is_equal else False in same

    checkpoints = tmp_path / "run" / "checkpoints"
    check(checkpoints / "step_00000003")
    check(checkpoints / "step_00000002", is_equal=False)
    shutil.rmtree(model)
    check(Trainer(config).export())  # of the newest checkpoint, without training
    # Another run starts from it, with the scale of its adapters.
    config = make_config(
        checkpoints / "step_00000003", photos, tmp_path / "next",
        dataclasses.replace(stage, adapter_rank=rank or None), steps=1,
    )  # fmt: skip
    trainer = Trainer(config)
    if rank:
        assert trainer.stage.checkpoint.adapters.alpha == 2 * rank
    trainer.train()


def test_a_full_disk_keeps_the_checkpoint_before(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    Trainer(config).train()
    checkpoints = tmp_path / "run" / "checkpoints"
    before = sorted(checkpoints.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger files fail to write: a checkpoint, and the log.
    for size, what in ((20_000, "step 4 cannot be"), (100, "run cannot be written after step 3")):
        trainer = Trainer(dataclasses.replace(config, steps=4))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(TrainingError, match=rf"{what}.* checkpoint is .*00003\. Make"):
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(checkpoints.iterdir()) == before
    Trainer(dataclasses.replace(config, steps=4)).train()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_is_said_and_the_run_goes_on(error, networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="lpips", perceptual_weight=1.0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    calls = []

    def full(pred, target):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return mse_per_sample(pred, target)

    with pytest.raises(TrainingError, match=r"step 3 does .*: gradient_checkpointing, precision"):
        Trainer(config, perceptual=full).train()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]
    Trainer(config, perceptual=full).train()
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3]


def test_two_runs_do_not_share_a_folder(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    trainer = Trainer(config)
    with locked(tmp_path / "run"):
        for act in (trainer.train, trainer.export, lambda: Trainer(config)):
            with pytest.raises(TrainingError, match="another process trains in it"):
                act()


def test_a_worker_that_dies_is_said_in_a_sentence(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="lpips", perceptual_weight=1.0)
    data = DataConfig(str(photos), crop_px=32, num_workers=1)
    config = make_config(networks, photos, tmp_path / "run", stage, data=data, steps=50)

    def killing(pred, target):
        for worker in multiprocessing.active_children():
            worker.kill()
        return mse_per_sample(pred, target)

    with pytest.raises(DataError, match=r"samples has died .* memory ran out.* last checkpoint"):
        Trainer(config, perceptual=killing).train()


def test_a_loaders_processes_end_at_once_although_a_traceback_holds_it(photos):
    # Else torch's handler of ending children tells of them wherever the process is by then.
    others = multiprocessing.active_children()
    data = open_data(DataConfig(str(photos), crop_px=32, num_workers=1), seed=0)
    batches = data.batches(batch_size=1)
    next(batches)
    assert len(multiprocessing.active_children()) == len(others) + 1
    with pytest.raises(ConnectionResetError) as lost:
        batches.throw(ConnectionResetError())
    assert multiprocessing.active_children() == others
    assert lost.tb is not None


def test_only_a_lost_connection_to_a_worker_is_called_its_death():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(EOFError) as lost:
        ours.recv()
    assert isinstance(explain_worker_failure(lost.value), DataError)
    with pytest.raises(ConnectionError) as other:
        raise ConnectionError("the tracker's server")
    assert explain_worker_failure(other.value) is other.value


def test_broken_photos_are_skipped_and_counted(networks, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("no image")
    Image.new("RGB", (200, 31)).save(folder / "low.png")
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, folder, tmp_path / "run", stage, steps=5)
    with pytest.warns(TADSRWarning, match=r"2 of 7 .* left out: 1 below 32 px and 1 unreadable"):
        trainer = Trainer(config)
    trainer.train()
    assert trainer.num_skipped > 0
    assert "broken.png" in (tmp_path / "run" / "log.jsonl").read_text()


def test_another_runs_folder_is_refused(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    Trainer(config)
    with pytest.raises(TADSRError, match=r"differs in seed, stage\.l1_weight"):
        Trainer(
            dataclasses.replace(config, seed=1, stage=dataclasses.replace(stage, l1_weight=2.0))
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(TADSRError, match="other files"):
        Trainer(dataclasses.replace(config, output=str(tmp_path / "other")))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_what_cannot_work_is_refused_before_the_first_step(
    official, networks, photos, tmp_path, monkeypatch
):
    def build(model, stage, **changes):
        return Trainer(make_config(model, photos, tmp_path / "run", stage, **changes))

    wrong = tmp_path / "v-prediction"
    shutil.copytree(official, wrong)
    path = wrong / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(scheduler))
    with pytest.raises(CheckpointError, match="epsilon"):
        build(wrong, distillation())
    with pytest.raises(CheckpointError, match="epsilon"):
        build(networks, distillation(adapter_rank=0, teacher=str(wrong)))
    with pytest.raises(ValueError, match="multiple of 8"):
        build(official, distillation(), data=DataConfig(str(photos), crop_px=36, num_workers=0))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty"):
        build(official, distillation(), data=DataConfig(str(empty), crop_px=32))
    with pytest.raises(ValueError, match=r"stage\.teacher"):
        build(networks, distillation(adapter_rank=0, tavsd_weight=TimestepRamp(1, 1)))
    with pytest.raises(ValueError, match="share their latents"):
        build(networks, distillation(adapter_rank=0, teacher=str(official)))
    with pytest.raises(ValueError, match="prompt must be one of"):
        build(
            networks,
            distillation(adapter_rank=0, tavsd_weight=TimestepRamp(0, 0)),
            data=DataConfig(str(photos), crop_px=32, prompt="a cat"),
        )
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        build(networks, AutoencoderConfig(), precision="fp16")
    with pytest.raises(ValueError, match="compile needs a GPU"):
        build(networks, AutoencoderConfig(), compile=True)
    with pytest.raises(TADSRError, match="pip install wandb"):
        build(networks, AutoencoderConfig(), trackers=("wandb",))
    for plugin, value in {
        "FSDP": "true",
        "DEEPSPEED": "True",
        "PARALLELISM_CONFIG": "true",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{plugin}", value)
            with pytest.raises(TrainingError, match=rf"set to {plugin}.*--multi_gpu"):
                build(networks, AutoencoderConfig())
    with pytest.raises(ValueError, match="adapter_rank"):
        build(official, distillation(adapter_rank=8))
    with pytest.raises(TADSRError, match=r"tadsr\[train\]"):
        build(official, DistillationConfig(perceptual="lpips"))
    with pytest.raises(TrainingError, match="must be a folder that can be written"):
        Trainer(
            make_config(networks, photos, networks, AutoencoderConfig("autoencoder", "none", 1, 0))
        )
    unseen = ValidationConfig(str(photos), crop_px=32, keep_best="perceptual")
    with pytest.raises(ValueError, match="must have a perceptual distance for 'perceptual'"):
        build(networks, AutoencoderConfig("autoencoder", "none", 1, 0), validation=unseen)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{photos}/{i}.png {photos}/missing.png\n" for i in range(2)))
    with pytest.raises(ValueError, match=r"of 2 in .* 2 without a readable LQ of a fitting size"):
        build(networks, AutoencoderConfig(), data=DataConfig(str(listed), crop_px=32))
    with pytest.raises(ValueError, match=r"of 4 in .* 4 below 128 px \(.* side of 96 px\)"):
        build(networks, AutoencoderConfig(), data=DataConfig(str(photos), crop_px=128))
    assert not (tmp_path / "run").exists()


def test_the_speed_of_a_continued_run_counts_its_own_steps(networks, photos, tmp_path):
    stage = AutoencoderConfig(perceptual="none", perceptual_weight=0)
    config = make_config(networks, photos, tmp_path / "run", stage)
    Trainer(config).train()
    trainer = Trainer(dataclasses.replace(config, steps=4))
    trainer.log.start_clock(3)
    time.sleep(0.2)
    assert trainer.log.speed(samples_per_step=2, step=4)["images_per_second"] <= 2 / 0.2


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
