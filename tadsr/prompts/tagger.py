"""The published tagger: RAM's Swin-L with a decoder over its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertConfig, SwinConfig, SwinModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

from tadsr.images import decode_image

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


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

    Args:
        config: Its sizes.

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
            pixels: Images, (B, 3, S, S), normalised as `prepare` does.

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

    def prepare(self, rgb: Tensor) -> Tensor:
        """Resize images (B, 3, h, w) in [0, 1] to the network's square, and normalise them."""
        # Bilinear as in RAM's own transform, and not this library's bicubic.
        size = (self.config.image_size,) * 2
        square = F.interpolate(rgb.float(), size, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(v, device=rgb.device)[:, None, None]
            for v in (_IMAGENET_MEAN, _IMAGENET_STD)
        )
        return (square - mean) / std


class Tagger(nn.Module):
    """Describe an image by its tags, as a prompt: "tree, lake, mountain".

    A tagger is any callable from a PIL image to a text; this is the published one. It computes
    where its weights are: `tagger.to("cuda")` moves it.

    Args:
        network: Scores the tags.
        tags: Their names, in the order of the network's scores.
        thresholds: The probability above which a tag is named: one for all or one per tag, 0..1.

    Raises:
        ValueError: The numbers of names, thresholds and scores differ, or a threshold is out of
            range.
    """

    def __init__(
        self, network: TaggerNetwork, tags: Sequence[str], thresholds: float | Sequence[float]
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
        self.network = network
        self.tags = tuple(tags)
        self.register_buffer("thresholds", torch.tensor(thresholds), persistent=False)

    @torch.no_grad()
    def forward(self, image: Image.Image) -> str:
        """Return the tags of an image.

        Args:
            image: PIL image of any mode, or an array or tensor that the pipeline takes.

        Returns:
            The names of the tags above their thresholds, in the list's order, joined by ", ";
            empty where there is none.
        """
        weight = self.network.fc.weight
        rgb = decode_image(image).rgb[None].to(weight.device)
        logits = self.network(self.network.prepare(rgb).to(weight.dtype))[0]
        is_named = torch.sigmoid(logits.float()) > self.thresholds
        return ", ".join(self.tags[i] for i in is_named.nonzero()[:, 0].tolist())
