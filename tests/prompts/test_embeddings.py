"""Embeddings of prompts, with the text encoder of the small published model."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tadsr.prompts import TextEmbeddings, embed_texts
from tadsr.prompts.choice import MAX_PROMPTS

CPU = torch.device("cpu")


@pytest.fixture
def embed(golden_pipeline):
    embeddings = TextEmbeddings()
    encoder, tokenizer = golden_pipeline.text_encoder, golden_pipeline.tokenizer

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
