"""What the published tagger is shown: the published code's pixels, and large pictures in bands."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from safetensors.torch import load_file

from tadsr.prompts.tagger import prepare_view

MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


@pytest.mark.parametrize("name", ["image0.png", "image1.png", "image2.png"])
def test_the_enlarged_picture_is_seen_as_in_the_published_code(data_dir, name):
    recorded = load_file(data_dir / "tagger" / "golden.safetensors")
    image = Image.open(data_dir / "tagger" / name)
    found = prepare_view(image, 96, "enlarged")
    torch.testing.assert_close(found, recorded[f"{name}.tadsr.pixels"][0], atol=2e-6, rtol=0)
    some_rows = recorded.get(f"{name}.tadsr384.pixels.every_16th_row")
    if some_rows is not None:
        found = prepare_view(image, 384, "enlarged")[:, ::16]
        torch.testing.assert_close(found, some_rows[0], atol=5e-6, rtol=0)


def enlarge_whole(image: Image.Image) -> Image.Image:
    """The enlarged picture in one piece; its sides are at least 128 px."""
    width, height = (4 * length for length in image.size)
    for size in ((width, image.height), (width, height)):  # Pillow's own order differs
        image = image.resize(size, Resampling.BICUBIC)
    width8, height8 = width // 8 * 8, height // 8 * 8
    for size in ((width8, height), (width8, height8)):
        image = image.resize(size, Resampling.LANCZOS)
    return image


# Both sides even, one or both odd, several bands, and an input that is smaller than its samples.
@pytest.mark.parametrize(
    ("width", "height", "side"),
    [(128, 300, 32), (131, 300, 384), (128, 777, 96), (257, 515, 96), (171, 129, 384)],
)
def test_sampling_in_bands_equals_interpolating_the_whole(width, height, side):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    whole = torch.from_numpy(np.array(enlarge_whole(image))).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(whole, (side, side), mode="bilinear")[0]
    found = prepare_view(image, side, "enlarged") * STD + MEAN
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # of 1, and of a level 0.004
