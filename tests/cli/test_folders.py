"""Runs over many images: resumed, checked, on several devices, and what goes wrong in them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

import tadsr
from tadsr.cli.model import ModelRequest
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import MANIFEST_NAME, Manifest, Record, read_manifest
from tadsr.folders.restoring import FileRequest, UpscaleSettings
from tadsr.folders.run import run_files
from tadsr.folders.upscale import is_whole, upscale_files
from tadsr.restorer import Restorer

PACKAGE_PARENT = str(Path(tadsr.__file__).parents[1])
FAST = FileRequest(UpscaleSettings(process_size=0))
NOBODY = 65534
RECORD = {"target": "a", "source": "b", "source_bytes": 1, "source_sha256": "", "settings": ""}
RECORD |= {"finished": "", "seconds": 1, "width": 24}
WRONG = ({"target": 5}, {"source": None}, {"seconds": "1"}, {"width": [1]}, {"error": 1})
LINES = st.sampled_from(
    [
        *(b"[]", b"1", b'{"run": 1}', b'{"run": {}}', b"[" * 100_000, b'{"target": []}'),
        *(json.dumps(RECORD | wrong).encode() for wrong in WRONG),
        *(b'{"left": "a"}', b'{"begun": "a", "settings": 1, "means": 2, "started": 3}'),
    ]
)


def load(model_dir: Path) -> Restorer:
    return ModelRequest(str(model_dir), dtype="fp32", timestep=1).load("cpu")


def write_photos(folder: str, count: int, size: tuple[int, int] = (6, 5)) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number:02}.png")


def records(folder: str = "photos_x4") -> dict[str, dict]:
    lines = Path(folder, MANIFEST_NAME).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = [entry for entry in entries if "target" in entry]
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
    lines = [line for line in lines if "begun" not in line]
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


def test_a_photo_that_became_a_link_to_nothing_has_changed(upscale):
    write_photos("photos", 2)
    upscale("photos")
    os.unlink("photos/01.png")
    os.symlink("gone.png", "photos/01.png")
    assert "photos/01.png has changed since" in upscale("photos").stderr


def test_a_manifest_that_was_cut_off_goes_on(upscale):
    write_photos("photos", 2)
    upscale("photos")
    path = Path("photos_x4", MANIFEST_NAME)
    text = path.read_text()
    path.write_text(text[:-30])
    os.unlink("photos_x4/01.png")
    assert "1 written, 1 skipped" in upscale("photos").stdout
    assert [record.target for record in read_manifest("photos_x4")] == ["00.png", "01.png"]


@given(st.lists(st.binary() | LINES, max_size=4))
def test_a_manifest_may_hold_anything(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("results")
    (folder / MANIFEST_NAME).write_bytes(b"\n".join(lines))
    assert read_manifest(folder) == []


@pytest.mark.parametrize("name", ["a\u2028b\x85c", "d\ne", "na\udcefve", "ユニ✓"])
def test_any_name_goes_through_the_manifest(upscale, name):
    write_photos("photos", 2)
    os.rename("photos/01.png", f"photos/{name}.png")
    assert "2 written" in upscale("photos").stdout
    assert {record.target for record in read_manifest("photos_x4")} == {"00.png", f"{name}.png"}
    assert "0 written, 2 skipped" in upscale("photos").stdout
    for line in Path("photos_x4", MANIFEST_NAME).read_bytes().splitlines():
        json.loads(line)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_photo_on_its_side_is_written_down_as_it_is_and_done_once(upscale, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    write_photos("photos", 1)
    Image.new("RGB", (6, 5)).save(f"photos/a{suffix}", exif=exif)
    upscale("photos")
    record = read_manifest("photos_x4")[-1]
    assert (record.target, record.width, record.height) == ("a.png", 20, 24)
    assert "0 written, 2 skipped" in upscale("photos").stdout


def test_a_result_too_large_for_pillow_to_open_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (60, 50)).save(path)
    about = {"source": "x", "source_bytes": 1, "source_sha256": "", "settings": ""}
    about |= {"finished": "", "seconds": 1, "target_bytes": os.path.getsize(path)}
    record = Record("large.png", **about, width=60, height=50)
    for limit in (2000, 1000):  # Pillow warns, and refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert is_whole(path, record)
    path.write_bytes(bytes(record.target_bytes))
    assert not is_whole(path, record)


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


def test_what_a_worker_leaves_that_is_killed_on_the_way_is_removed(tmp_path):
    script = "import sys, time; from tadsr.whole_file import whole_file\n"
    script += (
        "with whole_file(sys.argv[1]) as path: path.touch(); print(flush=True); time.sleep(60)"
    )
    target = tmp_path / "sharp" / "a.png"

    def run(jobs, report):
        command = [sys.executable, "-c", script, target]
        environment = {**os.environ, "PYTHONPATH": PACKAGE_PARENT}
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        worker.stdout.readline()
        worker.kill()
        # Nobody waits for it yet, so that it stays in the list of processes.
        workers.append(worker)
        while psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert len(list(target.parent.glob(".tadsr-*.png"))) == 1

    workers = []
    job = Job(tmp_path / "a.png", target, folder=target.parent)
    upscale_files([job], FileRequest(), {}, run, print)
    assert not list(target.parent.glob(".tadsr-*.png"))
    workers[0].communicate()


@pytest.mark.parametrize(
    ("sent", "code", "message", "options"),
    [
        (signal.SIGINT, 130, "Interrupted", []),
        pytest.param(signal.SIGTERM, 143, "Terminated", [], marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "Terminated", ["--devices", "cpu,cpu"]),
    ],
    ids=["ctrl-c", "sigterm", "sigterm_to_all_processes"],
)
def test_an_interrupt_leaves_whole_files_and_the_rest_is_done_later(
    upscale, model_dir, sent, code, message, options
):
    write_photos("photos", 40)
    options = ["-m", model_dir, "--process-size", 128, *options]
    run = start("photos", *options, start_new_session=True)
    wait_for_records(2)
    # As slurm and systemd do, and some supervisors twice; workers ignore Ctrl-C.
    os.killpg(run.pid, sent)
    if sent == signal.SIGTERM:
        os.killpg(run.pid, sent)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    said = f"{message}; what is written is whole and stays."
    assert said in errors
    assert "Traceback" not in errors
    if sent == signal.SIGINT:
        assert errors.splitlines() == ["on cpu, float32, engine fused", said]
    assert not list(Path("photos_x4").glob(".tadsr-*.png"))
    num_done = len(records())
    assert 2 <= num_done < 40
    done = sum(path.suffix == ".png" for path in Path("photos_x4").iterdir())
    assert done == num_done or "--devices" in options, "every file is in the manifest"
    upscale("photos")
    check_whole("photos_x4", 40, (24, 20))
    assert len(records()) == 40, "what a worker could not report any more is in the manifest"


def test_a_killed_run_goes_on(tadsr, upscale, model_dir):
    write_photos("photos", 40)
    run = os.fork()
    if run == 0:
        try:
            tadsr("upscale", "photos", "-m", model_dir, "--process-size", 128)
        finally:
            os._exit(1)
    wait_for_records(2)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert 2 <= len(records()) < 40
    upscale("photos")
    check_whole("photos_x4", 40, (24, 20))
    assert len(records()) == 40


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


def test_a_folder_that_closes_half_way_fails_image_by_image(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 3)
    outcomes = []
    moved = Path("moved")
    is_closed = threading.Event()

    def jobs():
        yield Job(Path("photos/00.png"), Path("photos_x4/00.png"))
        # The others come once the folder is gone, or their results might be written before.
        is_closed.wait(timeout=60)
        for n in (1, 2):
            yield Job(Path(f"photos/0{n}.png"), Path(f"photos_x4/0{n}.png"))

    def report(outcome) -> None:
        outcomes.append(outcome)
        if not moved.exists():
            # What a share that is gone looks like; rights alone do not stop an administrator.
            os.rename("photos_x4", moved)
            Path("photos_x4").touch()
            is_closed.set()

    run_files(jobs(), FAST, lambda: load(model_dir), report)
    assert [outcome.status for outcome in outcomes] == ["written", "failed", "failed"]
    with Image.open(moved / "00.png") as image:
        image.load()


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


@pytest.fixture
def batch_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 5)
    Image.new("RGB", (9, 4)).save("photos/02b.png")
    Path("photos/03b.png").write_bytes(b"no image")
    Image.new("L", (6, 5), 77).save("photos/00b.png")
    return mirror_folder("photos", "photos_x4")


def test_images_of_one_size_go_through_together(model_dir, batch_jobs):
    pipe = load(model_dir)
    outcomes, counts, pace = run_in_batches(pipe, batch_jobs, 3)
    # 00 00b (at first one waits) | 01 02 | 02b (another size) | 03 | 03b (no image) | 04
    assert counts == [2, 2, 1, 1, 1]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    assert pace.computing > 0
    for outcome in outcomes:
        if outcome.status == "written":
            alone = pipe(Image.open(outcome.job.source), 500, process_size=0)
            with Image.open(outcome.job.target) as found:
                assert found.mode == alone.mode
                np.testing.assert_array_equal(found, alone)


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


def test_beside_a_gpu_the_next_image_is_decoded(model_dir, batch_jobs):
    pipe = load(model_dir)
    outcomes = []
    jobs = [job for job in batch_jobs if job.source.name != "04.png"]
    pace = run_files(jobs, FAST, lambda: OnGPU(pipe), outcomes.append)
    written = [outcome for outcome in outcomes if outcome.status == "written"]
    assert [o.job.source.name for o in written] == [
        *("00.png", "00b.png", "01.png", "02.png", "02b.png", "03.png")
    ]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    assert pace.computing > 0
    for outcome in written:
        with Image.open(outcome.job.target) as found:
            alone = pipe(Image.open(outcome.job.source), 500, process_size=0)
            np.testing.assert_array_equal(found, alone)


def test_beside_a_gpu_results_come_while_no_images_do(model_dir, batch_jobs):
    pipe = load(model_dir)
    outcomes = []
    is_there = threading.Event()

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


def test_what_fails_in_a_batch_fails_alone(model_dir, batch_jobs):
    pipe = load(model_dir)
    Image.new("RGB", (6, 5), (9, 9, 9)).save("photos/01.png")
    outcomes, counts, _ = run_in_batches(pipe, batch_jobs, 3)
    assert counts == [2, 1, 1, 1, 1, 1]
    assert [o.job.source.name for o in outcomes if o.status == "failed"] == ["03b.png"]
    # What may have ended a run before is computed by itself.
    jobs = [Job(job.source, Path("again", job.target.name), alone=True) for job in batch_jobs]
    assert set(run_in_batches(pipe, jobs, 3)[1]) == {1}


def test_files_that_go_bad_half_way_fail_alone(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 9)
    outcomes = []

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:  # some of the next are on their way already
            Path("photos/06.png").write_bytes(b"no image any more")
            os.unlink("photos/07.png")

    jobs = mirror_folder("photos", "photos_x4")
    run_files(jobs, FAST, lambda: load(model_dir), report)
    statuses = {outcome.job.source.stem: outcome.status for outcome in outcomes}
    assert [name for name, status in statuses.items() if status == "failed"] == ["06", "07"]
    written = {name for name, status in statuses.items() if status == "written"}
    assert {path.stem for path in Path("photos_x4").iterdir()} == written
    assert len(written) == 7


def test_rights_that_are_lost_half_way_fail_image_by_image(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photos("photos", 6)
    outcomes = []
    # An administrator may read and write everything, so nobody takes the place.
    is_administrator = os.geteuid() == 0
    os.mkdir("photos_x4")

    def report(outcome) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 1:
            for path in ("photos_x4", "photos/05.png"):
                os.chmod(path, 0o400)
            os.chmod(tmp_path, 0o755)
            if is_administrator:
                os.seteuid(NOBODY)

    jobs = [Job(Path(f"photos/0{n}.png"), Path(f"photos_x4/0{n}.png")) for n in range(6)]
    try:
        run_files(jobs, FAST, lambda: load(model_dir), report)
    finally:
        if is_administrator:
            os.seteuid(0)
    os.chmod("photos_x4", 0o700)
    messages = {outcome.job.source.stem: outcome.message for outcome in outcomes}
    assert "photos/05.png: must be readable, but permission is denied" in messages["05"]
    assert "photos_x4/04.png: cannot be written" in messages["04"]
    # What was being written could not be removed either, but has no photo's name.
    whole = {path.name for path in Path("photos_x4").glob("[!.]*")}
    assert whole == {o.job.target.name for o in outcomes if o.status == "written"}
    for name in whole:
        with Image.open(Path("photos_x4", name)) as image:
            image.load()


def test_a_pipe_among_the_files_is_not_waited_for(upscale):
    write_photos("photos", 2)
    os.mkfifo("photos/pipe.png")
    result = upscale("photos", code=1)
    assert "pipe.png: must be a file, but is a pipe or device" in result.stderr
    assert "2 written, 0 skipped, 1 failed" in result.stdout


def test_several_devices_share_the_work(upscale, imported_once):
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
