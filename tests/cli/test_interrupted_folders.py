"""Folder runs that are interrupted, killed, or get no further: what is written is whole."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tadsr.folders import run as folder_run
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import Manifest
from tadsr.folders.restoring import FileRequest
from tadsr.folders.run import run_files
from tadsr.folders.upscale import upscale_files
from tadsr.whole_file import whole_file

from .folder_runs import (
    FAST,
    NOBODY,
    check_whole,
    exit_code,
    fork,
    load,
    records,
    upscale_in_a_child,
    wait_for_records,
    write_photos,
)

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000
NO_MOUNTS = 77


@pytest.mark.parametrize(
    ("sent", "code", "message", "options"),
    [
        (signal.SIGINT, 130, "Interrupted", []),
        (signal.SIGTERM, 143, "Terminated", []),
        (signal.SIGTERM, 143, "Terminated", ["--devices", "cpu,cpu"]),
        (signal.SIGKILL, -signal.SIGKILL, None, []),
    ],
    ids=["ctrl-c", "sigterm", "sigterm_to_all_processes", "killed"],
)
def test_an_interrupt_leaves_whole_files_and_the_rest_is_done_later(
    upscale, model_dir, sent, code, message, options
):
    write_photos("photos", 32)
    run = upscale_in_a_child("photos", "-m", model_dir, "--process-size", 128, *options)
    wait_for_records(2)
    # As slurm and systemd do, and some supervisors twice; workers ignore Ctrl-C.
    os.killpg(run, sent)
    if sent == signal.SIGTERM:
        os.killpg(run, sent)
    assert exit_code(run) == code
    num_done = len(records())
    assert 2 <= num_done < 32
    if message is not None:
        first = "on cpu, cpu" if options else "on cpu, float32, engine fused"
        last = f"{message}; what is written is whole and stays."
        assert Path("said.txt").read_text(encoding="utf-8").splitlines() == [first, last]
        assert not list(Path("photos_x4").glob(".tadsr-*.png"))
        done = sum(path.suffix == ".png" for path in Path("photos_x4").iterdir())
        assert done == num_done or options, "every file is in the manifest"
    upscale("photos")
    # Also what a worker could not report any more is in the manifest.
    check_whole("photos_x4", 32, (24, 20))


def test_what_was_being_written_at_an_interrupt_is_reported(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 1)
    write = folder_run._write

    def write_while_interrupted(*arguments):
        time.sleep(0.2)  # until the run waits for this
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(folder_run, "_write", write_while_interrupted)
    outcomes = []
    job = Job(Path("photos/00.png"), Path("photos_x4/00.png"), alone=True)
    with pytest.raises(KeyboardInterrupt):
        run_files([job], FAST, lambda: load(model_dir), outcomes.append)
    assert job.target.exists()
    assert [outcome.status for outcome in outcomes] == ["written"]


def test_half_written_files_of_killed_processes_are_removed(upscale):
    write_photos("photos", 1)
    ended = fork(lambda: None)
    assert exit_code(ended) == 0
    with Manifest("photos_x4", {}):
        pass
    with whole_file("photos_x4/x.png") as own:
        own.touch()
        parts = own.name.split("-")
        theirs = own.with_name("-".join([parts[0], parts[1], str(ended), parts[3]]))
        theirs.touch()
        upscale("photos")
        assert own.exists()
        assert not theirs.exists()


def test_what_a_worker_leaves_that_is_killed_on_the_way_is_removed(tmp_path):
    target = tmp_path / "sharp" / "a.png"
    workers = []

    def write_for_ever() -> None:
        with whole_file(target) as path:
            path.touch()
            time.sleep(60)

    def run(jobs, report) -> None:
        workers.append(fork(write_for_ever))
        while not list(target.parent.glob(".tadsr-*.png")):
            time.sleep(0.01)
        os.kill(workers[0], signal.SIGKILL)
        # Nobody waits for it yet, so that it stays in the list of processes.
        while psutil.Process(workers[0]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)

    job = Job(tmp_path / "a.png", target, folder=target.parent)
    upscale_files([job], FileRequest(), {}, run, print)
    assert not list(target.parent.glob(".tadsr-*.png"))
    assert exit_code(workers[0]) == -signal.SIGKILL


def mount_a_small_disk() -> None:
    """Mount 64 KiB in a name space of this process's own, where this is allowed."""
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None)
    if libc.unshare(NEW_USERS | NEW_MOUNTS):
        os._exit(NO_MOUNTS)
    maps = {"uid_map": f"0 {user} 1", "setgroups": "deny", "gid_map": f"0 {group} 1"}
    for name, text in maps.items():
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"tmpfs", b"photos_x4", b"tmpfs", 0, b"size=64k"):
        os._exit(NO_MOUNTS)


@pytest.mark.skipif(sys.platform != "linux", reason="name spaces are Linux's")
def test_a_disk_that_fills_up_stops_the_run_and_it_goes_on_later(upscale, model_dir):
    write_photos("photos", 12, (40, 30))
    Path("photos_x4").mkdir()

    def list_files() -> None:  # which this process alone sees
        Path("left.txt").write_text("\n".join(os.listdir("photos_x4")))

    args = ("photos", "-m", model_dir, "--process-size", 0)
    disk = {"before": mount_a_small_disk, "after": list_files}
    code = exit_code(upscale_in_a_child(*args, **disk))
    if code == NO_MOUNTS:
        pytest.skip("this machine allows no mounts")
    assert code == 1
    said = Path("said.txt").read_text(encoding="utf-8")
    assert "no space is left to write to" in said
    assert "Traceback" not in said
    left = Path("left.txt").read_text().splitlines()
    assert [name for name in left if name.startswith(".")] == [".tadsr-manifest.lock"]
    assert 0 < sum(name.endswith(".png") for name in left) < 12
    upscale("photos")
    check_whole("photos_x4", 12, (160, 120))


def test_files_that_grow_too_large_fail_alone(upscale):
    # The limit on a file's size is the one failure of writing that any user can bring about.
    write_photos("photos", 2)
    write_photos("photos/large", 1, (60, 60))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        errors = upscale("photos", code=1).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "1 of 3 images failed" in errors
    assert "large/00.png: cannot be written as PNG" in errors
    assert {path.name for path in Path("photos_x4").glob("*.png")} == {"00.png", "01.png"}
    assert list(Path("photos_x4/large").iterdir()) == []


def run_and_spoil(jobs, model_dir, spoil) -> dict[str, str]:
    """Run jobs, spoiling something after the first outcome; return what each one's outcome says."""
    outcomes = []

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            spoil()

    run_files(jobs, FAST, lambda: load(model_dir), report)
    for outcome in outcomes:
        assert (outcome.status == "failed") == bool(outcome.message)
    return {outcome.job.source.stem: outcome.message for outcome in outcomes}


def check_images(folder: str, names: set[str]) -> None:
    """Check that a folder holds whole images of these names, and others only that are hidden."""
    assert {path.stem for path in Path(folder).glob("[!.]*")} == names
    for name in names:
        with Image.open(Path(folder, f"{name}.png")) as image:
            image.load()


def test_a_folder_that_closes_half_way_fails_image_by_image(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 3)
    is_closed = threading.Event()

    def jobs():
        yield Job(Path("photos/00.png"), Path("photos_x4/00.png"))
        # The others come once the folder is gone, or their results might be written before.
        is_closed.wait(timeout=60)
        for n in (1, 2):
            yield Job(Path(f"photos/0{n}.png"), Path(f"photos_x4/0{n}.png"))

    def close() -> None:
        # What a share that is gone looks like; rights alone do not stop an administrator.
        os.rename("photos_x4", "moved")
        Path("photos_x4").touch()
        is_closed.set()

    messages = run_and_spoil(jobs(), model_dir, close)
    assert [bool(messages[name]) for name in ("00", "01", "02")] == [False, True, True]
    check_images("moved", {"00"})


def test_files_that_go_bad_half_way_fail_alone(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 9)

    def spoil() -> None:  # some of the next are on their way already
        Path("photos/06.png").write_bytes(b"no image any more")
        os.unlink("photos/07.png")

    messages = run_and_spoil(mirror_folder("photos", "photos_x4"), model_dir, spoil)
    assert [name for name, message in messages.items() if message] == ["06", "07"]
    check_images("photos_x4", messages.keys() - {"06", "07"})
    assert len(messages) == 9


def test_rights_that_are_lost_half_way_fail_image_by_image(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 6)
    # An administrator may read and write everything, so nobody takes the place.
    is_administrator = os.geteuid() == 0
    os.mkdir("photos_x4")

    def lose() -> None:
        for path in ("photos_x4", "photos/05.png"):
            os.chmod(path, 0o400)
        os.chmod(tmp_path, 0o755)
        if is_administrator:
            os.seteuid(NOBODY)

    jobs = [Job(Path(f"photos/0{n}.png"), Path(f"photos_x4/0{n}.png")) for n in range(6)]
    try:
        messages = run_and_spoil(jobs, model_dir, lose)
    finally:
        if is_administrator:
            os.seteuid(0)
    os.chmod("photos_x4", 0o700)
    assert "photos/05.png: must be readable, but permission is denied" in messages["05"]
    assert "photos_x4/04.png: cannot be written" in messages["04"]
    # What was being written could not be removed either, but has no photo's name.
    check_images("photos_x4", {name for name, message in messages.items() if not message})
