"""`tadsr tag` with taggers of the user's: batches, broken-off runs, other files in the way."""

import json
from pathlib import Path

import pytest

TAGGER = """
calls = []

def describe(image):
    calls.append(1)
    return f"{image.mode}, {image.width} trees"

class Batched:
    def __call__(self, image):
        raise NotImplementedError

    def tag_batch(self, images):
        return [f"{image.width} of {len(images)}" for image in images]

batched = Batched()
"""


@pytest.fixture
def tag(tadsr, tmp_path, photo):
    """Run `tadsr tag` on three pictures and a broken one, with a tagger of the current folder."""
    name = f"tagger_{tmp_path.name.replace('-', '_')}"  # modules stay loaded between tests
    Path(f"{name}.py").write_text(TAGGER)
    photo("lq/a.png", (6, 5))
    photo("lq/b/c.png", (7, 5), "RGBA")
    photo("lq/d.jpg", (9, 8), "L")

    def run(*args: object, function: str = "describe", code: int = 0):
        return tadsr("tag", *args, "--tagger", f"{name}:{function}", code=code)

    return run


def lines_of(path: str) -> dict[str, str]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {line["file_name"]: line["tags"] for line in lines}


def test_each_image_gets_a_line_in_the_folder_itself(tag):
    result = tag("lq")
    assert "3 tagged, 0 before, 0 failed" in result.stdout
    expected = {"a.png": "RGB, 6 trees", "b/c.png": "RGB, 7 trees", "d.jpg": "L, 9 trees"}
    assert lines_of("lq/tags.jsonl") == expected
    assert tag("lq/d.jpg").stdout == "L, 9 trees\n"
    assert "one image's are printed" in tag("lq/d.jpg", "out.jsonl", code=2).stderr


def test_a_run_that_was_broken_off_goes_on(tag, photo):
    tag("lq", "tags.jsonl")
    first, *_, last = Path("tags.jsonl").read_text().splitlines(keepends=True)
    Path("tags.jsonl").write_text(first + last[:20])
    assert "2 tagged, 1 before" in tag("lq", "tags.jsonl").stdout
    assert len(lines_of("tags.jsonl")) == 3
    photo("lq/new.png")
    assert "1 tagged, 3 before" in tag("lq", "tags.jsonl").stdout
    assert "0 tagged, 4 before" in tag("lq", "tags.jsonl").stdout
    assert tag("lq", "tags.jsonl", "--quiet").stdout == ""


def test_taggers_of_several_images_are_asked_in_batches(tag):
    tag("lq", "tags.jsonl", "--batch", 2, function="batched")
    assert list(lines_of("tags.jsonl").values()) == ["6 of 2", "9 of 2", "7 of 1"]


def test_what_cannot_be_read_fails_alone(tag):
    Path("lq/broken.png").write_bytes(b"no picture")
    result = tag("lq", "tags.jsonl", code=1)
    assert "Error: broken.png: " in result.stderr
    assert "3 tagged, 0 before, 1 failed" in result.stdout


def test_another_taggers_file_and_wrong_uses_are_refused(tag, tadsr):
    tag("lq", "tags.jsonl")
    before = Path("tags.jsonl").read_text()
    error = tag("lq", "tags.jsonl", function="batched", code=1).stderr
    assert "must be of the same tagger" in error
    assert "--overwrite" in error
    assert Path("tags.jsonl").read_text() == before
    tag("lq", "tags.jsonl", "--overwrite", function="batched")
    Path("notes.jsonl").write_text("my notes\nmore\n")
    assert "line 1, must be" in tag("lq", "notes.jsonl", code=1).stderr
    Path("empty").mkdir()
    assert "found none" in tag("empty", code=1).stderr
    assert "--batch must be in 1" in tag("lq", "--batch", 0, code=2).stderr
    assert "must lie beside a checkpoint" in tadsr("tag", "lq", "--tagger", "dape", code=1).stderr
