"""Prompts from images: choose what a picture's prompt is, and the published tagger."""

from tadsr.prompts.choice import check_taggable, choose_prompts

__all__ = ["check_taggable", "choose_prompts"]
