"""Choose each image's prompt: the user's, with what a tagger says of the image before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from tadsr.images import DecodedImage, encode_image

PromptStyle = Literal["published", "training"]
"""How tags and a user's prompt become one text: "published" as TADSR's published inference writes
it, "{tags}, {prompt}," with its commas; "training" as its training prompts, tags alone."""
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)


def choose_prompts(
    prompt: str | Sequence[str] | None,
    images: Sequence[DecodedImage],
    tagger: Callable[[Any], str] | None,
    text_encoder: Any,
    style: PromptStyle = "published",
) -> list[str]:
    """Choose the prompts of images.

    Args:
        prompt: The user's, one for all or one per image; None is "".
        tagger: Describes an image, given as an 8-bit PIL image; None for none.
        text_encoder: What will read the prompts; None where the model knows a few only.
    """
    if prompt is None:
        prompt = ""
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * len(images)
    if len(prompts) != len(images):
        raise ValueError(
            f"prompt must be one text or one per image ({len(images)}), got {len(prompts)}"
        )
    if tagger is None:
        return prompts
    check_taggable(text_encoder)
    described = describe_images(tagger, [show_to_tagger(image) for image in images])
    return [join_prompt(d, text, style) for d, text in zip(described, prompts, strict=True)]


def show_to_tagger(image: DecodedImage) -> Any:
    """Return an image as a tagger is shown it: PIL, 8 bit, upright, without alpha."""
    return encode_image(image.rgb, None, image, "pil")


def describe_images(tagger: Callable[[Any], str], images: Sequence[Any]) -> list[str]:
    """Ask a tagger about images, together if it has `tag_batch`."""
    tag_batch = getattr(tagger, "tag_batch", None)
    texts = [tagger(image) for image in images] if tag_batch is None else tag_batch(images)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a tagger must return text, got {type(text).__name__}")
    return texts


def join_prompt(tags: str, prompt: str, style: PromptStyle) -> str:
    """Join a tagger's words and a user's prompt."""
    if style not in PROMPT_STYLES:
        raise ValueError(f"prompt_style must be one of {', '.join(PROMPT_STYLES)}, got {style!r}")
    if style == "published":
        return f"{tags}, {prompt},"  # "tree, lake, ," where there is no prompt
    return ", ".join(text for text in (tags, prompt) if text)


def check_taggable(text_encoder: Any) -> None:
    """Check that a model can read any prompt, as a tagger needs."""
    if text_encoder is None:
        raise ValueError(
            "a tagger must have a text encoder to write for, but this model has none and knows "
            "only fixed prompts (as tadsr-tiny does); leave the tagger out, or load the "
            "published model"
        )
