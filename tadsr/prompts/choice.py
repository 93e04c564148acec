"""Choose each image's prompt: the user's, the tagger's, or the empty one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tadsr.images import DecodedImage, encode_image


def choose_prompts(
    prompt: str | Sequence[str] | None,
    images: Sequence[DecodedImage],
    tagger: Callable[[Any], str] | None,
    text_encoder: Any,
) -> list[str]:
    """Choose the prompts of images.

    Args:
        prompt: The user's, one for all or one per image; None for none.
        images: The images.
        tagger: Writes the prompt of an image, given as an 8-bit PIL image; None for none.
        text_encoder: What will read the prompts; None where the model knows a few only.

    Returns:
        One prompt per image: the user's if given, else the tagger's, else "".

    Raises:
        ValueError: The numbers of prompts and images differ, or nothing can read a tagger's.
    """
    if prompt is None and tagger is not None:
        check_taggable(text_encoder)
        return [tagger(encode_image(image.rgb, None, image, "pil")) for image in images]
    if prompt is None:
        prompt = ""
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * len(images)
    if len(prompts) != len(images):
        raise ValueError(
            f"prompt must be one text or one per image ({len(images)}), got {len(prompts)}"
        )
    return prompts


def check_taggable(text_encoder: Any) -> None:
    """Check that a model can read whatever a tagger writes.

    Args:
        text_encoder: The model's, or None.

    Raises:
        ValueError: There is none.
    """
    if text_encoder is None:
        raise ValueError(
            "a tagger must have a text encoder to write for, but this model has none and knows "
            "only fixed prompts (as tadsr-tiny does); leave the tagger out, or load the "
            "published model"
        )
