"""Prompts: what a picture's is, the published tagger, and embeddings by a text encoder."""

from tadsr.prompts.choice import (
    PROMPT_STYLES,
    PromptStyle,
    check_taggable,
    choose_prompts,
    describe_images,
    show_to_tagger,
)
from tadsr.prompts.embeddings import Prompts, TextEmbeddings, embed_texts
