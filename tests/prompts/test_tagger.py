import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from safetensors.torch import load_file

from tadsr.prompts.tagger import Tagger, TaggerConfig, TaggerNetwork, prepare_view

CONFIG = TaggerConfig(
    image_size=32,
    embed_dim=4,
    depths=(1, 1),
    num_heads=(1, 2),
    window_size=4,
    num_tags=4,
    label_dim=4,
    hidden_size=8,
    num_decoder_heads=2,
    intermediate_size=8,
)
MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
TAGS = ("tree", "lake", "night sky", "dog")


class FixedScores(TaggerNetwork):
    """Scores that a test chooses, to see what is made of them."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__(CONFIG)
        self.logits = torch.logit(torch.tensor([probabilities]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape == (1, 3, 32, 32)
        return self.logits


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_tags_above_their_own_thresholds_are_joined_in_the_lists_order():
    network = FixedScores([0.6, 0.9, 0.6, 0.2])
    assert Tagger(network, TAGS, [0.5, 0.8, 0.7, 0.1])(picture()) == "tree, lake, dog"
    assert Tagger(network, TAGS, 0.68)(picture()) == "lake"
    assert Tagger(network, TAGS, 0.95)(picture()) == ""


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_mode_is_taken(mode):
    torch.manual_seed(0)
    tagger = Tagger(TaggerNetwork(CONFIG).eval(), TAGS, 0.0)
    assert tagger(picture(mode)) == ", ".join(TAGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1,)}, "one entry per stage"),
        ({"num_tags": 0}, "num_tags must be at least 1"),
        ({"depths": (1, 0)}, "depths must be at least 1"),
        ({"num_decoder_heads": 3}, "multiple of num_decoder_heads"),
    ],
)
def test_sizes_that_make_no_network_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TaggerConfig(**{**vars(CONFIG), **change})


def test_tags_and_thresholds_must_fit_the_network():
    network = TaggerNetwork(CONFIG)
    with pytest.raises(ValueError, match=r"one per score \(4\), got 3 and 4"):
        Tagger(network, TAGS[:3], 0.5)
    with pytest.raises(ValueError, match="got 4 and 2"):
        Tagger(network, TAGS, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got 68"):
        Tagger(network, TAGS, 68)


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
