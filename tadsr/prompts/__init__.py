"""Prompts: what a picture's is, the published tagger, and embeddings by a text encoder."""

from tadsr.prompts.choice import (
    PROMPT_STYLES,
    Prompts,
    PromptStyle,
    TextEmbeddings,
    check_taggable,
    choose_prompts,
    describe_images,
    embed_texts,
    show_to_tagger,
)
