"""Images of a folder run that go through the networks together, or beside each other on a GPU."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.run import run_files

from .folder_runs import FAST, load, write_photos


class Batches:
    """A pipeline that takes images together as on a GPU, once they have been read."""

    device = torch.device("cpu")

    def __init__(self, pipe, jobs, at_once: int) -> None:
        self.pipe, self.at_once, self.counts = pipe, at_once, []
        self._left, self._num_taken, self._is_all_read = jobs, 0, False

    def jobs(self):
        for job in self._left:
            self._num_taken += 1
            yield job
        self._is_all_read = True

    def images_at_once(self, size, settings) -> int:
        return self.at_once

    def wait(self, num_ahead: int) -> None:
        # One more is taken when so many have been put down to wait.
        wanted = sum(self.counts) + num_ahead + 1
        while self._num_taken < wanted and not self._is_all_read:
            time.sleep(0.001)

    def load(self) -> Batches:
        self.counts = [1]
        self.wait(1)
        self.counts = []
        return self

    def __call__(self, image, *args, **options):
        self.counts.append(len(image) if isinstance(image, list) else 1)
        if isinstance(image, list) and any(i.getpixel((0, 0)) == (9, 9, 9) for i in image):
            self.counts.pop()
            raise RuntimeError("no memory to allocate")
        self.wait(self.at_once)
        return self.pipe(image, *args, **options)


def run_in_batches(pipe, jobs, at_once: int) -> tuple[list, list[int], object]:
    outcomes, batches = [], Batches(pipe, jobs, at_once)
    pace = run_files(batches.jobs(), FAST, batches.load, outcomes.append)
    return outcomes, batches.counts, pace


@pytest.fixture(scope="module")
def pipe(model_dir):
    return load(model_dir)


@pytest.fixture
def batch_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 5)
    Image.new("RGB", (9, 4)).save("photos/02b.png")
    Path("photos/03b.png").write_bytes(b"no image")
    Image.new("L", (6, 5), 77).save("photos/00b.png")
    return mirror_folder("photos", "photos_x4")


def check(outcomes, pipe) -> None:
    """Check that all but the broken file became what they become by themselves."""
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    for outcome in outcomes:
        if outcome.status == "written":
            alone = pipe(Image.open(outcome.job.source), 500, process_size=0)
            with Image.open(outcome.job.target) as found:
                assert found.mode == alone.mode
                np.testing.assert_array_equal(found, alone)


def test_images_of_one_size_go_through_together(pipe, batch_jobs):
    outcomes, counts, pace = run_in_batches(pipe, batch_jobs, 3)
    # 00 00b (at first one waits) | 01 02 | 02b (another size) | 03 | 03b (no image) | 04
    assert counts == [2, 2, 1, 1, 1]
    assert pace.computing > 0
    check(outcomes, pipe)


class OnGPU:
    """A pipeline of which two calls must come at once."""

    device = torch.device("cuda")

    def __init__(self, pipe) -> None:
        self.pipe, self.barrier = pipe, threading.Barrier(2)

    def images_at_once(self, size, settings) -> int:
        return 1

    def __call__(self, *args, **options):
        self.barrier.wait(timeout=20)
        return self.pipe(*args, **options)


def test_beside_a_gpu_the_next_image_is_decoded(pipe, batch_jobs):
    outcomes = []
    jobs = [job for job in batch_jobs if job.source.name != "04.png"]
    pace = run_files(jobs, FAST, lambda: OnGPU(pipe), outcomes.append)
    assert [o.job.source.stem for o in outcomes if o.status == "written"] == [
        *("00", "00b", "01", "02", "02b", "03")
    ]
    assert pace.computing > 0
    check(outcomes, pipe)


def test_beside_a_gpu_results_come_while_no_images_do(pipe, batch_jobs):
    outcomes, is_there = [], threading.Event()

    def jobs():
        # As a run on several devices sends them.
        yield from batch_jobs[:2]
        assert is_there.wait(timeout=60)
        yield from batch_jobs[2:4]

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 2:
            is_there.set()

    run_files(jobs(), FAST, lambda: OnGPU(pipe), report)
    assert [outcome.status for outcome in outcomes] == ["written"] * 4


def test_what_fails_in_a_batch_fails_alone(pipe, batch_jobs):
    Image.new("RGB", (6, 5), (9, 9, 9)).save("photos/01.png")
    outcomes, counts, _ = run_in_batches(pipe, batch_jobs, 3)
    assert counts == [2, 1, 1, 1, 1, 1]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    # What may have ended a run before is computed by itself.
    jobs = [Job(job.source, Path("again", job.target.name), alone=True) for job in batch_jobs]
    assert set(run_in_batches(pipe, jobs, 3)[1]) == {1}
