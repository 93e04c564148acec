"""Folder runs by several processes, some of which die."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tadsr.cli.model import ModelRequest
from tadsr.errors import TADSRError
from tadsr.folders.jobs import mirror_folder
from tadsr.folders.upscale import upscale_files
from tadsr.folders.workers import run_on_devices

from .folder_runs import FAST, check_whole, records, write_photos

pytestmark = pytest.mark.usefixtures("imported_once")


@pytest.fixture(autouse=True)
def no_worker_is_left(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads would fight for the same cores
    yield
    assert multiprocessing.active_children() == []


def test_several_devices_share_the_work(upscale):
    write_photos("photos", 4)
    Path("photos/03.png").write_bytes(b"no image")
    result = upscale("photos", "--devices", "cpu,cpu", code=1)
    assert "3 written, 0 skipped, 1 failed" in result.stdout
    assert sum(entry["error"] is None for entry in records().values()) == 3
    upscale("photos", "alone/", code=1)
    for name in ("00.png", "01.png", "02.png"):
        assert Path("photos_x4", name).read_bytes() == Path("alone", name).read_bytes()


def test_a_killed_worker_loses_nothing(model_dir):
    write_photos("photos", 12)
    outcomes = []

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            # One only: two may hit the same photo, which then rightly counts as failed.
            multiprocessing.active_children()[0].kill()

    def run(todo, report) -> None:
        load = ModelRequest(str(model_dir), dtype="fp32", timestep=1).load
        run_on_devices(todo, request, load, ["cpu", "cpu"], report)

    request = replace(FAST, settings=replace(FAST.settings, process_size=128))
    upscale_files(mirror_folder("photos", "photos_x4"), request, {}, run, report)
    assert sorted(o.job.source.name for o in outcomes) == [f"{n:02}.png" for n in range(12)]
    assert {outcome.status for outcome in outcomes} == {"written"}
    check_whole("photos_x4", 12, (24, 20))


KILLER = """
import os

from tadsr.cli.model import ModelRequest
from tadsr.quick import QuickRestorer


class Killer(QuickRestorer):
    def __call__(self, image, *arguments, **options):
        if image.size == (3, 3):
            os._exit(9)
        return super().__call__(image, *arguments, **options)


def load(device):
    pipe = ModelRequest({model!r}, dtype="fp32", timestep=1).load(device)
    pipe.__class__ = Killer
    return pipe
"""


def test_images_that_kill_their_workers_fail_and_the_others_are_done(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    Path("killing.py").write_text(KILLER.format(model=str(model_dir)))
    from killing import load

    write_photos("photos", 4)
    for number in range(2):  # more deaths in a row than starts in vain are allowed
        Image.new("RGB", (3, 3)).save(f"photos/{number:02}.png")
    outcomes = []
    pace = run_on_devices(
        mirror_folder("photos", "photos_x4"), FAST, load, ["cpu"], outcomes.append
    )
    # Those that died on the way counted for nothing.
    assert 0 < pace.computing < sum(outcome.seconds for outcome in outcomes)
    status = {outcome.job.source.name: outcome.status for outcome in outcomes}
    assert status == {f"{n:02}.png": "failed" if n < 2 else "written" for n in range(4)}


def test_workers_that_cannot_load_end_the_run():
    write_photos("photos", 3)
    load = ModelRequest("missing-model", dtype="fp32", timestep=1).load
    with pytest.raises(TADSRError, match="missing-model"):
        run_on_devices(mirror_folder("photos", "photos_x4"), FAST, load, ["cpu", "cpu"], print)


def test_workers_that_only_die_end_the_run():
    write_photos("photos", 30)
    jobs, outcomes = mirror_folder("photos", "photos_x4"), []
    # `os._exit` in place of what loads a model: the worker ends when it is called.
    with pytest.raises(TADSRError, match="must load the model, but"):
        run_on_devices(jobs, FAST, os._exit, [7, 7], outcomes.append)
    assert {outcome.status for outcome in outcomes} <= {"failed"}
