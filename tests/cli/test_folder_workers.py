"""Folder runs by several processes, some of which die."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from PIL import Image

from tadsr.cli.model import ModelRequest
from tadsr.errors import TADSRError
from tadsr.folders.jobs import mirror_folder
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest, UpscaleSettings
from tadsr.folders.upscale import upscale_files
from tadsr.folders.workers import run_on_devices

from .test_folders import FAST, check_whole, write_photos

pytestmark = pytest.mark.usefixtures("imported_once")


def workers() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


def run_with_a_death(model_dir) -> list:
    """Upscale with two workers, of which one is killed after the first outcome.

    One only: two may hit the same photo, which then rightly counts as failed.
    """
    outcomes = []

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            workers()[0].kill()

    jobs = mirror_folder("photos", "photos_x4")
    request = FileRequest(UpscaleSettings(process_size=128))
    load = ModelRequest(str(model_dir), dtype="fp32", timestep=1).load

    def run(todo, report) -> None:
        run_on_devices(todo, request, load, ["cpu", "cpu"], report)

    upscale_files(jobs, request, {}, run, report)
    assert workers() == []
    return outcomes


def test_a_killed_worker_loses_nothing(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 12)
    outcomes = run_with_a_death(model_dir)
    assert sorted(o.job.source.name for o in outcomes) == [f"{n:02}.png" for n in range(12)]
    assert {outcome.status for outcome in outcomes} == {"written"}
    check_whole("photos_x4", 12, (24, 20))


KILLER = """
import os
import sys

from tadsr import TADSRPipeline


class Killer(TADSRPipeline):
    def __call__(self, image, *arguments, **options):
        if image.size == (3, 3):
            os._exit(9)
        return super().__call__(image, *arguments, **options)


def load(device):
    pipe = TADSRPipeline.from_pretrained({model!r})
    pipe.__class__ = Killer
    return pipe
"""


def test_images_that_kill_their_workers_fail_and_the_others_are_done(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("killing.py").write_text(KILLER.format(model=str(model_dir)))
    from killing import load

    write_photos("photos", 6)
    for number in range(4):  # more in a row than starts in vain are allowed
        Image.new("RGB", (3, 3)).save(f"photos/{number:02}.png")
    outcomes = []
    jobs = mirror_folder("photos", "photos_x4")
    request = FileRequest(UpscaleSettings(process_size=0))
    pace = run_on_devices(jobs, request, load, ["cpu"], outcomes.append)
    # Those that died on the way counted for nothing.
    assert 0 < pace.computing < sum(outcome.seconds for outcome in outcomes)
    status = {outcome.job.source.name: outcome.status for outcome in outcomes}
    assert status == {f"{n:02}.png": "failed" if n < 4 else "written" for n in range(6)}


def test_a_result_that_is_taken_away_during_the_run_leaves_the_others_alone(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 2)
    jobs = mirror_folder("photos", "photos_x4")

    def run(todo, report) -> None:
        for job in todo:
            report(Outcome(job, "written", size=(24, 20)))  # and nothing is there

    upscale_files(jobs, FAST, {}, run, lambda outcome: None)
    upscaled = []

    def run_again(todo, report) -> None:
        upscaled.extend(todo)

    Image.new("RGB", (24, 20)).save("photos_x4/00.png")
    upscale_files(jobs, FAST, {}, run_again, lambda outcome: None)
    assert upscaled[-1] == jobs[1]


def test_workers_that_cannot_load_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 3)
    load = ModelRequest("missing-model", dtype="fp32", timestep=1).load
    jobs = mirror_folder("photos", "photos_x4")
    with pytest.raises(TADSRError, match="missing-model"):
        run_on_devices(jobs, FAST, load, ["cpu", "cpu"], print)
    assert workers() == []


def test_workers_that_only_die_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 30)
    jobs = mirror_folder("photos", "photos_x4")
    # `os._exit` in place of what loads a model: the worker ends when it is called.
    outcomes = []
    with pytest.raises(TADSRError, match="must load the model, but"):
        run_on_devices(jobs, FAST, os._exit, [7, 7], outcomes.append)
    assert {outcome.status for outcome in outcomes} <= {"failed"}
