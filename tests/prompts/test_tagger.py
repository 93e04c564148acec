import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.prompts.tagger import Tagger, TaggerConfig, TaggerNetwork

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
