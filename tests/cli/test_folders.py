"""Runs over many images: recorded, checked and resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tadsr.folders.manifest import MANIFEST_NAME, Manifest, Record, read_manifest
from tadsr.folders.upscale import is_whole

from .folder_runs import write_photos

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


def test_a_second_run_does_what_is_missing_damaged_or_failed(upscale):
    write_photos("photos", 5)
    Path("photos/03.png").write_bytes(b"no image")
    upscale("photos", code=1)
    whole = {path.name: path.read_bytes() for path in Path("photos_x4").glob("*.png")}
    time = os.stat("photos_x4/00.png").st_mtime_ns
    Path("photos_x4/01.png").write_bytes(whole["01.png"][:-20])
    os.unlink("photos_x4/02.png")
    Path("photos_x4/04.png").write_bytes(bytes(len(whole["04.png"])))
    Image.new("RGB", (6, 5)).save("photos/03.png")
    assert "4 written, 1 skipped, 0 failed" in upscale("photos").stdout
    assert all(Path("photos_x4", name).read_bytes() == data for name, data in whole.items())
    assert os.stat("photos_x4/00.png").st_mtime_ns == time
    assert {record.target: record.error for record in read_manifest("photos_x4")} == {
        f"0{number}.png": None for number in range(5)
    }


def test_other_settings_and_changed_inputs_are_said_but_not_redone(upscale):
    write_photos("photos", 2)
    upscale("photos")
    assert "00.png: exists, skipped; --overwrite" in upscale("photos").stderr
    result = upscale("photos", "-t", 900)
    assert "00.png: exists, skipped, but was made with other settings" in result.stderr
    Image.new("RGB", (6, 5)).save("photos/01.png")
    changed = "01.png: exists, skipped, but photos/01.png has changed since"
    assert changed in upscale("photos").stderr
    assert "2 written" in upscale("photos", "-t", 900, "--overwrite").stdout
    os.unlink("photos/01.png")
    os.symlink("gone.png", "photos/01.png")
    assert changed in upscale("photos", "-t", 900).stderr


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


def test_any_name_goes_through_the_manifest(upscale):
    names = ["a\u2028b\x85c", "d\ne", "na\udcefve", "ユニ✓"]
    write_photos("photos", 4)
    for number, name in enumerate(names):
        os.rename(f"photos/0{number}.png", f"photos/{name}.png")
    assert "4 written" in upscale("photos").stdout
    assert {record.target for record in read_manifest("photos_x4")} == {f"{n}.png" for n in names}
    assert "0 written, 4 skipped" in upscale("photos").stdout
    for line in Path("photos_x4", MANIFEST_NAME).read_bytes().splitlines():
        json.loads(line)


def test_photos_on_their_side_are_written_down_as_they_are_and_done_once(upscale):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    suffixes = ("jpg", "png", "webp", "tif")
    os.mkdir("photos")
    for suffix in suffixes:
        Image.new("RGB", (6, 5)).save(f"photos/{suffix}.{suffix}", exif=exif)
    upscale("photos")
    found = {each.target: (each.width, each.height) for each in read_manifest("photos_x4")}
    assert found == {f"{suffix}.png": (20, 24) for suffix in suffixes}
    assert "0 written, 4 skipped" in upscale("photos").stdout


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


def test_a_pipe_among_the_files_is_not_waited_for(upscale):
    write_photos("photos", 2)
    os.mkfifo("photos/pipe.png")
    result = upscale("photos", code=1)
    assert "pipe.png: must be a file, but is a pipe or device" in result.stderr
    assert "2 written, 0 skipped, 1 failed" in result.stdout


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
