"""Prompts from images: choose what a picture's prompt is, and the published tagger."""

from tadsr.prompts.choice import check_taggable, choose_prompts
from tadsr.prompts.embeddings import TextEmbeddings

__all__ = ["TextEmbeddings", "check_taggable", "choose_prompts"]
