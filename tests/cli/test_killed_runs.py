"""Runs that are killed at an image: the next ones go on, and a deadly image fails alone."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tadsr.errors import TADSRError
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import MANIFEST_NAME, read_manifest
from tadsr.folders.outcome import Outcome
from tadsr.folders.run import run_files
from tadsr.folders.upscale import upscale_files
from tadsr.images import ArrayImage, write_image
from tadsr.restorer import Restorer
from tadsr.tile_spec import TileSpec

from .folder_runs import FAST, exit_code, fork, load, write_photos


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[Job]:
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 4)
    return mirror_folder("photos", "photos_x4")


def run_out_of_memory() -> None:
    """Have memory run out since the last image was begun, as far as the manifest can tell."""
    path = Path("photos_x4", MANIFEST_NAME)
    *lines, last = path.read_text().splitlines()
    entry = json.loads(last)
    boot, _, count = entry["memory"].rpartition(" ")
    entry["memory"] = f"{boot} {int(count) - 1}"
    path.write_text("\n".join([*lines, json.dumps(entry)]) + "\n")


def die(
    jobs, name: str, request=FAST, result: Image.Image | None = None, *, of_memory: bool = True
) -> None:
    """Have a run killed while it computes an image, or once its result is written."""

    def run(todo, report) -> None:
        job = next(job for job in todo if job.target.name == name)
        report.begin(job)
        if result is not None:
            result.save(job.target)
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork(lambda: upscale_files(jobs, request, {}, run))
    assert exit_code(child) == -signal.SIGKILL
    if of_memory:
        run_out_of_memory()


def next_run(jobs, request=FAST, error: type[BaseException] | None = None):
    """Return what the next run would compute, in order, and what it reports."""
    found: list[Job] = []
    outcomes: list[Outcome] = []

    def run(todo, report) -> None:
        found.extend(todo)
        if error is not None:
            report.begin(todo[0])
            raise error

    upscale_files(jobs, request, {}, run, outcomes.append)
    return found, outcomes


def test_an_image_that_kills_twice_fails_and_the_others_are_done(upscale, monkeypatch):
    write_photos("photos", 4)
    Image.new("RGB", (3, 3)).save("photos/01.png")
    restore = Restorer.__call__

    def restore_or_die(self, image, *arguments, **options):
        if image.size == (3, 3):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory runs out
        return restore(self, image, *arguments, **options)

    def run() -> None:
        monkeypatch.setattr(Restorer, "__call__", restore_or_die)
        upscale("photos")

    for _ in range(2):
        assert exit_code(fork(run)) == -signal.SIGKILL
        run_out_of_memory()
    message = "photos/01.png: several runs ended while this image was computed"
    assert message in upscale("photos", code=1).stderr
    errors = {record.target: record.error for record in read_manifest("photos_x4")}
    assert errors.pop("01.png").startswith(message)
    assert errors == {"00.png": None, "02.png": None, "03.png": None}
    # The run got to its end, so that the next one tries again, as with any other failure.
    assert "1 written, 3 skipped" in upscale("photos").stdout


def test_what_killed_a_run_is_tried_first_and_by_itself(jobs):
    die(jobs, "02.png")
    entry = json.loads(Path("photos_x4", MANIFEST_NAME).read_text().splitlines()[-1])
    assert entry["begun"] == "02.png"
    assert not {"run", "target"} & set(entry), "without these it is no record to earlier versions"
    todo, outcomes = next_run(jobs)
    assert [job.target.name for job in todo] == ["02.png", "00.png", "01.png", "03.png"]
    assert [job.alone for job in todo] == [True, False, False, False]
    assert outcomes == []


def test_what_killed_twice_stays_out_until_a_run_gets_to_its_end(jobs):
    for _ in range(2):
        die(jobs, "02.png")
    die(jobs, "01.png")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            next_run(jobs, error=KeyboardInterrupt)
    todo, outcomes = next_run(jobs)
    assert [job.target.name for job in todo] == ["01.png", "00.png", "03.png"]
    assert [outcome.job.target.name for outcome in outcomes] == ["02.png"]
    assert next_run(jobs)[0][1] == jobs[0]
    assert len(next_run(jobs)[0]) == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": replace(FAST.settings, tiling=TileSpec(max_memory=10**9))},
        {"timestep": 9},
        {"overwrite": True},
    ],
)
def test_what_killed_twice_is_tried_in_another_way(jobs, changed):
    for _ in range(2):
        die(jobs, "02.png")
    todo, outcomes = next_run(jobs, replace(FAST, **changed))
    assert (todo[0].target.name, todo[0].alone) == ("02.png", True)
    assert outcomes == []


def test_runs_that_were_stopped_say_nothing_against_an_image(jobs):
    for _ in range(4):
        die(jobs, "02.png", of_memory=False)
    path = Path("photos_x4", MANIFEST_NAME)
    assert next_run(jobs)[0][0].target.name == "02.png"
    die(jobs, "02.png", of_memory=False)
    assert len(next_run(jobs)[1]) == 1, "five times are too many, whatever the reason"
    die(jobs, "03.png", of_memory=False)
    # As on a machine that was taken away each time.
    lines = path.read_text().splitlines()
    begun = json.loads(lines[-1])
    begun["memory"] = f"another-boot {begun['memory'].split()[1]}"
    path.write_text("\n".join([*lines[:-1], *[json.dumps(begun)] * 9]) + "\n")
    assert next_run(jobs)[0][0].target.name == "03.png"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupt_or_an_error_is_no_death(jobs, error):
    for _ in range(3):
        with pytest.raises(error):
            next_run(jobs, error=error)
    assert next_run(jobs) == (jobs, [])


def test_a_result_that_a_killed_run_did_not_write_down_is_written_down(jobs):
    die(jobs, "02.png", result=Image.new("RGB", (24, 20)))
    status = os.stat("photos_x4/02.png")
    os.utime("photos_x4/02.png", (0, 0))  # older than the run: somebody else's
    todo, outcomes = next_run(jobs)
    assert len(todo) == 3
    assert "02.png: exists, skipped" in outcomes[0].message
    assert read_manifest("photos_x4") == []
    os.utime("photos_x4/02.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    todo, outcomes = next_run(jobs)
    assert [job.target.name for job in todo] == ["00.png", "01.png", "03.png"]
    assert "02.png: exists, skipped" in outcomes[0].message
    (record,) = read_manifest("photos_x4")
    assert (record.source, record.width, record.height) == ("photos/02.png", 24, 20)
    assert record.target_bytes == os.path.getsize("photos_x4/02.png")
    assert record.source_bytes == os.path.getsize("photos/02.png")


def test_a_result_that_is_taken_away_during_the_run_leaves_the_others_alone(jobs):
    def run(todo, report) -> None:
        for job in todo:
            report(Outcome(job, "written", size=(24, 20)))  # and nothing is there

    upscale_files(jobs, FAST, {}, run)
    Image.new("RGB", (24, 20)).save(jobs[0].target)
    assert next_run(jobs)[0][1:] == jobs[1:]


def test_images_are_begun_before_they_are_computed(model_dir, jobs):
    Path("photos/03.png").write_bytes(b"no image")
    events: list[tuple[str, str]] = []

    class Notes:
        def begin(self, job: Job) -> None:
            assert not job.target.exists()
            events.append(("begun", job.target.name))

        def __call__(self, outcome: Outcome) -> None:
            events.append((outcome.status, outcome.job.target.name))

    alone = [replace(job, alone=True) for job in jobs]
    run_files(alone, FAST, lambda: load(model_dir), Notes())
    # Each has its end before the next is begun, for it not to be taken for what killed.
    ends = [(status, f"0{n}.png") for n in range(3) for status in ("begun", "written")]
    assert events == [*ends, ("failed", "03.png")]


def test_a_pipe_as_manifest_or_result_is_not_waited_for(jobs):
    Path("photos_x4").mkdir()
    os.mkfifo(jobs[1].target)
    _, outcomes = next_run(jobs)
    assert [(o.status, o.job) for o in outcomes] == [("failed", jobs[1])]
    Path("photos_x4", MANIFEST_NAME).unlink()
    os.mkfifo(Path("photos_x4", MANIFEST_NAME))
    with pytest.raises(TADSRError, match="must be a file"):
        next_run(jobs)


def test_a_time_that_cannot_be_is_none_of_ours(jobs):
    die(jobs, "02.png", result=Image.new("RGB", (24, 20)), of_memory=False)
    path = Path("photos_x4", MANIFEST_NAME)
    *lines, last = path.read_text().splitlines()
    for started in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "noon", 5):
        path.write_text("\n".join([*lines, json.dumps({**json.loads(last), "started": started})]))
        assert len(next_run(jobs)[0]) == 3


@pytest.mark.parametrize("name", ["01.png", "01.jpg", "01.tif", "01.jxl"])
def test_a_truncated_result_that_no_record_tells_of_is_not_done(jobs, name):
    jobs = [replace(job, target=job.target.with_suffix(Path(name).suffix)) for job in jobs]
    Path("photos_x4").mkdir()
    path = Path("photos_x4", name)
    # Of 16 bits, which Pillow does not read in a TIFF.
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), np.uint16)
    write_image(ArrayImage(noise), path)
    assert next_run(jobs)[1][0].status == "skipped"
    path.write_bytes(path.read_bytes()[:-600])
    _, (outcome,) = next_run(jobs)
    assert (outcome.status, outcome.job.target) == ("failed", path)


def test_a_file_system_without_locks_can_be_written_to(jobs, monkeypatch):
    def acquire(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(TADSRError, match="--no-lock"):
        next_run(jobs)
    upscale_files(jobs, FAST, {}, lambda todo, report: None, is_locked=False)
