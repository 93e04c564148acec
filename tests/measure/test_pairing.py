from pathlib import Path

import pytest

from tadsr.errors import TADSRError
from tadsr.measure.pairing import match_images


@pytest.fixture
def folder(tmp_path):
    def make(name: str, *files: str) -> Path:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / name

    return make


def test_formats_folders_and_scale_tags_do_not_matter(folder):
    hq = folder("hq", "a.png", "sub/b.tif", "c_x2.png", "0801.png", ".a_thumb.png", "notes.txt")
    out = folder("out", "a_x4.jpg", "sub/b.webp", "c_x2.png", "0801x4.png", ".cache/d.png")
    assert match_images({"HQ": hq, "outputs": out}) == {
        "0801": {"HQ": hq / "0801.png", "outputs": out / "0801x4.png"},
        "a": {"HQ": hq / "a.png", "outputs": out / "a_x4.jpg"},
        "c_x2": {"HQ": hq / "c_x2.png", "outputs": out / "c_x2.png"},
        "sub/b": {"HQ": hq / "sub/b.tif", "outputs": out / "sub/b.webp"},
    }


def test_an_exact_name_goes_before_one_with_another_scale(folder):
    hq, out = folder("hq", "a.png"), folder("out", "a.png", "a_x2.png")
    found = match_images({"HQ": hq, "outputs": out}, allow_missing=True)
    assert found["a"]["outputs"] == out / "a.png"


def test_images_without_a_partner_are_listed(folder):
    hq, out = folder("hq", "a.png", "b.png"), folder("out", "b.png", "sub/c.png")
    with pytest.raises(TADSRError, match="2 have none") as error:
        match_images({"HQ": hq, "theirs": out})
    assert "a: in HQ but not in theirs" in str(error.value)
    assert "sub/c: in theirs but not in HQ" in str(error.value)
    assert list(match_images({"HQ": hq, "theirs": out}, allow_missing=True)) == ["b"]


def test_a_long_list_is_cut(folder):
    hq = folder("hq", "same.png", *(f"{i:02}.png" for i in range(14)))
    with pytest.raises(TADSRError, match="14 have none") as error:
        match_images({"HQ": hq, "outputs": folder("out", "same.png")})
    assert "09: " in str(error.value)
    assert "10: " not in str(error.value)
    assert "and 4 more" in str(error.value)


def test_only_what_all_folders_have_is_left(folder):
    folders = {
        "HQ": folder("hq", "a.png", "b.png", "c.png"),
        "one": folder("one", "a.png", "b.png"),
        "two": folder("two", "b.png", "c.png"),
    }
    assert list(match_images(folders, allow_missing=True)) == ["b"]


def test_folders_that_cannot_be_matched_say_why(folder, tmp_path):
    hq = folder("hq", "a.png")
    for outputs, message in (
        (tmp_path / "absent", "must be a folder of images, but is none"),
        (folder("empty", "notes.txt"), "must hold images"),
        (folder("other", "b.png"), "found no common one"),
        (folder("twice", "a.png", "a.jpg"), r"must differ in name, got .*a\.jpg and .*a\.png"),
        (folder("scales", "a_x2.png", "a_x4.png"), "more than their scale, got a_x2 and a_x4"),
    ):
        with pytest.raises(TADSRError, match=message):
            match_images({"HQ": hq, "outputs": outputs}, allow_missing=True)


@pytest.mark.parametrize("name", ["a_out.png", "a_x4_out.png", "a_out_x4.jpg"])
def test_a_suffix_of_some_folders_is_stripped(name, folder):
    folders = {
        "HQ": folder("hq", "a.png", "b_out.png"),
        "outputs": folder("out", name, "b_out.png"),
    }
    found = match_images(folders, strip_suffix="_out")
    assert found["a"]["outputs"].name == name
    assert found["b_out"]["outputs"].name == "b_out.png"
