"""A local Ray cluster upscales a folder, with workers that die on the way."""

import os

import pytest
import torch
from PIL import Image

from tadsr.checkpoints import load_checkpoint
from tadsr.config import UpscaleSettings
from tadsr.distributed import _Upscaler, upscale_folder_on_ray
from tadsr.errors import CheckpointError
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import read_manifest
from tadsr.folders.restoring import FileRequest
from tadsr.quick import open_quickly


@pytest.fixture(scope="module")
def cluster():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_raylet_start_wait_time_s", "200")  # on a machine that has more to do
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8
        )
        yield
        ray.shutdown()


@pytest.mark.slow
def test_dead_workers_lose_nothing_and_an_image_that_kills_them_fails_alone(cluster, tmp_path):
    """Images kill the one worker: "first" when it is begun first, "always" each time."""
    stumbled = tmp_path / "stumbled"

    def load(device):
        import torch

        from tadsr.quick import QuickRestorer, open_quickly

        class Fragile(QuickRestorer):
            def __call__(self, image, *arguments, **options):
                is_first = image.size == (5, 5) and not stumbled.exists()
                if is_first or image.size == (3, 3):
                    stumbled.touch()
                    os._exit(9)
                return super().__call__(image, *arguments, **options)

        pipe = open_quickly("tadsr-tiny", torch.float32, "auto")  # without seconds of imports
        pipe.__class__ = Fragile
        return pipe

    photos, sharp = tmp_path / "photos", tmp_path / "sharp"
    photos.mkdir()
    for name, side in {"0": 8, "1": 6, "first": 5, "always": 3}.items():
        Image.new("RGB", (side, side)).save(photos / f"{name}.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    request = FileRequest(UpscaleSettings(process_size=0))
    outcomes = upscale_folder_on_ray(photos, sharp, request=request, num_workers=1, load=load)
    status = {outcome.job.source.name: outcome.status for outcome in outcomes}
    failed = {"broken.jpg": "failed", "always.png": "failed"}
    assert status == {f"{name}.png": "written" for name in ("0", "1", "first")} | failed
    assert len(read_manifest(sharp)) == len(outcomes)
    with Image.open(sharp / "first.png") as image:
        image.load()
        assert image.size == (20, 20)

    for name in failed:
        (photos / name).unlink()
    again = upscale_folder_on_ray(photos, sharp, request=request, num_workers=1)
    assert {outcome.status for outcome in again} == {"skipped"}


def test_a_worker_upscales_what_it_is_sent_and_sends_back_what_it_cannot_do(tmp_path):
    """The actor, called as Ray calls it."""
    job = Job(tmp_path / "a.png", tmp_path / "b.png")
    request = FileRequest(UpscaleSettings(process_size=0))
    error = _Upscaler(lambda _: load_checkpoint("missing-model"), request, "cuda", 1).upscale(job)
    assert isinstance(error, CheckpointError)
    assert "missing-model" in str(error)
    pipe = open_quickly("tadsr-tiny", torch.float32, "auto")
    worker = _Upscaler(lambda _: pipe, request, "cuda", 1)
    job.source.write_bytes(b"no image")
    assert worker.upscale(job).status == "failed"
    Image.new("RGB", (6, 5)).save(job.source)
    for _ in range(2):  # its first try may have written the result
        outcome = worker.upscale(job)
        assert (outcome.status, outcome.size) == ("written", (24, 20))
    with Image.open(job.target) as image:
        assert image.size == (24, 20)


@pytest.mark.slow
def test_a_model_that_is_missing_ends_the_run(cluster, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match="missing-model"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out", model="missing-model")


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match="must hold images"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out")
