"""`tadsr degrade`: pairs that can be made again."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tadsr.degradation import PRESETS
from tadsr.degradation.partners import PartnerSettings, degrade_folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (66, 50)), ("b.jpg", (40, 40)), ("sub/a.png", (32, 48))):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def records(folder):
    lines = (folder / "degradations.jsonl").read_text().splitlines()
    return {record["hq"]: record for record in map(json.loads, lines)}


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_every_photo_gets_a_partner_and_a_record(tadsr, photos, tmp_path):
    result = tadsr("degrade", photos, tmp_path / "lq")
    assert "3 written, 0 skipped, 0 failed" in result.output
    found = records(tmp_path / "lq")
    assert set(found) == {"a.png", "b.jpg", "sub/a.png"}
    assert found["a.png"]["lq_size"] == [16, 12]
    for record in found.values():
        image = pixels(tmp_path / "lq" / record["lq"])
        assert list(image.shape[1::-1]) == record["lq_size"]
        assert record["preset"] == "realesrgan"


def test_a_partner_depends_on_its_name_and_the_seed_alone(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "all")
    (photos / "b.jpg").unlink()
    tadsr("degrade", photos, tmp_path / "fewer")
    assert (pixels(tmp_path / "all" / "a.png") == pixels(tmp_path / "fewer" / "a.png")).all()
    tadsr("degrade", photos, tmp_path / "other", "--seed", 1)
    assert (pixels(tmp_path / "all" / "a.png") != pixels(tmp_path / "other" / "a.png")).any()


def test_records_can_be_replayed(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "one", "--seed", 5, "--scale", 2)
    replay = tmp_path / "one" / "degradations.jsonl"
    tadsr("degrade", photos, tmp_path / "two", "--replay", replay)
    for name, record in records(tmp_path / "one").items():
        again = records(tmp_path / "two")[name]
        assert again == record
        expect = pixels(tmp_path / "one" / record["lq"])
        assert (pixels(tmp_path / "two" / again["lq"]) == expect).all()
    replay.write_text("not a record\n")
    assert "line 1" in tadsr("degrade", photos, tmp_path / "x", "--replay", replay, code=1).output


def test_a_folder_is_degraded_from_python_too(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "command", "--seed", 3, "--preset", "mild")
    (photos / "broken.png").write_bytes(b"no image")
    settings = PartnerSettings("mild", seed=3)
    made = degrade_folder(photos, tmp_path / "python", settings)
    assert (made.num_written, made.num_skipped) == (3, 0)
    assert list(made.failures) == [photos / "broken.png"]
    assert records(tmp_path / "python") == records(tmp_path / "command")
    assert degrade_folder(photos, tmp_path / "python", settings).num_skipped == 3
    own = PartnerSettings(replace(PRESETS["mild"], stages=()))
    degrade_folder(photos, tmp_path / "own", own)
    assert records(tmp_path / "own")["a.png"]["preset"]["stages"] == []


def test_what_exists_stays_and_its_record_too(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "lq", "--preset", "bicubic")
    before = records(tmp_path / "lq")
    with (tmp_path / "lq" / "degradations.jsonl").open("a") as file:
        file.write('{"hq": "a.p')  # as a killed run leaves it
    shutil.copyfile(photos / "a.png", photos / "c.png")
    result = tadsr("degrade", photos, tmp_path / "lq", "--preset", "bicubic")
    assert "1 written, 3 skipped" in result.output
    after = records(tmp_path / "lq")
    assert set(after) == {*before, "c.png"}
    assert all(after[name] == record for name, record in before.items())
    result = tadsr("degrade", photos, tmp_path / "lq", "--overwrite")
    assert "4 written" in result.output
    assert records(tmp_path / "lq")["a.png"]["preset"] == "realesrgan"


def test_a_killed_run_goes_on_with_every_picture_recorded(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "lq")
    whole = records(tmp_path / "lq")
    path = tmp_path / "lq" / "degradations.jsonl"
    # A line comes before its picture: it may be cut off, or be alone, at any line.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])
    for name in list(whole)[1:]:
        (tmp_path / "lq" / whole[name]["lq"]).unlink()
    assert "2 written, 1 skipped" in tadsr("degrade", photos, tmp_path / "lq").output
    assert records(tmp_path / "lq") == whole


def test_outputs_inside_the_input_and_hidden_files_are_no_photos(tadsr, photos):
    (photos / "._a.png").write_bytes(b"of another system")
    (photos / "folder.png").mkdir()
    assert "3 written, 0 skipped, 0 failed" in tadsr("degrade", photos, photos / "lq").output
    assert "0 written, 3 skipped, 0 failed" in tadsr("degrade", photos, photos / "lq").output


def test_a_partner_keeps_its_name_when_photos_are_added(tadsr, photos, tmp_path):
    tadsr("degrade", photos, tmp_path / "lq")
    before = records(tmp_path / "lq")
    shutil.copyfile(photos / "b.jpg", photos / "a.jpg")
    assert "1 written, 3 skipped" in tadsr("degrade", photos, tmp_path / "lq").output
    after = records(tmp_path / "lq")
    assert after == {**before, "a.jpg": after["a.jpg"]}
    tadsr("degrade", photos, tmp_path / "again")  # and those of one stem from the first
    for found in (after, records(tmp_path / "again")):
        assert len({record["lq"] for record in found.values()}) == 4


def test_alpha_16_bits_and_orientation_are_read(tadsr, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("RGBA", (24, 16), (200, 10, 10, 90)).save(folder / "alpha.png")
    Image.fromarray(np.full((16, 24), 40000, np.uint16)).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (24, 16)).save(folder / "turned.jpg", exif=exif)
    tadsr("degrade", folder, tmp_path / "lq", "--preset", "bicubic")
    sizes = {name: record["lq_size"] for name, record in records(tmp_path / "lq").items()}
    assert sizes == {"alpha.png": [6, 4], "wide.png": [6, 4], "turned.jpg": [4, 6]}
    assert pixels(tmp_path / "lq" / "wide.png")[0, 0].tolist() == [156] * 3
    for name in ("alpha", "wide", "turned"):
        with Image.open(tmp_path / "lq" / f"{name}.png") as image:
            assert image.mode == "RGB"
            assert not image.getexif()


def test_broken_and_tiny_photos_are_reported_and_the_others_done(tadsr, photos, tmp_path):
    (photos / "bad.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Image.new("RGB", (3, 9)).save(photos / "tiny.png")
    result = tadsr("degrade", photos, tmp_path / "lq", code=1)
    assert "bad.png" in result.output
    assert "tiny.png: hq must be at least scale" in result.output
    assert "3 written, 0 skipped, 2 failed" in result.output
    assert set(records(tmp_path / "lq")) == {"a.png", "b.jpg", "sub/a.png"}


def test_misuse_is_explained(tadsr, photos, tmp_path):
    assert "does not exist" in tadsr("degrade", tmp_path / "no", tmp_path / "lq", code=2).output
    assert "choose another" in tadsr("degrade", photos, photos, code=2).output
    assert "must be a folder" in tadsr("degrade", photos, photos / "a.png", code=2).output
    assert "--scale" in tadsr("degrade", photos, tmp_path / "lq", "--scale", 0, code=2).output
