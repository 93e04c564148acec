"""Files that users name: pipes are not waited for, and what is nested too deeply is refused."""

import os
import signal

import pytest
from PIL import Image

from tadsr.cli.options import read_timestep_map
from tadsr.degradation.partners import read_records
from tadsr.errors import TADSRError
from tadsr.folders.manifest import read_manifest
from tadsr.folders.tagging import read_tags
from tadsr.images import read_image, write_image
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.named_files import parse_json, read_yaml
from tadsr.training.data.samples import photo_size
from tadsr.training.data.sources import find_captions, read_list
from tadsr.training.training_config import DataConfig
from tadsr.whole_file import whole_file

READERS = {
    "recipe": read_yaml,
    "list": lambda path: read_list(DataConfig(source=str(path))),
    "captions": lambda path: find_captions(str(path), path.parent, [path]),
    "tags": read_tags,
    "records": lambda path: list(read_records(path)),
    "regions": lambda path: read_timestep_map(path.with_suffix(".json"), None),
    "weights": SqueezeNetDistance,
    "image": read_image,
}


@pytest.fixture(params=["pipe", "/dev/zero"])
def pipe(tmp_path, request):
    """A file without an end, under several names; who waits for it is interrupted.

    Of a pipe nobody writes to nothing comes, of the other never the last.
    """
    path = tmp_path / "pipe"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(request.param)
    for name in ("pipe.json", "pipe.png", "tadsr-manifest.jsonl"):
        path.with_name(name).symlink_to(path)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the pipe was waited for"))
    signal.alarm(60)
    yield path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_pipe_is_refused(pipe, reader):
    with pytest.raises((TADSRError, ValueError, OSError), match="must be a file, but is a"):
        reader(pipe)


def test_a_pipe_holds_nothing_and_is_not_replaced(pipe):
    assert photo_size(pipe) is None
    assert read_manifest(pipe.parent) == []
    with pytest.raises(OSError, match="must be a file"), whole_file(pipe) as partial:
        partial.touch()
    with pytest.raises(TADSRError, match="must name a file"):
        write_image(Image.new("RGB", (1, 1)), pipe.with_suffix(".png"))
    assert pipe.is_fifo() or pipe.is_char_device()


def test_what_is_nested_too_deeply_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too deep"):
        parse_json("[" * 100_000)
    path = tmp_path / "recipe.yaml"
    path.write_text("a: " + "[" * 400)
    with pytest.raises(ValueError, match="must be a readable YAML file"):
        read_yaml(path)


def test_a_small_recipe_stands_for_no_large_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 10)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="aliases"):
        read_yaml(path)
