"""The published tagger: RAM's Swin-L with a decoder over its labels, and what it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor, nn
from transformers import BertConfig, SwinConfig, SwinModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

from tadsr.field_checks import Count, Within, check_fields
from tadsr.images import decode_image
from tadsr.prompts.choice import show_to_tagger

TaggerView = Literal["enlarged", "whole"]
"""What a tagger sees: the picture as TADSR enlarges it, or reduced as RAM's own transform does."""
TAGGER_VIEWS: tuple[TaggerView, ...] = get_args(TaggerView)

_SCALE = 4
_SMALLEST_SIDE_PX = 128
_MULTIPLE_PX = 8
_BAND_PX = 256  # rows of the input that are enlarged at a time
_BICUBIC_REACH_PX, _LANCZOS_REACH_PX = 2, 4  # to either side
_IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
_IMAGENET_STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
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
        ValueError: A size is no whole number from 1, or widths and heads do not fit.
    """

    image_size: Count = 384
    embed_dim: Count = 192
    depths: Annotated[tuple[int, ...], Within(1)] = (2, 2, 18, 2)
    num_heads: Annotated[tuple[int, ...], Within(1)] = (6, 12, 24, 48)
    window_size: Count = 12
    num_tags: Count = 4585
    label_dim: Count = 512
    hidden_size: Count = 768
    num_decoder_layers: Count = 2
    num_decoder_heads: Count = 4
    intermediate_size: Count = 3072

    def __post_init__(self) -> None:
        check_fields(self)
        if not len(self.depths) == len(self.num_heads) > 0:
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


def prepare_view(image: Image.Image, side: int, view: TaggerView) -> Tensor:
    """Turn a picture into the tagger's input, (3, side, side), normalised as ImageNet's."""
    if view == "whole":  # antialiased, unlike the samples of the enlarged picture
        square = np.asarray(_resize(image, (side, side), Resampling.BILINEAR), np.float32)
    else:
        square = _sample_enlarged(image, side)
    return (torch.from_numpy(square / 255).permute(2, 0, 1) - _IMAGENET_MEAN) / _IMAGENET_STD


def _sample_enlarged(image: Image.Image, side: int) -> np.ndarray:
    """Enlarge a picture and sample it bilinearly: (side, side, 3), float32, 0..255."""
    shorter = min(image.size)
    if shorter < _SMALLEST_SIDE_PX:
        size = (length * _SMALLEST_SIDE_PX // shorter for length in image.size)
        image = _resize(image, tuple(size), Resampling.BICUBIC)
    width, height = (length * _SCALE // _MULTIPLE_PX * _MULTIPLE_PX for length in image.size)
    columns, across = _bilinear_taps(width, side)
    rows, down = _bilinear_taps(height, side)
    # Before the last reduction, if there is one, which reads some rows around each.
    full = image.height * _SCALE
    reach = 0 if height == full else _LANCZOS_REACH_PX
    around = (rows + 0.5) * (full / height) + np.arange(-reach, reach + 1)[:, None]
    read = np.unique(around.astype(np.int64).clip(0, full - 1))
    sampled = np.zeros((full, len(columns), 3), np.uint8)
    sampled[read] = np.concatenate(list(_enlarged_bands(image, width, columns, read)))
    sampled = Image.fromarray(sampled).resize((len(columns), height), Resampling.LANCZOS)
    corners = np.asarray(sampled)[rows].astype(np.float32).reshape(side, 2, side, 2, 3)
    lines = corners[:, 0] + down[:, None, None, None] * (corners[:, 1] - corners[:, 0])
    return lines[:, :, 0] + across[:, None] * (lines[:, :, 1] - lines[:, :, 0])


def _enlarged_bands(
    image: Image.Image, width: int, columns: np.ndarray, rows: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield some pixels of the enlarged picture, a band at a time: it may be 16 times as large."""
    is_reduced = width != image.width * _SCALE
    for top in range(0, image.height, _BAND_PX):
        bottom = min(top + _BAND_PX, image.height)
        first = max(top - _BICUBIC_REACH_PX, 0)
        last = min(bottom + _BICUBIC_REACH_PX, image.height)
        band = image.crop((0, first, image.width, last))
        band = band.resize((image.width * _SCALE, band.height), Resampling.BICUBIC)
        if not is_reduced:
            band = Image.fromarray(np.asarray(band)[:, columns])
        box = (0, top - first, band.width, bottom - first)
        band = band.resize((band.width, (bottom - top) * _SCALE), Resampling.BICUBIC, box)
        start, end = np.searchsorted(rows, (top * _SCALE, bottom * _SCALE))
        pixels = np.asarray(band)[rows[start:end] - top * _SCALE]
        if is_reduced and len(pixels):
            reduced = Image.fromarray(pixels).resize((width, len(pixels)), Resampling.LANCZOS)
            pixels = np.asarray(reduced)[:, columns]
        yield pixels.reshape(-1, len(columns), 3)


def _resize(image: Image.Image, size: tuple[int, int], filter_: Resampling) -> Image.Image:
    """Resize to (width, height), along rows first: newer versions of Pillow choose the order."""
    return image.resize((size[0], image.height), filter_).resize(size, filter_)


def _bilinear_taps(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for `count` samples of a line both neighbours, (2 · count,), and the second's weight.

    In float32 as torch's interpolation, which rounds places far from the start.
    """
    step = np.float32(length) / np.float32(count)
    places = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    places = places.clip(0)
    first = np.floor(places)
    both = np.stack([first, (first + 1).clip(max=length - 1)], axis=1).ravel()
    return both.astype(np.int64), places - first
