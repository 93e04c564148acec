"""A local Ray cluster of two workers upscales a folder, with one of them killed on the way."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from tadsr.config import UpscaleSettings
from tadsr.distributed import upscale_folder_on_ray
from tadsr.folders.manifest import read_manifest
from tadsr.folders.restoring import FileRequest

NUM_PHOTOS = 8
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_folder.py"


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def kill_a_worker() -> bool:
    for process in psutil.Process().children(recursive=True) + list(psutil.process_iter()):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "ray::MapWorker" in process.name():
                process.kill()
                return True
        except psutil.Error:
            continue
    return False


def test_a_killed_worker_loses_nothing_and_a_second_run_has_nothing_to_do(
    cluster, model_dir, tmp_path, capsys
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(NUM_PHOTOS):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    is_killed = []

    def report(outcome) -> None:
        if not is_killed:
            is_killed.append(kill_a_worker())

    request = FileRequest(UpscaleSettings(process_size=256))
    arguments = (photos, tmp_path / "sharp")
    outcomes = upscale_folder_on_ray(*arguments, request=request, num_workers=2, report=report)
    assert is_killed == [True]
    names = sorted(outcome.job.source.name for outcome in outcomes)
    assert names == sorted(path.name for path in photos.iterdir())
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert [outcome.job.source.name for outcome in failed] == ["broken.jpg"]
    made = {path.name for path in (tmp_path / "sharp").glob("*.png")}
    assert made == {f"{number}.png" for number in range(NUM_PHOTOS)}
    for name in made:
        with Image.open(tmp_path / "sharp" / name) as image:
            image.load()
            assert image.size == (64, 48)
    lines = Path(tmp_path, "sharp", "tadsr-manifest.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(outcomes)
    assert len(read_manifest(tmp_path / "sharp")) == len(outcomes)

    (photos / "broken.jpg").unlink()
    again = upscale_folder_on_ray(*arguments, request=request, num_workers=2)
    assert {outcome.status for outcome in again} == {"skipped"}

    # The example goes on with a folder as well as any other run.
    (tmp_path / "sharp" / "0.png").unlink()
    main = runpy.run_path(str(EXAMPLE))["main"]
    main([*map(str, arguments), "--model", str(model_dir)])
    assert f"1 written, {NUM_PHOTOS - 1} skipped" in " ".join(capsys.readouterr().out.split())
    with Image.open(tmp_path / "sharp" / "0.png") as image:
        assert image.size == (64, 48)


def test_an_image_that_kills_its_workers_fails_alone(cluster, model_dir, tmp_path):
    from tadsr import TADSRPipeline

    class Killer(TADSRPipeline):
        def __call__(self, image, *arguments, **options):
            if image.size == (3, 3):
                os._exit(9)
            return super().__call__(image, *arguments, **options)

    def load(device):
        pipe = TADSRPipeline.from_pretrained(model_dir)
        pipe.__class__ = Killer
        return pipe

    for number in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        side = 3 if number == 1 else 8
        Image.new("RGB", (side, side)).save(tmp_path / "photos" / f"{number}.png")
    request = FileRequest(UpscaleSettings(process_size=0))
    outcomes = upscale_folder_on_ray(
        tmp_path / "photos", tmp_path / "sharp", request=request, num_workers=1, load=load
    )
    status = {outcome.job.source.name: outcome.status for outcome in outcomes}
    assert status == {"0.png": "written", "1.png": "failed", "2.png": "written"}
    assert not list((tmp_path / "sharp").glob(".tadsr-tries-*"))


def test_a_model_that_is_missing_ends_the_run(cluster, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(Exception, match="missing-model"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out", model="missing-model")


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match="must hold images"):
        upscale_folder_on_ray(tmp_path, tmp_path / "out")
