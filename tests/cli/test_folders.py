"""Runs over many images: resumed, checked, on several devices, and what goes wrong in them."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tadsr
from tadsr.cli.model import load_on
from tadsr.errors import TADSRError
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import MANIFEST_NAME, Manifest, read_manifest
from tadsr.folders.restoring import FileRequest, UpscaleSettings
from tadsr.folders.resume import upscale_files
from tadsr.folders.run import run_files
from tadsr.folders.workers import run_on_devices

PACKAGE_PARENT = str(Path(tadsr.__file__).parents[1])
FAST = FileRequest(UpscaleSettings(process_size=0))


def write_photos(folder: str, count: int, size: tuple[int, int] = (6, 5)) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number:02}.png")


def records(folder: str = "photos_x4") -> dict[str, dict]:
    lines = Path(folder, MANIFEST_NAME).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = [entry for entry in entries if "run" not in entry]
    assert len(found) == len({entry["target"] for entry in found}), "done twice"
    return {entry["target"]: entry for entry in found}


def check_whole(folder: str, count: int, size: tuple[int, int]) -> None:
    """Check that a folder holds so many whole images, all of them in the manifest, and no more."""
    names = {path.name for path in Path(folder).iterdir() if "tadsr-manifest" not in path.name}
    assert names == {f"{number:02}.png" for number in range(count)}
    for name in names:
        with Image.open(Path(folder, name)) as image:
            image.load()
            assert image.size == size
    for name, entry in records(folder).items():
        assert entry["error"] is None
        assert entry["target_bytes"] == os.path.getsize(Path(folder, name))


def start(*args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "tadsr", "upscale", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE_PARENT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def wait_for_records(count: int, folder: str = "photos_x4", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(read_manifest(folder)) < count:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def test_the_manifest_says_what_was_made_of_what(upscale, photo):
    photo("photos/a.jpg")
    photo("photos/sub/b.png")
    Path("photos/broken.png").write_bytes(b"no image")
    upscale("photos", "-t", 7, code=1)
    head, *lines = map(json.loads, Path("photos_x4", MANIFEST_NAME).read_text().splitlines())
    assert head["run"]["timestep"] == 7
    assert head["run"]["scale"] == 4
    entries = {line["target"]: line for line in lines}
    assert entries.keys() == {"a.png", "sub/b.png", "broken.png"}
    made = entries["sub/b.png"]
    assert made["source"] == "photos/sub/b.png"
    assert made["source_bytes"] == os.path.getsize("photos/sub/b.png")
    assert made["target_bytes"] == os.path.getsize("photos_x4/sub/b.png")
    assert (made["width"], made["height"]) == (24, 20)
    assert made["settings"] == head["run"]["settings"]
    assert made["seconds"] > 0
    assert "broken.png" in entries["broken.png"]["error"]
    assert entries["broken.png"]["target_bytes"] is None


def test_single_files_leave_no_manifest(upscale, photo):
    upscale(photo("a.png"), "out/")
    assert os.listdir("out") == ["a.png"]
    upscale(photo("b.png"), photo("c.png"), photo("d.png"))
    assert set(os.listdir()) == {
        *(f"{x}.png" for x in "abcd"),
        *(f"{x}_x4.png" for x in "bcd"),
        "out",
    }


def test_a_second_run_does_what_is_missing_damaged_or_failed(upscale, tmp_path):
    write_photos("photos", 4)
    Path("photos/03.png").write_bytes(b"no image")
    upscale("photos", code=1)
    times = {name: os.stat(f"photos_x4/{name}").st_mtime_ns for name in ("00.png", "02.png")}
    whole = Path("photos_x4/01.png").read_bytes()
    Path("photos_x4/01.png").write_bytes(whole[:-20])
    os.unlink("photos_x4/02.png")
    Image.new("RGB", (6, 5)).save("photos/03.png")
    result = upscale("photos")
    assert "3 written, 1 skipped, 0 failed" in result.stdout
    assert Path("photos_x4/01.png").read_bytes() == whole
    assert os.stat("photos_x4/00.png").st_mtime_ns == times["00.png"]
    assert {record.target: record.error for record in read_manifest("photos_x4")} == {
        f"0{number}.png": None for number in range(4)
    }


def test_a_damaged_header_of_the_right_length_is_found(upscale):
    write_photos("photos", 1)
    upscale("photos")
    path = Path("photos_x4/00.png")
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert "1 written" not in upscale("photos", "--quiet").stdout
    assert path.read_bytes() == whole


def test_other_settings_and_changed_inputs_are_said_but_not_redone(upscale):
    write_photos("photos", 2)
    upscale("photos")
    assert "00.png: exists, skipped; --overwrite" in upscale("photos").stderr
    result = upscale("photos", "-t", 900)
    assert "00.png: exists, skipped, but was made with other settings" in result.stderr
    Image.new("RGB", (6, 5)).save("photos/01.png")
    result = upscale("photos")
    assert "01.png: exists, skipped, but photos/01.png has changed since" in result.stderr
    assert "2 written" in upscale("photos", "-t", 900, "--overwrite").stdout


def test_a_manifest_that_was_cut_off_goes_on(upscale):
    write_photos("photos", 2)
    upscale("photos")
    path = Path("photos_x4", MANIFEST_NAME)
    text = path.read_text()
    path.write_text(text[:-30])
    os.unlink("photos_x4/01.png")
    assert "1 written, 1 skipped" in upscale("photos").stdout
    assert [record.target for record in read_manifest("photos_x4")] == ["00.png", "01.png"]


def test_two_runs_do_not_share_a_folder(upscale):
    write_photos("photos", 1)
    with Manifest("photos_x4", {}):
        result = upscale("photos", code=1)
        assert "photos_x4: another run writes to this folder" in result.stderr
        assert not Path("photos_x4/00.png").exists()
    upscale("photos")


def test_half_written_files_of_killed_processes_are_removed(upscale):
    write_photos("photos", 1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with Manifest("photos_x4", {}):
        pass
    from tadsr.whole_file import whole_file

    with whole_file("photos_x4/x.png") as own:
        own.touch()
        parts = own.name.split("-")
        theirs = own.with_name("-".join([parts[0], parts[1], str(ended.pid), parts[3]]))
        theirs.touch()
        upscale("photos")
        assert own.exists()
        assert not theirs.exists()


def test_an_interrupt_leaves_whole_files_and_the_rest_is_done_later(upscale, model_dir):
    write_photos("photos", 40)
    run = start("photos", "-m", model_dir, "--process-size", 128)
    wait_for_records(2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Interrupted; what is written is whole and stays." in errors
    assert "Traceback" not in errors
    num_done = len(records())
    assert 2 <= num_done < 40
    done = sum(path.suffix == ".png" for path in Path("photos_x4").iterdir())
    assert done == num_done, "every file is in the manifest"
    upscale("photos")
    check_whole("photos_x4", 40, (24, 20))


def test_a_killed_run_goes_on(upscale, model_dir):
    write_photos("photos", 40)
    run = start("photos", "-m", model_dir, "--process-size", 128)
    wait_for_records(2)
    run.kill()
    run.communicate(timeout=60)
    assert 2 <= len(records()) < 40
    upscale("photos")
    names = {path.name for path in Path("photos_x4").iterdir() if path.suffix == ".png"}
    assert names == {f"{number:02}.png" for number in range(40)}
    for name in names:
        with Image.open(Path("photos_x4", name)) as image:
            image.load()


def test_a_disk_that_fills_up_stops_the_run_and_it_goes_on_later(upscale, model_dir, tmp_path):
    # A file system of 64 KiB in a name space of its own, where this is allowed.
    write_photos("photos", 12, (40, 30))
    Path("photos_x4").mkdir()
    inner = (
        f"mount -t tmpfs -o size=64k tmpfs photos_x4 && {sys.executable} -m tadsr upscale photos "
        f"-m {model_dir} --process-size 0; code=$?; ls -A photos_x4; exit $code"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner]
    if subprocess.run([*command[:4], "mount", "-t", "tmpfs", "x", "/mnt"]).returncode:
        pytest.skip("this machine allows no mounts")
    environment = {**os.environ, "PYTHONPATH": PACKAGE_PARENT}
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert found.returncode == 1
    assert "no space is left to write to" in found.stderr
    assert "Traceback" not in found.stderr
    assert ".tadsr-" not in found.stdout.replace(".tadsr-manifest.lock", "")
    upscale("photos")
    check_whole("photos_x4", 12, (160, 120))


def test_files_that_grow_too_large_fail_alone(model_dir, tmp_path, monkeypatch):
    # The limit on a file's size is the one failure of writing that any user can bring about.
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 2)
    write_photos("photos/large", 1, (60, 60))

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    options = ("-m", model_dir, "--process-size", 0)
    run = start("photos", *options, preexec_fn=limit)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "1 of 3 images failed" in errors
    assert "large/00.png: cannot be written as PNG" in errors
    assert {path.name for path in Path("photos_x4").glob("*.png")} == {"00.png", "01.png"}
    assert list(Path("photos_x4/large").iterdir()) == []


def test_a_folder_that_closes_half_way_fails_image_by_image(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 3)
    outcomes = []
    moved = Path("moved")

    def report(outcome) -> None:
        outcomes.append(outcome)
        if not moved.exists():
            # What a share that is gone looks like; rights alone do not stop an administrator.
            os.rename("photos_x4", moved)
            Path("photos_x4").touch()

    jobs = [Job(Path(f"photos/0{n}.png"), Path(f"photos_x4/0{n}.png")) for n in range(3)]
    run_files(jobs, FAST, lambda: load_on(str(model_dir), None, "fp32", "", 1, "cpu"), report)
    assert [outcome.status for outcome in outcomes] == ["written", "failed", "failed"]
    with Image.open(moved / "00.png") as image:
        image.load()


class Batches:
    """A pipeline that takes images together as on a GPU, and remembers how many."""

    def __init__(self, pipe, at_once: int) -> None:
        self.pipe, self.at_once, self.counts = pipe, at_once, []

    def images_at_once(self, size, settings) -> int:
        return self.at_once

    def __call__(self, image, *args, **options):
        self.counts.append(len(image) if isinstance(image, list) else 1)
        if isinstance(image, list) and any(i.getpixel((0, 0)) == (9, 9, 9) for i in image):
            raise RuntimeError("no memory to allocate")
        return self.pipe(image, *args, **options)


def run_in_batches(pipe, jobs, at_once: int) -> tuple[list, list[int], object]:
    """Run with everything read before the model is there, so that batches are full."""
    outcomes, batches = [], Batches(pipe, at_once)

    def load():
        time.sleep(0.5)
        return batches

    pace = run_files(jobs, FAST, load, outcomes.append)
    return outcomes, batches.counts, pace


@pytest.fixture
def batch_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 5)
    Image.new("RGB", (9, 4)).save("photos/02b.png")
    Path("photos/03b.png").write_bytes(b"no image")
    Image.new("L", (6, 5), 77).save("photos/00b.png")
    return mirror_folder("photos", "photos_x4")


def test_images_of_one_size_go_through_together(model_dir, batch_jobs):
    pipe = load_on(str(model_dir), None, "fp32", "", 1, "cpu")
    outcomes, counts, pace = run_in_batches(pipe, batch_jobs, 3)
    # 00 00b 01 | 02 | 02b (another size) | 03 | 03b (no image) | 04
    assert counts == [3, 1, 1, 1, 1]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    assert pace.computing > 0
    for outcome in outcomes:
        if outcome.status == "written":
            alone = pipe(Image.open(outcome.job.source), 500, process_size=0)
            with Image.open(outcome.job.target) as found:
                assert found.mode == alone.mode
                np.testing.assert_array_equal(found, alone)


def test_what_fails_in_a_batch_fails_alone(model_dir, batch_jobs):
    pipe = load_on(str(model_dir), None, "fp32", "", 1, "cpu")
    Image.new("RGB", (6, 5), (9, 9, 9)).save("photos/01.png")
    outcomes, counts, _ = run_in_batches(pipe, batch_jobs, 3)
    assert counts == [3, 1, 1, 1, 1, 1, 1, 1]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    # What may have ended a run before is computed by itself.
    jobs = [Job(job.source, Path("again", job.target.name), alone=True) for job in batch_jobs]
    assert set(run_in_batches(pipe, jobs, 3)[1]) == {1}


def test_a_pipe_among_the_files_is_not_waited_for(upscale):
    write_photos("photos", 2)
    os.mkfifo("photos/pipe.png")
    result = upscale("photos", code=1)
    assert "pipe.png: must be a file, but is a pipe or device" in result.stderr
    assert "2 written, 0 skipped, 1 failed" in result.stdout


def test_several_devices_share_the_work(upscale, model_dir):
    write_photos("photos", 6)
    Path("photos/05.png").write_bytes(b"no image")
    result = upscale("photos", "--devices", "cpu,cpu", code=1)
    assert "5 written, 0 skipped, 1 failed" in result.stdout
    assert sum(entry["error"] is None for entry in records().values()) == 5
    upscale("photos", "alone/", code=1)
    for number in range(5):
        name = f"{number:02}.png"
        together, alone = Path("photos_x4", name), Path("alone", name)
        assert together.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "cpu,"], "--devices must be names with commas between"),
        (["--devices", "0,99"], "--device cuda:0 must exist"),
        (["--devices", "cpu,cpu", "--device", "cpu"], "must not both be given"),
    ],
)
def test_devices_that_make_no_sense_are_misuse(upscale, photo, options, message):
    assert message in " ".join(upscale(photo("a.png"), *options, code=2).output.split())


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
    load = partial(load_on, str(model_dir), None, "fp32", "", 1)

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


def test_workers_that_cannot_load_end_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 3)
    load = partial(load_on, "missing-model", None, "fp32", "", 1)
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
    with pytest.raises(TADSRError, match="must finish an image, but"):
        run_on_devices(jobs, FAST, os._exit, [7, 7], outcomes.append)
    assert {outcome.status for outcome in outcomes} <= {"failed"}
