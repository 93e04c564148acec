import pytest

from tadsr.networks.prompt_embeddings import PromptEmbeddings


def test_rows_follow_the_prompts():
    model = PromptEmbeddings(prompts=("", "sharp photo"), num_tokens=3, embedding_dim=4)
    rows = model(["sharp photo", "", "sharp photo"])
    assert rows.shape == (3, 3, 4)
    assert rows[0].equal(model.embeddings[1])
    assert rows[1].equal(model.embeddings[0])


def test_an_unknown_prompt_is_refused_by_name():
    with pytest.raises(ValueError, match="got 'a dog'"):
        PromptEmbeddings(prompts=("",), embedding_dim=4)(["a dog"])


@pytest.mark.parametrize("prompts", [(), ("", "")])
def test_prompts_must_be_distinct_and_present(prompts):
    with pytest.raises(ValueError, match="non-empty and distinct"):
        PromptEmbeddings(prompts=prompts)
