import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tadsr import TADSRPipeline, TimestepMap


@pytest.fixture
def expect(model_dir):
    """What the pipeline makes of a photo and a map."""
    pipe = TADSRPipeline.from_pretrained(model_dir)
    return lambda photo, timestep: np.asarray(pipe(Image.open(photo), timestep, process_size=0))


def test_a_mask_with_a_range_is_used_for_every_photo(upscale, photo, expect):
    mask = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(mask).save("mask.png")
    paths = photo("a.png", size=(9, 7)), photo("bb.png", size=(6, 8))
    upscale(*paths, "-o", "out", "--timestep-map", "mask.png", "--timestep-range", "50:800")
    for path in paths:
        timestep = TimestepMap.from_image(mask, (50, 800))
        np.testing.assert_array_equal(
            np.asarray(Image.open(Path("out", path.name))), expect(path, timestep)
        )


def test_a_mask_without_a_range_is_taken_as_it_is_and_said_so(upscale, photo):
    Image.new("L", (2, 2), 255).save("mask.png")
    result = upscale(photo("a.png"), "out.png", "--timestep-map", "mask.png")
    assert "white is taken as timestep 255" in result.stderr
    Image.new("L", (2, 2), 200).save("mask.png")
    result = upscale("a.png", "other.png", "--timestep-map", "mask.png")
    assert "white" not in result.stderr


def test_regions_come_from_a_json_file(upscale, photo, expect):
    regions = {"default": 900, "regions": [{"box": [0, 0, 4, 3], "timestep": 1, "feather": 2}]}
    Path("regions.json").write_text(json.dumps(regions))
    path = photo("a.png", size=(9, 7))
    upscale(path, "out.png", "--timestep-map", "regions.json")
    np.testing.assert_array_equal(np.asarray(Image.open("out.png")), expect(path, regions))
    # A box that lies outside one photo is that photo's failure alone.
    small = photo("small.png", size=(3, 3))
    result = upscale(path, small, "-o", "out", "--timestep-map", "regions.json", code=1)
    assert "small.png: regions[0] box must lie inside the input's 3×3 px" in result.stderr
    assert Path("out/a.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--timestep-range", "1:2"], "--timestep-range needs --timestep-map with an image"),
        (["--timestep-map", "r.json", "--timestep-range", "1:2"], "with an image"),
        (["--timestep-map", "mask.png", "--timestep-range", "1-2"], "must be like 50:800"),
        (["--timestep-map", "mask.png", "--timestep-range", "1:1200"], "0..999, got 1200"),
        (["--timestep-map", "color.png"], "color.png: a timestep map must be a grey image"),
        (["--timestep-map", "mask.png", "-t", 3], "--timestep and --timestep-map must not both"),
        (["--timestep-map", "r.json"], "r.json: a timestep map of regions must have default"),
        (["--timestep-map", "broken.json"], "broken.json: Expecting"),
    ],
)
def test_wrong_maps_are_misuse(upscale, photo, args, message):
    photo("a.png")
    Image.new("L", (2, 2), 255).save("mask.png")
    Image.new("RGB", (2, 2), "red").save("color.png")
    Path("r.json").write_text("{}")
    Path("broken.json").write_text("{")
    assert message in upscale("a.png", *args, code=2).stderr
    assert not Path("a_x4.png").exists()


def test_a_missing_map_is_an_error(upscale, photo):
    assert "no.png" in upscale(photo("a.png"), "--timestep-map", "no.png", code=1).stderr
    assert "no.json" in upscale(photo("a.png"), "--timestep-map", "no.json", code=1).stderr
