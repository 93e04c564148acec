"""The prompt of each image, with what a tagger says of it before, and the prompts' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tadsr.caches import ModuleWatch, RecentlyUsed
from tadsr.images import DecodedImage, encode_image

PromptStyle = Literal["published", "training"]
"""How tags and a user's prompt become one text: "published" as TADSR's published inference writes
it, "{tags}, {prompt}," with its commas; "training" as its training prompts, tags alone."""
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)
MAX_PROMPTS = 32
"""Prompts whose embeddings are kept."""


def choose_prompts(
    prompt: str | Sequence[str] | None,
    images: Sequence[DecodedImage],
    tagger: Callable[[Any], str] | None,
    text_encoder: Any,
    style: PromptStyle = "published",
) -> list[str]:
    """Choose the prompts of images: the user's, behind a tagger's words where there is one."""
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


@dataclass(frozen=True, eq=False)
class Prompts:
    """Embeddings of prompts, with a cache key for each."""

    embeds: Tensor
    """(B, L, D), on the device; of one prompt for all, a view of a single row."""
    keys: tuple[Hashable, ...] | None = None
    """One per row; equal keys stand for equal embeddings. None where nothing is known of them."""

    def __getitem__(self, rows: slice) -> Prompts:
        """Return some of the prompts."""
        return Prompts(self.embeds[rows], self.keys[rows] if self.keys else None)

    def expand(self, batch: int) -> Prompts:
        """Repeat a single prompt for a batch."""
        keys = self.keys * batch if self.keys else None
        return Prompts(self.embeds.expand(batch, -1, -1), keys)


class TextEmbeddings:
    """Embeds prompts, with a cache of recent ones that is cleared when the weights change."""

    def __init__(self) -> None:
        self._network: tuple[nn.Module, torch.device] | None = None
        self._watch: ModuleWatch | None = None
        self._rows: dict[str, Tensor] = RecentlyUsed(MAX_PROMPTS)
        self._generation = 0

    def __getstate__(self) -> dict[str, object]:
        # A copy has networks of its own, and embeddings on its own device.
        return {**vars(self), "_network": None, "_watch": None, "_rows": RecentlyUsed(MAX_PROMPTS)}

    def clear(self) -> None:
        """Forget all embeddings, as after a change of the network's weights."""
        self._rows.clear()
        self._generation += 1

    def of(
        self,
        prompts: Sequence[str],
        network: nn.Module,
        embed: Callable[[list[str]], Tensor],
        device: torch.device,
    ) -> Prompts:
        """Return the embeddings of prompts; `embed` turns texts into (B, L, D) on the device."""
        is_same = self._network == (network, device)
        if not is_same or not (self._watch is None or self._watch.is_current()):
            self.clear()
            self._network = network, device
            # Weights that accelerate keeps elsewhere come and go without a change.
            is_offloaded = hasattr(network, "_hf_hook")
            self._watch = None if is_offloaded else ModuleWatch([network])
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        if missing:
            with torch.inference_mode(False), torch.no_grad():
                rows.update(zip(missing, embed(missing), strict=True))
        self._rows.update(rows)
        if len(rows) == 1:
            embeds = rows[prompts[0]].expand(len(prompts), -1, -1)
        else:
            embeds = torch.stack([rows[prompt] for prompt in prompts])
        return Prompts(embeds, tuple((self._generation, prompt) for prompt in prompts))


def embed_texts(
    text_encoder: Any, tokenizer: Any, device: torch.device, texts: Sequence[str]
) -> Tensor:
    """Embed texts by a CLIP text model, (B, L, D)."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(device))[0]
