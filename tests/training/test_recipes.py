"""Recipes that users copy are valid, and their errors say what to mend."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tadsr.checkpoints.layout import BASE_MODEL
from tadsr.degradation import PRESETS
from tadsr.training import (
    AutoencoderConfig,
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    RestoredConfig,
    TimestepRamp,
    TrainingConfig,
    ValidationConfig,
    load_recipe,
)
from tadsr.training.recipe import config_from_mapping

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SHIPPED = sorted(p for p in RECIPES.rglob("*.yaml") if not p.name.endswith("networks.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(RECIPES).as_posix())
def test_every_shipped_recipe_is_valid(path):
    config = load_recipe(path)
    assert config_from_mapping(TrainingConfig, asdict(config)) == config
    if path.parent.name == "tiny" and config.model.endswith(".yaml"):
        assert Path(config.model).is_file()


def test_the_papers_recipe_is_the_default_and_what_the_published_code_adds():
    config = load_recipe(RECIPES / "paper.yaml")
    assert config.model == BASE_MODEL
    assert config.stage == DistillationConfig(
        adapter_rank=4,
        perceptual="lpips",
        tavsd_weight=TimestepRamp(1, 1),
        clamp_image=True,
        sample_posterior=True,
    )
    assert config.optimizer == OptimizerConfig()
    assert config.steps == TrainingConfig("m", "d", "o").steps
    assert config.data.captions == "tags.jsonl"  # never the empty prompt for all


PLAIN_VSD = {"vsd_timestep": "uniform", "vsd_range": (20, 979)}
PLAIN_ENCODER = {"tae": False}
TABLES = {  # the rows of Tables 2 and 4
    "baseline": PLAIN_ENCODER | PLAIN_VSD,
    "without_tae": PLAIN_ENCODER,
    "without_tavsd": PLAIN_VSD,
    "without_blur": {"blur": False},
}
ABLATIONS = {
    **TABLES,
    **{f"lambda_{value}": {"vsd_lambda": value} for value in (0.25, 0.5, 0.75)},
    **{f"gamma_{value}": {"vsd_gamma": value} for value in (0, 50, 100)},
    "fixed_vsd": {"vsd_timestep": "fixed", "vsd_fixed": 500},
    "constant_guidance": {"guidance_slope": 0},
    "timestep_grid": {"timestep_grid": 50, "timestep_range": (1, 999)},
}
SMALL_ABLATIONS = TABLES | {"without_distillation": {"tavsd_weight": TimestepRamp(0, 0)}}


@pytest.mark.parametrize(
    ("full", "ablations"),
    [("paper.yaml", ABLATIONS), ("tiny/ablations/full.yaml", SMALL_ABLATIONS)],
)
def test_each_ablation_is_the_papers_row_and_nothing_else(full, ablations):
    full = RECIPES / full
    folder = full.parent if full.stem == "full" else full.parent / "ablations"
    whole = load_recipe(full)
    assert {p.stem for p in folder.glob("*.yaml")} - {full.stem} == set(ablations)
    for name, changes in ablations.items():
        recipe = load_recipe(folder / f"{name}.yaml")
        expected = replace(whole.stage, **changes)
        assert recipe == replace(whole, stage=expected, output=recipe.output), name
        assert recipe.output != whole.output


def write(path, text):
    path.write_text(text)
    return path


MINIMAL = "{model: m, data: d, output: o}"
DEGRADED = "{model: m, output: o, data: {source: d, degradation: %s}}"


def test_options_win_over_the_recipe_and_keep_its_other_values(tmp_path):
    write(tmp_path / "base.yaml", "{model: m, data: {source: d, crop_px: 64}, output: o}")
    recipe = write(tmp_path / "r.yaml", "{extends: base.yaml, stage: {vsd_lambda: 0.25}}")
    config = load_recipe(
        recipe,
        {"data.source": "mine: #1", "stage.mse_weight": {"start": 1, "end": 2}, "steps": 5,
         "stage.perceptual_weight": 0},
    )  # fmt: skip
    assert config.data == DataConfig("mine: #1", crop_px=64)
    assert config.stage.vsd_lambda == 0.25
    assert config.stage.mse_weight == TimestepRamp(1, 2)
    assert config.stage.perceptual_weight == TimestepRamp(0, 0)
    assert config.steps == 5
    short = write(tmp_path / "s.yaml", MINIMAL)
    assert load_recipe(short, {"data.crop_px": 64}).data == DataConfig("d", crop_px=64)
    # A text for the data is their source, in a recipe too.
    recipe = write(tmp_path / "r.yaml", "{extends: base.yaml, data: mine}")
    assert load_recipe(recipe).data == DataConfig("mine", crop_px=64)
    # A part of the degradation changes the default preset, or the one that the recipe names.
    for text in (MINIMAL, DEGRADED % "mild", DEGRADED % "{final_sinc_probability: 0}"):
        recipe = write(tmp_path / "d.yaml", text)
        found = load_recipe(recipe, {"data.degradation.final_sinc_probability": 0.5}).data
        preset = PRESETS["mild" if "mild" in text else "realesrgan"]
        assert found.degradation == replace(preset, final_sinc_probability=0.5)


def test_a_degradation_is_ranges_of_ones_own_or_starts_from_a_preset(tmp_path):
    text = """{model: m, output: o, data: {source: d, degradation: {preset: realesrgan,
        final_sinc_probability: 0,
        stages: [{jpeg_quality: [60, 80]}, {blur: {sigma_px: [1, 2]}}]}}}"""
    found = load_recipe(write(tmp_path / "r.yaml", text)).data.degradation
    preset = PRESETS["realesrgan"]
    first, second = preset.stages
    first = replace(first, jpeg_quality=(60, 80))
    second = replace(second, blur=replace(second.blur, sigma_px=(1, 2)))
    assert found == replace(preset, final_sinc_probability=0, stages=(first, second))
    config = TrainingConfig("m", DataConfig("d", degradation=found), "o")
    assert config_from_mapping(TrainingConfig, asdict(config)) == config
    with pytest.raises(ValueError, match=r"ranges or one of realesrgan, .*got 'webb'"):
        DataConfig("d", degradation="webb")


def test_the_kind_chooses_the_stage(tmp_path):
    text = "{model: m, data: d, output: o, stage: {kind: autoencoder, kl_weight: 1e-5}}"
    stage = load_recipe(write(tmp_path / "r.yaml", text)).stage
    assert stage == AutoencoderConfig(kl_weight=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "mapping"),
        ("{model: [", "readable YAML"),
        ("{model: m, data: d}", "needs output"),
        ("{model: m, extends: r.yaml}", "must not extend itself"),
        ("{model: m, extends: ../it/r.yaml}", "must not extend itself"),
        ("{model: m, extends: [r.yaml]}", r"extends must name one recipe, got \['r"),
        ("model: m\nsteps: 5\noutput: o\nsteps: 7", "steps must stand once.* lines 2 and 4"),
        ("{<<: {steps: 1}, steps: 2, stage: {blur: no,\n blur: yes}}", "blur .*lines 1 and 2"),
        ("{model: m, data: {source: d, crop_px: 30}, output: o}", "crop_px must be"),
        ("{model: m, data: d, output: ''}", "output must be a path or a name"),
        (DEGRADED % "{preset: [mild]}", "ranges or one of realesrgan"),
        (DEGRADED % "[mild]", "data.degradation must be str or a Degradation.* mapping., got"),
        (
            DEGRADED % "{preset: mild, stages: [{blur: {sigmapx: [1, 2]}}]}",
            r"data\.degradation\.stages\.blur has the unknown sigmapx\. Did you mean sigma_px\?",
        ),
        ("step: 3", r"unknown step\. Did you mean steps\?"),
        ("steps: many", "steps must be int"),
        ("steps: 2.5", "steps must be int"),
        ("steps: '5'", "steps must be int, got '5'"),
        ("steps: 1:30", "steps must be int, got '1:30'"),
        ("gradient_checkpointing: 1", "must be bool"),
        ("tf32: 'no'", "tf32 must be bool, got 'no'"),
        ("precision: fp8", "must be one of 'fp32'"),
        ("trackers: wandb", r"must be a list \[one of 'tensor"),
        ("stage: {kind: gan}", "kind must be one of"),
        ("stage: {kind: [gan]}", "kind must be one of"),
        ("stage: {vsd_range: [1]}", "vsd_range must have 2 values"),
        ("stage: {guidance: .inf}", "must be a finite number"),
        ("stage: {mse_weight: .nan}", r"stage\.mse_weight must be a finite"),
        ("stage: {l1_weight: '2'}", "l1_weight must be a number or a Timestep"),
        (
            "stage: {fake_score_optimizer: {learnin_rate: 1}}",
            r"stage\.fake_score_optimizer has the unknown learnin_rate\. Did you mean learn",
        ),
        ("optimizer: {momentum: 1}", "It has learning_rate, muon"),
        ("optimizer: {betas: [0.9, .nan]}", "betas must be a fini"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong_and_where(text, message, tmp_path):
    (tmp_path / "it").mkdir()
    is_part = text[0] not in "[{" and "\n" not in text
    path = write(tmp_path / "it" / "r.yaml", MINIMAL[:-1] + f", {text}}}" if is_part else text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(path)
    assert "it/r.yaml" in str(caught.value)


NAN, INF = float("nan"), float("inf")
REFUSED = [
    (TimestepRamp, (-1, 0), {}), (TimestepRamp, (0, 1), {"exponent": 0}),
    (RestoredConfig, ("f",), {"num_samples": 0}),
    *((OptimizerConfig, (), {name: value}) for name, value in [
        ("learning_rate", 0), ("betas", (0.9, 1.0)), ("final_fraction", 2), ("warmup_steps", -1),
    ]),
    *((AutoencoderConfig, (), {name: value}) for name, value in [
        ("chroma_weight", -1), ("kind", "teacher"), ("perceptual", "none"),
    ]),
    (DistillationConfig, (), {"adapter_rank": 0, "adapter_alpha": 8}),
    *((DistillationConfig, (), {name: value}) for name, value in [
        ("adapter_rank", -1), ("fake_score_alpha", 0), ("fake_score_alpha", INF),
        ("perceptual_shift_px", -1), ("timestep_grid", 1), ("timestep_range", (5, 1)),
        ("timestep_range", (5,)), ("guidance_slope", NAN), ("vsd_range", (0, 1000)),
        ("vsd_lambda", -1), ("perceptual", "none"), ("perceptual_weight", "2"),
    ]),
    (DataConfig, ("d",), {"crop_px": 40, "scale": 3}),
    (DataConfig, ("d",), {f"{name}_probability": 0.4 for name in ("mild", "bicubic", "web")}),
    *((DataConfig, ("d",), {name: value}) for name, value in [
        ("min_zoom", 0), ("max_zoom", 0.5),
        ("degrade_on", "gpu"), ("crop_px", 12), ("degradation", "blur"),
        ("bicubic_probability", 2), ("mild_probability", -1), ("prompt_dropout", -1),
        ("kind", "zip"), ("num_workers", -1), ("shuffle_buffer", 0),
    ]),
    (ValidationConfig, (), {"timesteps": (1000,)}), (ValidationConfig, (), {"num_images": 0}),
    (TrainingConfig, ("m", ["a", "b"], "o"), {}), (TrainingConfig, ("m", "d", None), {}),
    *((TrainingConfig, ("m", "d", "o"), {name: value}) for name, value in [
        ("steps", 0), ("steps", "5"), ("steps", True), ("steps", INF), ("ema_decay", 1.0),
        ("seed", -1), ("precision", "fp8"), ("max_loss_ratio", 1.0), ("trackers", ("print",)),
        ("tf32", "no"), ("stage", {"kind": "teacher"}),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "changes"), REFUSED)
def test_values_out_of_range_are_refused(kind, arguments, changes):
    with pytest.raises(ValueError, match="must"):
        kind(*arguments, **changes)


def test_python_takes_what_a_recipe_takes():
    config = TrainingConfig(
        "m", Path("d"), "o", steps=1e3, seed=np.int64(3), trackers=["wandb"],
        validation=ValidationConfig(timesteps=[1, 2]), stage=DistillationConfig(tavsd_weight=0),
    )  # fmt: skip
    assert config_from_mapping(TrainingConfig, json.loads(json.dumps(asdict(config)))) == config
    assert (config.data.source, config.steps, type(config.seed)) == ("d", 1000, int)
    assert (config.trackers, config.validation.timesteps) == (("wandb",), (1, 2))
    assert config.stage.tavsd_weight == TimestepRamp(0, 0)


def test_a_ramp_changes_by_its_exponent():
    timesteps = torch.tensor([0, 111, 444, 999])  # ninths of the last: 0, 1, 4, 9
    assert_close(TimestepRamp(3, 9).at(timesteps), torch.tensor([3, 3 + 6 / 9, 3 + 24 / 9, 9]))
    steep = TimestepRamp(6, 0, exponent=0.5).at(timesteps)
    assert_close(steep, torch.tensor([6.0, 4.0, 2.0, 0.0]))


def test_a_recipe_means_what_it_seems_to(tmp_path, monkeypatch):
    """With numbers that YAML 1.1 reads as texts and as other numbers, and a shell's paths."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    text = """\ufeffmodel: ~/m\r
        data: {source: $SCRATCH/d}\r
        output: ${SCRATCH}/2026-11-26\r
        stage: {<<: {guidance: 1}, guidance: 1e+1, fake_score_optimizer: &o {learning_rate: 1e-4}}\r
        optimizer: {<<: *o, max_grad_norm: inf, weight_decay: .5}\r
        steps: 2e3\r
        seed: 0100\r
        validation: {timesteps: [1, 2], photos: ~/v}\r
        """
    path = tmp_path / "r.yaml"
    path.write_bytes(text.replace("\n        ", "\n").encode())
    stage = DistillationConfig(guidance=10, fake_score_optimizer=OptimizerConfig(1e-4))
    assert load_recipe(path) == TrainingConfig(
        "/home/me/m", Path("/scratch/d"), Path("$SCRATCH/2026-11-26"), stage, steps=2000, seed=100,
        optimizer=OptimizerConfig(1e-4, max_grad_norm=math.inf, weight_decay=0.5),
        validation=ValidationConfig("/home/me/v", timesteps=(1, 2)),
    )  # fmt: skip
    address = "https://host/$SCRATCH/~.tar"  # a server would learn what the variable holds
    assert DataConfig(address).source == address
