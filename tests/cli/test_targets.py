import os
from pathlib import Path

import pytest

from tadsr.cli.reporting import UsageError
from tadsr.cli.targets import check_place, plan_jobs, split_output
from tadsr.errors import ImageWriteError


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = "a.jpg b.jpg c.jpg photos/p.png photos/sub/q.tif more/r.webp"
    for name in (*photos.split(), "notes.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("sharp").mkdir()


def plan(paths: str, output=None, *, format=None, scale=4.0) -> dict[str, str]:
    jobs = plan_jobs(paths.split(), output, format=format, scale=scale)
    return {job.source.as_posix(): job.target.as_posix() for job in jobs}


@pytest.mark.parametrize(
    ("paths", "output", "targets"),
    [
        ("a.jpg", None, "a_x4.png"),
        ("a.jpg new.webp", None, "new.webp"),
        ("a.jpg deep/new.png", None, "deep/new.png"),
        ("a.jpg sharp", None, "sharp/a.png"),
        ("a.jpg new/", None, "new/a.png"),
        ("a.jpg", "b.jpg", "b.jpg"),
        ("a.jpg b.jpg", "sharp/", "sharp/a.png sharp/b.png"),
        ("a.jpg b.jpg sharp", None, "sharp/a.png sharp/b.png"),
        ("a.jpg b.jpg new", None, "new/a.png new/b.png"),
        ("a.jpg a.jpg ./b.jpg new/", None, "new/a.png new/b.png"),
        ("a.jpg b.jpg c.jpg", None, "a_x4.png b_x4.png c_x4.png"),
        ("photos", None, "photos_x4/p.png photos_x4/sub/q.png"),
        ("photos/ sharp/", None, "sharp/p.png sharp/sub/q.png"),
        ("photos more a.jpg", "s", "s/photos/p.png s/photos/sub/q.png s/more/r.png s/a.png"),
    ],
)
def test_outputs_are_named_by_the_documented_rules(paths, output, targets):
    assert list(plan(paths, output).values()) == targets.split()


def test_the_folder_one_stands_in_gets_a_sibling(tmp_path, monkeypatch):
    monkeypatch.chdir("more")
    assert plan(".") == {"r.webp": (tmp_path / "more_x4/r.png").as_posix()}


def test_format_and_scale_are_in_the_name():
    assert plan("a.jpg", format="avif", scale=2.5) == {"a.jpg": "a_x2.5.avif"}
    assert plan("photos", format="jpg", scale=2)["photos/p.png"] == "photos_x2/p.jpg"


def test_sources_of_one_name_keep_their_suffix():
    Path("photos/p.jpg").touch()
    found = plan("photos", "new")
    assert found["photos/p.png"] == "new/p.png.png"
    assert found["photos/p.jpg"] == "new/p.jpg.png"
    assert found["photos/sub/q.tif"] == "new/sub/q.png"


def test_a_suffix_that_is_kept_may_make_another_clash():
    for name in ("x.jpg", "x.png", "x.jpg.png", "x.jpg.png.webp", "x.png.webp.tif"):
        Path("more", name).touch()
    expected = {
        "more/r.webp": "new/r.png",
        "more/x.jpg": "new/x.jpg.png",
        "more/x.png": "new/x.png.png",
        "more/x.jpg.png": "new/x.jpg.png.png",
        "more/x.jpg.png.webp": "new/x.jpg.png.webp.png",
        "more/x.png.webp.tif": "new/x.png.webp.png",
    }
    assert plan("more", "new") == expected
    for target in expected.values():
        Path(target).parent.mkdir(exist_ok=True)
        Path(target).touch()
        assert plan("more", "new") == expected


@pytest.mark.parametrize(
    ("paths", "output", "format", "message"),
    [
        ("a.jpgg", None, None, "does not exist; did you mean a.jpg?"),
        ("photos/pp.png new.png", None, None, "did you mean photos/p.png?"),
        ("a.jpg new", None, None, "must end in one of .png"),
        ("a.jpg new.png", None, "jpg", "--format jpg does not fit the output new.png"),
        ("a.jpg b.jpg new.png", None, None, "must be a folder, got the file new.png"),
        ("photos", "new.gif", None, "must be a folder, got the file new.gif"),
        ("photos", "a.jpg", None, "must be a folder, got the file a.jpg"),
        ("photos", "photos/", None, "must not be the input folder"),
        ("sharp", None, None, "must hold images"),
        ("a.jpg", "a.jpg", None, "which is an input"),
        ("a.jpg b.jpg", ".", "jpg", "which is an input"),
        ("a.jpg notes.txt", None, None, "if it is the output, write -o notes.txt"),
        ("https://example.com/a.jpg", None, None, "addresses are not read; download it first"),
        ("a.jpg", "", None, "a path must not be empty"),
        ("photos notes.txt", None, None, "if it is the output, write -o notes.txt"),
    ],
)
def test_what_does_not_fit_is_refused(paths, output, format, message):
    with pytest.raises(UsageError) as caught:
        plan(paths, output, format=format)
    assert message in caught.value.format_message()


def test_a_file_beside_a_folder_may_have_been_meant_as_the_output():
    said: list[str] = []
    plan_jobs(["photos", "a.jpg"], None, format=None, scale=4, say=said.append)
    assert said == ["a.jpg: exists, so it is read as one more image; -o names the output"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux has a folder like that")
def test_a_folder_that_only_looks_writable_is_refused():
    with pytest.raises(ImageWriteError, match="the folder /proc is not writable \\(No such file"):
        check_place(Path("/proc/new.png"))


def test_two_sources_never_share_a_target():
    Path("more/a.jpg").touch()
    with pytest.raises(UsageError, match=r"would both become new/a.jpg.png"):
        plan("a.jpg more/a.jpg", "new")


def test_a_linked_output_counts_as_what_it_points_to():
    os.symlink("a.jpg", "link.png")
    with pytest.raises(UsageError, match="which is an input"):
        plan("a.jpg", "link.png")


def test_an_explicit_output_leaves_every_path_an_input():
    assert split_output(["a.jpg", "sharp"], "out", 4) == (["a.jpg", "sharp"], "out")
