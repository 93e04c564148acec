"""Whose prompt an image gets, through the whole pipeline, and the embeddings of prompts."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tadsr import TADSRPipeline
from tadsr.errors import CheckpointError
from tadsr.prompts import TextEmbeddings, embed_texts
from tadsr.prompts.choice import MAX_PROMPTS

CPU = torch.device("cpu")
FAST = {"process_size": 0}


class Namer:
    """A tagger that says what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, int]]] = []

    def __call__(self, image: Image.Image) -> str:
        self.seen.append((image.mode, image.size))
        return f"{image.width} trees"


@pytest.fixture
def pipe(small_pipeline, monkeypatch):
    monkeypatch.setattr(small_pipeline, "tagger", Namer())
    monkeypatch.setattr(small_pipeline, "prompt_style", "published")
    return small_pipeline


def photo(width: int, height: int = 8) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def test_each_image_gets_its_own_tags(pipe):
    images = [photo(8), photo(12)]
    tagged = pipe(images, **FAST)
    assert pipe.tagger.seen == [("RGB", (8, 8)), ("RGB", (12, 8))]
    pipe.tagger = None
    given = pipe(images, prompt=["8 trees, ,", "12 trees, ,"], **FAST)
    for a, b in zip(tagged, given, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tagged[0] != pipe(photo(8), **FAST)).any()


@pytest.mark.parametrize(
    ("style", "prompt", "read"),
    [
        ("published", "a lake", "8 trees, a lake,"),
        ("published", "", "8 trees, ,"),
        ("training", "a lake", "8 trees, a lake"),
        ("training", None, "8 trees"),
    ],
)
def test_the_users_prompt_comes_behind_the_tags(pipe, style, prompt, read):
    pipe.prompt_style = style
    tagged = pipe(photo(8), prompt=prompt, **FAST)
    pipe.tagger = None
    np.testing.assert_array_equal(tagged, pipe(photo(8), prompt=read, **FAST))


def test_an_unknown_style_and_no_tags_at_all(pipe):
    pipe.tagger = lambda image: ""
    none = pipe(photo(8), **FAST)
    pipe.prompt_style = "commas"
    with pytest.raises(ValueError, match="prompt_style must be one of published, training"):
        pipe(photo(8), **FAST)
    pipe.tagger = None
    np.testing.assert_array_equal(none, pipe(photo(8), prompt=", ,", **FAST))


def test_a_tagger_may_take_several_images_and_moves_with_the_pipeline(pipe):
    class Network(torch.nn.Linear):
        def tag_batch(self, images):
            return [f"{image.width} trees" for image in images]

    expected = pipe([photo(8), photo(12)], **FAST)
    pipe.tagger = Network(1, 1)
    for a, b in zip(pipe([photo(8), photo(12)], **FAST), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    pipe.to("cpu")
    assert pipe.tagger.weight.device == pipe.device


def test_files_written_in_strips_are_tagged_too(pipe, tmp_path):
    pipe.upscale_to_file(photo(8), tmp_path / "a.png", **FAST)
    assert pipe.tagger.seen == [("RGB", (8, 8))]
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pipe(photo(8), **FAST))


def test_sweeps_are_tagged_as_calls_are(pipe):
    results = pipe.sweep(photo(8), (1, 900), **FAST)
    assert pipe.tagger.seen == [("RGB", (8, 8))]
    np.testing.assert_array_equal(results[1], pipe(photo(8), 900, **FAST))
    pipe.tagger = None
    assert (results[1] != pipe.sweep(photo(8), (900,), **FAST)[0]).any()


def test_without_a_tagger_the_prompt_is_empty(small_pipeline):
    without = small_pipeline(photo(8), **FAST)
    np.testing.assert_array_equal(without, small_pipeline(photo(8), prompt="", **FAST))


def test_a_model_that_reads_no_text_refuses_a_tagger_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"this model has none .* tadsr-tiny"):
        TADSRPipeline.from_pretrained("tadsr-tiny", tagger="dape")
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    pipe.tagger = namer = Namer()
    with pytest.raises(ValueError, match="this model has none"):
        pipe(photo(8), **FAST)
    assert namer.seen == []


def test_a_tagger_that_returns_no_text_is_told_so(pipe):
    pipe.tagger = lambda image: ["tree"]
    with pytest.raises(TypeError, match="a tagger must return text, got list"):
        pipe(photo(8), **FAST)


def test_the_published_tagger_is_looked_for_beside_the_checkpoint(golden_dir):
    with pytest.raises(CheckpointError, match=r"ram_swin_large_14m\.pth"):
        TADSRPipeline.from_pretrained(
            golden_dir / "base", adapter=golden_dir / "tadsr.pkl", tagger="dape"
        )


@pytest.fixture
def embed(small_pipeline):
    embeddings = TextEmbeddings()
    encoder, tokenizer = small_pipeline.text_encoder, small_pipeline.tokenizer

    @torch.no_grad()
    def embed(*prompts):
        return embeddings.of(
            prompts, encoder, partial(embed_texts, encoder, tokenizer, CPU), CPU
        ).embeds

    embed.kept = embeddings
    embed.encoder = encoder
    return embed


def test_each_prompt_gets_its_own_row_whatever_comes_with_it(embed):
    alone = [embed(text)[0] for text in ("", "a tree", "a house")]
    assert not torch.equal(alone[1], alone[2])
    embed.kept.clear()
    together = embed("a house", "", "a tree", "a house")
    assert_close(together, torch.stack([alone[i] for i in (2, 0, 1, 2)]), atol=1e-5, rtol=0)


def test_one_prompt_for_all_is_a_view(embed):
    rows = embed("a tree", "a tree", "a tree")
    assert rows.shape[0] == 3
    assert rows.stride(0) == 0


def test_what_is_kept_is_bounded_but_for_the_call_itself(embed):
    texts = [f"{number} trees" for number in range(MAX_PROMPTS + 5)]
    rows = embed(*texts)
    assert len(rows) == len(texts)
    assert list(embed.kept._rows) == texts[5:]
    embed(texts[5])
    embed("another")
    assert texts[5] in embed.kept._rows
    assert texts[6] not in embed.kept._rows


def test_weights_that_change_in_place_embed_anew(embed):
    before = embed("a tree").clone()
    weight = next(embed.encoder.parameters())
    with torch.no_grad():
        weight.mul_(2)
    changed = embed("a tree").clone()
    with torch.no_grad():
        weight.div_(2)
    assert not torch.allclose(before, changed)
    assert_close(embed("a tree"), before)
