"""Runs end, go on, and fail: what stays in their folders, and what is refused before them."""

import dataclasses
import itertools
import json
import multiprocessing
import resource
import shutil
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tadsr import TADSRError, TADSRPipeline
from tadsr.checkpoints import load_checkpoint
from tadsr.errors import CheckpointError, DataError, TADSRWarning, Terminated, TrainingError
from tadsr.training import (
    AutoencoderConfig,
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    TimestepRamp,
    Trainer,
    ValidationConfig,
)
from tadsr.training.data import open_data
from tadsr.training.losses import mse_per_sample
from tadsr.training.run_folder import locked
from tadsr.training.run_log import RunLog
from tadsr.training.stopping import explain_worker_failure

from .conftest import PLAIN, PLAIN_STUDENT, distillation, make_config, plain_data, read_log

COMPARED = AutoencoderConfig(perceptual="lpips", perceptual_weight=1.0)


def acting_at(number, act):
    """Return a perceptual distance that acts when it is computed for the n-th time."""
    calls = itertools.count(1)

    def distance(pred, target):
        if next(calls) == number:
            act()
        return mse_per_sample(pred, target)

    return distance


def steps_of(output):
    return [line["step"] for line in read_log(output)]


def test_a_short_run_has_the_full_learning_rate(configure, tmp_path):
    config = configure(steps=2, optimizer=OptimizerConfig())
    Trainer(config).train()
    assert {line["autoencoder.lr"] for line in read_log(tmp_path / "run")} == {5e-5}
    slow = OptimizerConfig(warmup_steps=3)
    config = dataclasses.replace(config, optimizer=slow, steps=20, output=str(tmp_path / "slow"))
    with pytest.warns(TADSRWarning, match="warm-up of autoencoder takes 3 of the run's 20 steps"):
        Trainer(config)


def test_damage_in_a_runs_folder_is_said_or_mended(configure, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    config = configure(data=plain_data(folder), save_every=3)
    Trainer(config).train()
    config = dataclasses.replace(config, steps=4)
    with (tmp_path / "run" / "log.jsonl").open("ab") as file:
        file.write(b"\0\xff\n")  # as a machine that lost its power leaves it
    (folder / "3.png").unlink()
    with pytest.warns(TADSRWarning, match="on 4 photos in photos so far and goes on with 3 photos"):
        Trainer(config).train()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    for name, content in (("optimizer.bin", b"x"), ("autoencoder.safetensors", b"x")):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be restored: .*; delete it to go on"):
            Trainer(config).train()


def test_a_run_goes_on_with_the_sample_after_the_last_whoever_saw_it(configure, tmp_path):
    config = configure(steps=2)
    Trainer(config).train()
    path = tmp_path / "run" / "checkpoints" / "step_00000002" / "progress.json"
    progress = json.loads(path.read_text())
    assert progress["num_samples"] == 4
    path.write_text(json.dumps(progress | {"num_samples": 16}))  # as by four processes
    seen = []
    trainer = Trainer(dataclasses.replace(config, steps=3))
    trainer._note_skipped = lambda batch: seen.append(batch.indices.tolist())
    assert "3 steps, 18 samples" in (trainer.train() / "README.md").read_text()
    assert seen == [[16, 17]]


def test_a_run_of_an_older_version_goes_on(configure, tmp_path):
    config = configure(PLAIN_STUDENT)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_requests_save_and_the_next_run_goes_on(configure, number, tmp_path):
    config = configure(COMPARED, steps=6, save_every=100)
    interrupted = acting_at(3, lambda: signal.raise_signal(number))
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(error, match=r"step 3 of 6; saved in .*_00000003\. .* goes on") as caught:
        Trainer(config, perceptual=interrupted).train()
    assert type(caught.value) is error
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    Trainer(config, perceptual=mse_per_sample).train()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_loss_gone_wrong_stops_with_the_state_before_it(configure, bad, tmp_path, monkeypatch):
    monkeypatch.setattr("tadsr.training.trainer._SETTLING_STEPS", 2)
    config = configure(COMPARED, steps=30, save_every=100)
    factors = [1] * 4 + [bad]

    def breaking(pred, target):
        return mse_per_sample(pred, target) * factors.pop(0)

    with pytest.raises(TrainingError, match=r"step 4, samples \[8, 9\] \(.+\.png"):
        Trainer(config, perceptual=breaking).train()
    saved = tmp_path / "run" / "checkpoints" / "failed_00000004"
    assert json.loads((saved / "progress.json").read_text())["step"] == 4
    assert all(t.isfinite().all() for t in load_file(saved / "autoencoder.safetensors").values())


def test_a_finished_run_is_exported_again_and_a_longer_one_goes_on(configure, tmp_path):
    config = configure(save_every=1)
    model = Trainer(config).train()
    shutil.rmtree(model)
    assert Trainer(config).train() == model
    assert model.is_dir()
    Trainer(dataclasses.replace(config, steps=5)).train()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000005"]  # the last two


@pytest.mark.parametrize("rank", [0, 2])
def test_any_checkpoint_of_a_run_is_a_model(rank, configure, photos, tmp_path):
    stage = dataclasses.replace(PLAIN_STUDENT, adapter_rank=rank)
    config = configure(stage, ema_decay=0.5)
    with pytest.raises(TrainingError, match="no step is done yet; train first"):
        Trainer(config).export()
    model = Trainer(config).train()
    names = ("vae", "unet")
    expected = {n: getattr(load_checkpoint(model), n).state_dict() for n in names}

    def check(source, is_equal=True):
        found = TADSRPipeline.from_pretrained(source)
        states = {name: getattr(found, name).state_dict() for name in names}
        same = {
            tensor.equal(states[name][key])
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
        stage = dataclasses.replace(stage, adapter_rank=8)
        with pytest.raises(ValueError, match=r"adapter_rank and .* those of .* \(2, 2\)"):
            Trainer(dataclasses.replace(config, stage=stage, output=str(tmp_path / "other")))
    trainer.train()


def test_a_full_disk_keeps_the_checkpoint_before(configure, tmp_path):
    config = configure()
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
def test_memory_that_runs_out_is_said_and_the_run_goes_on(configure, error, tmp_path):
    config = configure(COMPARED)

    def run_out():
        raise error

    full = acting_at(3, run_out)
    with pytest.raises(TrainingError, match=r"step 3 does .*: gradient_checkpointing, precision"):
        Trainer(config, perceptual=full).train()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step_00000002"]
    Trainer(config, perceptual=full).train()
    assert steps_of(tmp_path / "run") == [1, 2, 3]


def test_two_runs_do_not_share_a_folder(configure, tmp_path):
    config = configure()
    trainer = Trainer(config)
    with locked(tmp_path / "run"):
        for act in (trainer.train, trainer.export, lambda: Trainer(config)):
            with pytest.raises(TrainingError, match="another process trains in it"):
                act()


def test_a_worker_that_dies_is_said_in_a_sentence(configure, photos):
    data = DataConfig(str(photos), crop_px=32, num_workers=1)
    config = configure(COMPARED, data=data, steps=50)

    def kill():
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(DataError, match=r"samples has died .* memory ran out.* last checkpoint"):
        Trainer(config, perceptual=acting_at(1, kill)).train()


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


def test_broken_photos_are_skipped_and_counted(configure, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("no image")
    Image.new("RGB", (200, 31)).save(folder / "low.png")
    config = configure(data=plain_data(folder), steps=5)
    with pytest.warns(TADSRWarning, match=r"2 of 7 .* left out: 1 below 32 px and 1 unreadable"):
        trainer = Trainer(config)
    trainer.train()
    assert trainer.num_skipped > 0
    assert "broken.png" in (tmp_path / "run" / "log.jsonl").read_text()


def test_another_runs_folder_is_refused(configure, tmp_path):
    config = configure()
    Trainer(config)
    with pytest.raises(TADSRError, match=r"differs in seed, stage\.l1_weight"):
        Trainer(configure(dataclasses.replace(PLAIN, l1_weight=2.0), seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(TADSRError, match="other files"):
        Trainer(dataclasses.replace(config, output=str(tmp_path / "other")))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_what_cannot_work_is_refused_before_the_first_step(
    official, golden_dir, networks, photos, tmp_path, monkeypatch
):
    wrong, empty = tmp_path / "v-prediction", tmp_path / "empty"
    shutil.copytree(official, wrong)
    path = wrong / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(scheduler))
    empty.mkdir()
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{photos}/{i}.png {photos}/missing.png\n" for i in range(2)))

    def of(source, crop_px=32, **changes):
        return {"data": plain_data(source, crop_px, **changes)}

    def taught(teacher, weight=0):
        return distillation(
            adapter_rank=0, teacher=teacher, tavsd_weight=TimestepRamp(weight, weight)
        )

    def refused(error, message, model, stage, output="run", **changes):
        with pytest.raises(error, match=message):
            Trainer(make_config(model, photos, tmp_path / output, stage, **changes))

    compared = AutoencoderConfig()
    refused(CheckpointError, "epsilon", wrong, distillation())
    refused(CheckpointError, "epsilon", networks, taught(str(wrong), 1))
    with pytest.raises(ValueError, match="multiple of 8"):
        of(photos, 36)
    refused(ValueError, "empty", networks, PLAIN, **of(empty))
    refused(ValueError, r"stage\.teacher", networks, taught(None, 1))
    refused(ValueError, "share their latents", networks, taught(str(golden_dir / "base"), 1))
    unknown = of(photos, prompt="a cat")
    refused(ValueError, "prompt must be one of", networks, taught(None), **unknown)
    refused(ValueError, "fp16 needs a GPU", networks, compared, precision="fp16")
    refused(ValueError, "compile needs a GPU", networks, compared, compile=True)
    refused(TADSRError, "pip install wandb", networks, compared, trackers=("wandb",))
    for plugin, value in (("FSDP", "true"), ("DEEPSPEED", "True"), ("PARALLELISM_CONFIG", "true")):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{plugin}", value)
            refused(TrainingError, rf"set to {plugin}.*--multi_gpu", networks, compared)
    lpips = DistillationConfig(adapter_rank=0, tavsd_weight=0, perceptual="lpips")
    refused(TADSRError, r"tadsr\[train\]", networks, lpips)
    refused(TrainingError, "must be a folder that can be written", networks, PLAIN, networks)
    unseen = ValidationConfig(str(photos), crop_px=32, keep_best="perceptual")
    told = "must have a perceptual distance for 'perceptual'"
    refused(ValueError, told, networks, PLAIN, validation=unseen)
    told = r"of 2 in .* 2 without a readable LQ of a fitting size"
    refused(ValueError, told, networks, compared, **of(listed))
    told = r"of 4 in .* 4 below 128 px \(.* side of 96 px\)"
    refused(ValueError, told, networks, compared, **of(photos, 128))
    assert not (tmp_path / "run").exists()


def test_the_speed_of_a_continued_run_counts_its_own_steps(tmp_path):
    log = RunLog(tmp_path)
    log.start_clock(3)
    time.sleep(0.2)
    assert log.speed(samples_per_step=2, step=4)["images_per_second"] <= 2 / 0.2
