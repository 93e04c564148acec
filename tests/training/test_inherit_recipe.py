"""The recipe by which a small model inherits from a restoration network, at tiny sizes."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tadsr import TADSRPipeline
from tadsr.measure.perceptual import SqueezeNetDistance

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "tiny"
WIDTH, GROWTH = 8, 4
STEPS = {"decoder": 2, "features": 1, "imitate": 1, "joint": 2, "settle": 2}


@pytest.fixture
def inherit(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("inherit")


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks") / "networks.yaml"
    configs = yaml.safe_load((RECIPE / "inherited_networks.yaml").read_text())
    configs["vae"] |= {"block_out_channels": [8, 8, 8], "latent_channels": WIDTH}
    configs["unet"] |= {
        "in_channels": WIDTH, "out_channels": WIDTH, "block_out_channels": [8, 8, 8],
        "cross_attention_dim": 4, "layers_per_block": 1,
    }  # fmt: skip
    configs["prompt_embeddings"]["embedding_dim"] = 4
    path.write_text(yaml.safe_dump(configs))
    return path


@pytest.fixture(scope="session")
def restorer(tmp_path_factory):
    """A network of RealESRGAN's architecture with one block, at random weights."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"conv_first": (3, WIDTH), "conv_last": (WIDTH, 3)}
    sizes |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (WIDTH, WIDTH))
    for dense in range(1, 4):
        for i in range(5):
            name = f"body.0.rdb{dense}.conv{i + 1}"
            sizes[name] = (WIDTH + i * GROWTH, GROWTH if i < 4 else WIDTH)
    tensors = {}
    for name, (inner, outer) in sizes.items():
        tensors[f"{name}.weight"] = torch.randn(outer, inner, 3, 3, generator=generator) * 0.1
        tensors[f"{name}.bias"] = torch.full((outer,), 0.1)
    path = tmp_path_factory.mktemp("restorer") / "network.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def train(inherit, photos, networks, restorer, squeezenet):
    def run(out, *options, **limits):
        arguments = [
            "--photos", photos, "--networks", networks, "--restorer", restorer, "--perceptual",
            squeezenet, "--out", out, "--device", "cpu", "--precision", "fp32", "--batch", 2,
            "--crop-px", 64, "--pool", 4, "--group", 2, "--refresh-every", 2, "--held-out", 1,
            "--held-out-px", 64, "--every", 2, *options,
        ]  # fmt: skip
        for name, steps in (STEPS | limits).items():
            arguments += [f"--{name}", steps]
        inherit.main([str(argument) for argument in arguments])

    return run


def test_a_run_that_was_stopped_gives_what_one_gives_that_was_not(train, tmp_path):
    train(tmp_path / "whole")
    for place in ([0, 1], [1, 0], [2, 0], [3, 0], [3, 1], [4, 0], [4, 1]):
        train(tmp_path / "parts", "--seconds", 0)  # a step, whatever happens
        state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
        assert state["place"][:2] == place
    train(tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["place"][0] == len(STEPS)
    torch.testing.assert_close(whole["student"], parts["student"], rtol=0, atol=0)

    pipe = TADSRPipeline.from_pretrained(tmp_path / "whole" / "model")
    photo = torch.rand(1, 3, 18, 16)
    images = [pipe(photo, timestep=t, output_type="pt") for t in (1, 900)]
    assert images[0].shape == (1, 3, 72, 64)
    assert not torch.equal(*images)
    stored = load_file(tmp_path / "whole" / "networks.safetensors")
    assert torch.equal(stored["unet.conv_in.weight"].float(), pipe.unet.conv_in.weight.cpu())


def test_a_stage_changes_its_own_part_and_is_logged(train, tmp_path):
    found = []
    for decoder in (0, 2):
        train(tmp_path / str(decoder), decoder=decoder, features=0, imitate=0, joint=0, settle=0)
        stored = load_file(tmp_path / str(decoder) / "networks.safetensors")
        names = ("vae.decoder.conv_in", "unet.conv_in", "vae.quant_conv")
        found.append([stored[f"{name}.weight"] for name in names])
    changed = [not torch.equal(*pair) for pair in zip(*found, strict=True)]
    assert changed == [True, False, False]
    lines = (tmp_path / "2" / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["stage"] for entry in entries][:2] == ["decoder", "decoder"]
    assert "restorer" in entries[-1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_samples_at_small_timesteps_can_be_given_a_share(share, inherit, networks, squeezenet):
    stages = importlib.import_module("inherit_stages")
    parts = importlib.import_module("inherit_networks")
    setting = parts.Setting(
        parts.build_student(networks, 0)[1], None, SqueezeNetDistance(squeezenet), None,
        torch.device("cpu"), None, dict.fromkeys(STEPS, 1e-3), 0, share,
    )  # fmt: skip
    stage = stages.JointStage(setting)
    pool = SimpleNamespace(draw=lambda rng, count: {})
    stage.take(pool, 0, 64)
    assert (stage.batch["timesteps"].max() < stages.FAITHFUL_BELOW) == (share == 1)


def kept(hq, lq, kinds):
    return {"hq": hq, "lq": lq, "kinds": kinds}


def test_some_samples_can_be_as_a_camera_takes_them(inherit, photos):
    samples = importlib.import_module("inherit_samples")
    steps, errors = [], []
    for share in (0.0, 0.6):
        pool = samples.Pool(
            sorted(photos.iterdir()), {}, stage=0, crop_px=64, size=32, group=32, workers=0,
            seed=0, refreshments=0, describe=kept, device=torch.device("cpu"), shares=[share, 0.0],
        )  # fmt: skip
        hq, lq = (samples.to_images(pool.kept[name]) for name in ("hq", "lq"))
        steps.append(hq.diff(dim=-1).square().mean((1, 2, 3)).sqrt())
        errors.append((F.interpolate(hq, lq.shape[-2:], mode="area") - lq).abs().mean())
    assert errors[1] < 0.8 * errors[0]
    differs = steps[0] != steps[1]  # the others are the same samples as before
    assert 0.4 < differs.float().mean() < 0.8
    assert steps[1][differs].mean() < 0.9 * steps[0][differs].mean()


def test_some_samples_can_be_jpegs_and_no_worse(inherit, photos):
    samples = importlib.import_module("inherit_samples")
    pool = samples.Pool(
        sorted(photos.iterdir()), {}, stage=0, crop_px=64, size=32, group=32, workers=0,
        seed=0, refreshments=0, describe=kept, device=torch.device("cpu"), shares=[0.3, 0.4],
    )  # fmt: skip
    hq, lq = (samples.to_images(pool.kept[name]) for name in ("hq", "lq"))
    kinds = pool.kept["kinds"]
    assert set(kinds.tolist()) == {0, 1, 2}
    errors = (F.interpolate(hq, lq.shape[-2:], mode="bicubic", antialias=True) - lq).abs()
    saved = list(samples.KINDS).index("saved")
    by_kind = [errors[kinds == kind].mean() for kind in range(3)]
    assert 0 < by_kind[saved] < 0.5 * by_kind[0]


@pytest.fixture
def setting(inherit, networks, squeezenet):
    parts = importlib.import_module("inherit_networks")
    return parts.Setting(
        parts.build_student(networks, 0)[1], None, SqueezeNetDistance(squeezenet), None,
        torch.device("cpu"), None, dict.fromkeys(STEPS, 1e-3), 0,
    )  # fmt: skip


@pytest.fixture
def settling(inherit, setting):
    """A settle stage with a batch of which the second half is drawn vividly."""
    with torch.no_grad():
        setting.student.vae.decoder.conv_out.weight.mul_(0.1)  # pictures stay within [-1, 1]
    stage = inherit.SettleStage(setting)
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.rand(4, 3, 64, 64, generator=generator) for name in ("hq", "lq")}
    inside = torch.arange(57)
    stage.batch = images | {
        "timesteps": torch.tensor([0, 10, 200, 900]), "rows": inside, "columns": inside,
    }  # fmt: skip
    return stage


@pytest.mark.parametrize(("kind", "is_kept"), [("usual", True), ("camera", True), ("saved", False)])
def test_settling_keeps_what_was_drawn_but_of_jpegs(kind, is_kept, settling):
    samples = importlib.import_module("inherit_samples")
    settling.batch["kinds"] = torch.full((4,), list(samples.KINDS).index(kind))
    lq, timesteps = settling.batch["lq"], settling.batch["timesteps"]
    with torch.no_grad():  # an original that has all the fine structure of what is drawn
        settling.batch["hq"] = settling.setting.restored(lq, timesteps).image
    settling.step()
    for name in ("other", "l1", "detail"):
        assert (settling.figures[name] < 1e-6) == is_kept
    settling.step()
    assert settling.figures["l1"] > 0


def test_settling_takes_away_what_the_original_has_not(settling):
    settling.batch |= {"kinds": torch.zeros(4, dtype=torch.int64), "hq": torch.zeros(4, 3, 64, 64)}
    settling.step()
    assert settling.figures["l1"] > 1e-3


@pytest.mark.parametrize("kind", range(3))
def test_blocks_count_at_their_own_end_and_without_jpeg_only_the_grid(kind, settling):
    settle = importlib.import_module("inherit_settle")
    settling.batch["kinds"] = torch.full((4,), kind)
    expected = torch.zeros_like(settling.excess, dtype=torch.bool)
    for end, timestep in enumerate((settle.KEPT_FROM - 1, settle.KEPT_FROM)):
        settling.batch["timesteps"] = torch.full((4,), timestep)
        settling.step()
        expected[end, :, 7] = True  # a wave of 4 px
        if kind == 2:
            expected[end] = True
        assert torch.equal(settling.excess != 0, expected)


def test_networks_alone_go_on_with_new_optimizers(train, tmp_path):
    limits = {"decoder": 0, "features": 0, "imitate": 0, "settle": 0}
    train(tmp_path, "--seconds", 0, **limits)
    (tmp_path / "state.pt").unlink()
    train(tmp_path, **limits)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, lines) if entry["stage"] == "joint"]
    assert steps[-1] == STEPS["joint"]


@pytest.mark.parametrize(("weights", "expected"), [([], 4.0), (["--weights", "2", "1", "1"], 3.25)])
def test_states_have_a_mean(weights, expected, inherit, tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("early", "later", "last")]
    for path, value in zip(paths, (1.0, 3.0, 8.0), strict=True):
        tensors = {"weight": torch.full((2,), value, dtype=torch.float16)}
        if value > 1:  # a run that starts with the last stage has none
            tensors["whitening.0"] = torch.zeros(1)
        save_file(tensors, path, metadata={"place": path})
    out = str(tmp_path / "runs" / "mean.safetensors")
    monkeypatch.setattr(sys, "argv", ["average.py", *paths, *weights, "--out", out])
    importlib.import_module("average").main()
    with safe_open(out, "pt") as mean:
        assert mean.get_tensor("weight").equal(torch.full((2,), expected, dtype=torch.float16))
        assert mean.metadata() == {"place": paths[2]}
        assert list(mean.keys()) == ["weight"]


@pytest.mark.parametrize(
    ("weights", "said"),
    [(["1"], "must be 2 numbers, got 1"), (["1", "-1"], "a sum above 0, got 0")],
)
def test_weights_that_make_no_mean_are_refused(
    weights, said, inherit, tmp_path, monkeypatch, capsys
):
    options = ["early", "late", "--weights", *weights, "--out", str(tmp_path / "mean")]
    monkeypatch.setattr(sys, "argv", ["average.py", *options])
    with pytest.raises(SystemExit):
        importlib.import_module("average").main()
    assert said in capsys.readouterr().err


def test_a_finished_model_goes_through_the_last_stages_again(train, tmp_path):
    train(tmp_path / "first", decoder=0, features=0, imitate=0, joint=0, settle=0)
    train(tmp_path / "second", "--start", tmp_path / "first" / "model", joint=0, settle=0)
    train(tmp_path / "third", "--start", tmp_path / "first" / "model")
    first, second, third = (
        load_file(tmp_path / name / "networks.safetensors") for name in ("first", "second", "third")
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert not torch.equal(third["unet.conv_in.weight"], first["unet.conv_in.weight"])
    lines = (tmp_path / "third" / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"joint", "settle"}


def test_photographs_are_packed_and_the_same_ones_held_out(inherit, photos, tmp_path):
    samples = importlib.import_module("inherit_samples")
    inherit.main(["--photos", str(photos), "--pack", str(tmp_path)])
    packed = samples.split_photos([str(tmp_path / "00")], 2)
    found = samples.split_photos([str(photos)], 2)
    for ours, theirs in zip(packed, found, strict=True):
        assert [p.stem for p in ours] == [p.stem for p in theirs]


def test_pictures_are_chosen_one_by_one(inherit):
    chosen = importlib.import_module("inherit_samples").chosen
    first, second = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert chosen(torch.tensor([True, False]), first, second).mean((1, 2, 3)).tolist() == [0, 1]


def test_adversaries_are_shown_the_closer_picture_and_count_for_little_at_first(setting):
    stages = importlib.import_module("inherit_stages")
    with torch.no_grad():
        setting.student.vae.decoder.conv_out.weight.mul_(1e-4)  # it draws the second original
    stage = stages.JointStage(setting)
    hq = torch.stack([torch.linspace(-1, 1, 64), torch.zeros(64)])
    hq = hq.view(2, 1, 1, 64).expand(2, 3, 64, 64).clone()
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    restored = hq + noise * torch.tensor([0.001, 1.0]).view(-1, 1, 1, 1)
    inside = torch.arange(64 - stages.SHIFT_PX)
    stage.batch = {
        "hq": hq, "lq": hq, "restored": restored, "timesteps": torch.tensor([900, 900]),
        "rows": inside, "columns": inside,
    }  # fmt: skip
    shown = []
    stage.adversaries.pixels.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    stage.step()
    good = shown[-1][:2]  # of the pass that the adversaries learn from; the student's follow
    assert torch.equal(good[0], restored[0, :, :57, :57])
    assert torch.equal(good[1], hq[1, :, :57, :57])
    assert stage.adversaries.trust == pytest.approx(1 / stages.ADVERSARIES_STEPS)


def test_what_is_replayed_depends_on_its_argument_alone(inherit):
    recording = importlib.import_module("inherit_recording")
    double = recording.Replayed(lambda x: x * 2, is_recorded=False)
    argument = torch.ones(2)
    assert double(argument).tolist() == [2, 2]
    assert double(argument + 1).tolist() == [4, 4]
    assert argument.tolist() == [1, 1]


def test_the_restorer_takes_the_released_names_and_draws_four_times_the_size(inherit, restorer):
    network = importlib.import_module("inherit_networks").Restorer(restorer)
    image = network.draw(network.features(torch.rand(1, 3, 6, 5) * 2 - 1))
    assert image.shape == (1, 3, 24, 20)
    assert np.isfinite(image.numpy()).all()


def test_packing_cuts_the_middle(inherit):
    samples = importlib.import_module("inherit_samples")
    photo = np.asarray(Image.linear_gradient("L").convert("RGB"))
    assert samples.middle(photo, 400).shape == (256, 256, 3)
    assert samples.middle(photo, 16)[0, 0, 0] == 120


class Watch(TorchDispatchMode):
    """Refuse what waits for a number of the device, which no CUDA graph can hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_step_waits_for_no_number(number, inherit, setting, monkeypatch):
    # A GPU's AdamW counts its steps there; a CPU's does not.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: None)
    stages = importlib.import_module("inherit_stages")
    stage = inherit.STAGES[number](setting)
    images = {name: torch.rand(2, 3, 64, 64) for name in ("hq", "lq", "restored")}
    inside = torch.arange(64 - stages.SHIFT_PX)
    stage.batch = images | {
        "features": torch.rand(2, WIDTH, 16, 16), "timesteps": torch.tensor([3, 900]),
        "kinds": torch.tensor([1, 2]),
        "rows": inside, "columns": inside,
    }  # fmt: skip
    stage.step()
    before = {name: values.data_ptr() for name, values in stage.figures.items()}
    with Watch():
        stage.step()
    assert {name: values.data_ptr() for name, values in stage.figures.items()} == before
