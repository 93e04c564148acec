"""Folders that cannot be read or written in a run over many: the rest is done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tadsr.cli.targets import check_places, plan_jobs
from tadsr.errors import ImageWriteError, TADSRError
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import Manifest
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.upscale import upscale_files
from tadsr.whole_file import whole_file

from .folder_runs import NOBODY, exit_code, fork, write_photos


@pytest.fixture
def without_rights(monkeypatch) -> Iterator[Callable]:
    """Call a function that gives JSON's types, as a user for whom rights hold."""
    root = tempfile.mkdtemp()  # pytest's own may be its user's only
    monkeypatch.chdir(root)
    os.chmod(root, 0o777)

    def call(function: Callable[[], object]) -> object:
        if os.geteuid() != 0:  # an administrator may read and write everything
            return function()

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            Path("answer.json").write_text(json.dumps(function()))

        assert exit_code(fork(as_nobody)) == 0
        return json.loads(Path("answer.json").read_text())

    yield call
    for place, folders, _ in os.walk(root):
        for name in folders:
            os.chmod(os.path.join(place, name), 0o700)
    shutil.rmtree(root)


def upscale(jobs: list[Job]) -> list[tuple[str, str, str]]:
    """Run jobs, but for the computation, and return what is reported."""
    outcomes: list[Outcome] = []

    def run(todo, report) -> None:
        for job in todo:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 20)).save(job.target)
            report(Outcome(job, "written", size=(24, 20)))

    upscale_files(jobs, FileRequest(), {}, run, outcomes.append)
    return [[o.job.source.as_posix(), o.status, o.message] for o in outcomes]


def refusal_of(error: type[Exception], act: Callable[[], object]) -> Callable[[], str]:
    def refusal() -> str:
        with pytest.raises(error) as caught:
            act()
        return str(caught.value)

    return refusal


def test_a_folder_that_cannot_be_read_fails_as_one(without_rights):
    write_photos("photos", 2)
    write_photos("photos/open", 1)
    write_photos("photos/closed", 2)
    write_photos("photos/closed/deep", 2)
    Image.new("RGB", (6, 5)).save("photos/closed.jpg")
    os.chmod("photos/closed", 0)
    found = without_rights(lambda: upscale(mirror_folder("photos", "photos_x4")))
    *written, failed = sorted(found, key=lambda outcome: outcome[1] == "failed")
    assert {source for source, status, _ in written if status == "written"} == {
        *("photos/00.png", "photos/01.png", "photos/closed.jpg", "photos/open/00.png")
    }
    message = "photos/closed: must be a readable folder, got: Permission denied; it is left out"
    assert failed == ["photos/closed", "failed", message]
    # Read later, it is mirrored as it would have been.
    os.chmod("photos/closed", 0o755)
    found = without_rights(lambda: upscale(mirror_folder("photos", "photos_x4")))
    assert sum(status == "written" for _, status, _ in found) == 4
    assert sum(status == "skipped" for _, status, _ in found) == 4
    assert Path("photos_x4/closed/deep/01.png").exists()


def test_the_folder_itself_must_be_readable(without_rights):
    write_photos("photos", 2)
    os.chmod("photos", 0o100)
    refusal = refusal_of(PermissionError, lambda: mirror_folder("photos", "photos_x4"))
    assert "photos" in without_rights(refusal)


def test_images_of_an_output_that_cannot_be_written_fail_one_by_one(without_rights):
    write_photos("photos", 1)
    write_photos("photos/closed", 2)
    write_photos("photos_x4/closed/deep", 0)
    Image.new("RGB", (24, 20)).save("photos_x4/closed/00.png")
    with whole_file("photos_x4/closed/x.png") as abandoned:
        parts = abandoned.name.split("-")
        # Of a process that cannot be there.
        Path(abandoned.with_name("-".join([*parts[:2], "4194305", parts[3]]))).touch()
        abandoned.touch()
    os.chmod("photos_x4", 0o777)
    os.chmod("photos_x4/closed", 0o555)

    def run() -> list:
        return upscale(check_places(plan_jobs(["photos"], None, format=None, scale=4)))

    done, skipped, failed = sorted(without_rights(run))
    assert done[:2] == ["photos/00.png", "written"]
    assert skipped[:2] == ["photos/closed/00.png", "skipped"]
    assert failed[:2] == ["photos/closed/01.png", "failed"]
    assert "the folder photos_x4/closed is not writable" in failed[2]


def test_the_output_itself_must_be_writable(without_rights):
    write_photos("photos/sub", 1)
    os.mkdir("photos_x4")
    os.chmod("photos_x4", 0o555)
    refusal = refusal_of(
        ImageWriteError, lambda: check_places(plan_jobs(["photos"], None, format=None, scale=4))
    )
    assert "the folder photos_x4 is not writable" in without_rights(refusal)


@pytest.mark.parametrize("closed", ["", "tadsr-manifest.jsonl", ".tadsr-manifest.lock"])
def test_a_manifest_that_cannot_be_written_says_where_and_what_to_do(without_rights, closed):
    with Manifest("sharp", {}):
        pass
    os.chmod(Path("sharp", closed), 0)
    refusal = refusal_of(TADSRError, lambda: Manifest("sharp", {}))
    assert without_rights(refusal) == (
        "sharp/tadsr-manifest.jsonl: the output folder must hold a record of the run, got: "
        "Permission denied; choose another"
    )
    os.chmod(Path("sharp", closed), 0o700)
    with Manifest("sharp", {}):
        pass


def test_a_manifest_on_a_full_disk_ends_the_run_in_good_order(tmp_path):
    job = Job(Path("a.png"), tmp_path / "a.png")
    with Manifest(tmp_path, {}) as manifest:
        manifest.begin(job.target)
        manifest._file.close()
        manifest._file = open("/dev/full", "a")  # noqa: SIM115, closed by the manifest
        with pytest.raises(TADSRError, match="No space left on device; free some space and"):
            manifest.add(Outcome(job, "failed", message="?"))
    with Manifest(tmp_path, {}) as manifest:
        assert manifest.find(job.target) is None
