"""The published tagger: RAM's Swin-L with a decoder over its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, SwinConfig, SwinModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

from tadsr.images import decode_image
from tadsr.prompts.choice import show_to_tagger
from tadsr.prompts.tagger_input import TAGGER_VIEWS, TaggerView, prepare_view

MAX_BATCH = 8
"""Images that a tagger's network scores at once."""


@dataclass(frozen=True)
class TaggerConfig:
    """Describe a tagger's network; the defaults are the published one's.

    Attributes:
        image_size: Side of the square that images are resized to, in px.
        embed_dim: Channels of the Swin encoder's first stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Side of an attention window, in patches of 4 px.
        num_tags: Number of tags it tells apart.
        label_dim: Width of a tag's embedding, and of the projected image.
        hidden_size: Width of the decoder.
        num_decoder_layers: Layers of the decoder.
        num_decoder_heads: Attention heads of a decoder layer.
        intermediate_size: Width of a decoder layer's MLP.

    Raises:
        ValueError: A size is under 1, or widths and heads do not fit.
    """

    image_size: int = 384
    embed_dim: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (6, 12, 24, 48)
    window_size: int = 12
    num_tags: int = 4585
    label_dim: int = 512
    hidden_size: int = 768
    num_decoder_layers: int = 2
    num_decoder_heads: int = 4
    intermediate_size: int = 3072

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            smallest = min(value, default=0) if isinstance(value, tuple) else value
            if smallest < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                "depths and num_heads must have one entry per stage, got "
                f"{len(self.depths)} and {len(self.num_heads)}"
            )
        if self.hidden_size % self.num_decoder_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_decoder_heads, got {self.hidden_size} "
                f"and {self.num_decoder_heads}"
            )


class _LabelAttention(nn.Module):
    """Attend from labels to the image, whose features have another width."""

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_decoder_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.label_dim, config.hidden_size)
        self.value = nn.Linear(config.label_dim, config.hidden_size)

    def forward(self, labels: Tensor, image: Tensor) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, L, D / heads]
            for x in (self.query(labels), self.key(image), self.value(image))
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _LabelDecoderLayer(nn.Module):
    """BERT's layer without attention among the labels themselves."""

    def __init__(self, config: TaggerConfig, bert: BertConfig) -> None:
        super().__init__()
        self.attention = _LabelAttention(config)
        self.attention_output = BertSelfOutput(bert)
        self.intermediate = BertIntermediate(bert)
        self.output = BertOutput(bert)

    def forward(self, labels: Tensor, image: Tensor) -> Tensor:
        attended = self.attention_output(self.attention(labels, image), labels)
        return self.output(self.intermediate(attended), attended)


class TaggerNetwork(nn.Module):
    """Score every tag for an image: a Swin encoder, and a decoder from labels to the image.

    Source: Recognize Anything (arXiv 2306.03514), image-tag recognition decoder.
    """

    def __init__(self, config: TaggerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TaggerConfig()
        swin = SwinConfig(
            image_size=config.image_size,
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.window_size,
        )
        bert = BertConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_decoder_heads,
            intermediate_size=config.intermediate_size,
        )
        self.image_encoder = SwinModel(swin)
        for module in self.image_encoder.modules():  # transformers 4 has them saved
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        width = config.embed_dim * 2 ** (len(config.depths) - 1)
        self.image_proj = nn.Linear(width, config.label_dim)
        self.label_embed = nn.Parameter(torch.zeros(config.num_tags, config.label_dim))
        self.wordvec_proj = nn.Linear(config.label_dim, config.hidden_size)
        self.decoder = nn.ModuleList(
            _LabelDecoderLayer(config, bert) for _ in range(config.num_decoder_layers)
        )
        self.fc = nn.Linear(config.hidden_size, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Score the tags.

        Args:
            pixels: Images, (B, 3, S, S), as `prepare_view` gives them.

        Returns:
            Logits, (B, num_tags).
        """
        encoded = self.image_encoder(pixels)
        tokens = torch.cat([encoded.pooler_output[:, None], encoded.last_hidden_state], dim=1)
        image = self.image_proj(tokens)  # [B, 1 + patches, label_dim]
        labels = F.relu(self.wordvec_proj(self.label_embed)).expand(len(image), -1, -1)
        for layer in self.decoder:
            labels = layer(labels, image)
        return self.fc(labels).squeeze(-1)


class Tagger(nn.Module):
    """Describe an image by its tags: "tree, lake, mountain".

    A tagger is any callable from a PIL image to a text; this is the published one. It computes
    where its weights are and in their type, the probabilities included; thresholds are float32.

    Args:
        thresholds: The probability above which a tag is named: one for all or one per tag, 0..1.
    """

    def __init__(
        self,
        network: TaggerNetwork,
        tags: Sequence[str],
        thresholds: float | Sequence[float],
        view: TaggerView = "enlarged",
    ) -> None:
        super().__init__()
        num_tags = network.config.num_tags
        if isinstance(thresholds, float | int):
            thresholds = [thresholds] * num_tags
        if not len(tags) == len(thresholds) == num_tags:
            raise ValueError(
                f"tags and thresholds must be one per score ({num_tags}), got {len(tags)} and "
                f"{len(thresholds)}"
            )
        outside = [value for value in thresholds if not 0 <= value <= 1]
        if outside:
            raise ValueError(f"thresholds must be in 0..1, got {outside[0]}")
        if view not in TAGGER_VIEWS:
            raise ValueError(f"view must be one of {', '.join(TAGGER_VIEWS)}, got {view!r}")
        self.network = network
        self.tags = tuple(tags)
        # No buffer: a tagger in half precision compares with the thresholds as they are.
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32)
        self.view: TaggerView = view

    def forward(self, image: Any) -> str:
        """Return the tags of an image."""
        return self.tag_batch([image])[0]

    @torch.no_grad()
    def tag_batch(self, images: Sequence[Any]) -> list[str]:
        """Return the tags of several images; some at a time go through the network together."""
        found: list[str] = []
        for start in range(0, len(images), MAX_BATCH):
            logits = self.network(self._prepare(images[start : start + MAX_BATCH]))
            is_named = torch.sigmoid(logits).cpu() > self.thresholds
            found += [", ".join(compress(self.tags, row)) for row in is_named.tolist()]
        return found

    def to_device(self, device: torch.device) -> Tagger:
        """Move to a device, in the type that is usual there."""
        return self.to(device, usual_dtype(device))

    def _prepare(self, images: Sequence[Any]) -> Tensor:
        weight = self.network.fc.weight
        side = self.network.config.image_size
        shown = (show_to_tagger(decode_image(image)).convert("RGB") for image in images)
        pixels = [prepare_view(image, side, self.view) for image in shown]
        return torch.stack(pixels).to(weight.device, weight.dtype)


def usual_dtype(device: torch.device) -> torch.dtype:
    """Return the type that a tagger computes in: float16 on CUDA, as published, else float32."""
    return torch.float16 if device.type == "cuda" else torch.float32
