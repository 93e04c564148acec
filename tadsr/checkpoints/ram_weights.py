"""RAM's tensors under the names of this library's tagger, and the DAPE adapter's layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from tadsr.checkpoints.tensor_files import TensorMeta, check_names, read_pickle
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import merged_weight
from tadsr.prompts.tagger import TaggerConfig, TaggerNetwork

_ADAPTER_ALPHA = 1

# From the network's names to the published ones. Transformers 4 calls parts of Swin otherwise than
# 5 does, so where there are two, the first is of 5.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"^image_encoder\.embeddings\.patch_embeddings\.projection",
            "visual_encoder.patch_embed.proj",
        ),
        (r"^image_encoder\.embeddings\.norm", "visual_encoder.patch_embed.norm"),
        (r"^image_encoder\.layernorm", "visual_encoder.norm"),
        (r"^image_encoder\.encoder\.layers", "visual_encoder.layers"),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"(blocks\.\d+)\.attention\.(?:o_proj|output\.dense)\.", r"\1.attn.proj."),
        (
            r"(blocks\.\d+)\.attention\.(?:relative_position_bias|self)\.(relative_position)",
            r"\1.attn.\2",
        ),
        (r"(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^decoder\.(\d+)\.attention\.", r"tagging_head.encoder.layer.\1.crossattention.self."),
        (
            r"^decoder\.(\d+)\.attention_output\.",
            r"tagging_head.encoder.layer.\1.crossattention.output.",
        ),
        (r"^decoder\.(\d+)\.", r"tagging_head.encoder.layer.\1."),
    )
)
# Published, query, key and value of the encoder are rows of one matrix.
_QKV = re.compile(
    r"(?P<block>visual_encoder\.layers\.\d+\.blocks\.\d+)\.attention\."
    r"(?:(?P<new>[qkv])_proj|self\.(?P<old>[qkv])(?:uery|ey|alue))\.(?P<leaf>weight|bias)"
)
# RAM's other parts write captions; buffers are computed.
_USED = re.compile(
    r"(visual_encoder|tagging_head\.encoder|image_proj|wordvec_proj|fc)\..*|label_embed"
)
_COMPUTED = re.compile(r".*\.(attn_mask|relative_position_index)")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])")
# RAM's tag encoder and tagging head share these weights, so the adapters of both count.
_SHARED = re.compile(r"tag_encoder(\.encoder\.layer\.\d+\.crossattention\.self\.(query|key))")
_UNUSED_ADAPTERS = ("tag_encoder.", "text_decoder.")


class RamWeights:
    """Present RAM's tensors under the network's names, as `load_strict` reads them.

    Attributes:
        adapter: Name of the adapter that is merged, or None.
    """

    def __init__(self, path: Path, config: TaggerConfig, state: dict[str, Tensor]) -> None:
        self.description = str(path)
        self.config = config
        self.state = state
        self.adapter: str | None = None
        with init_empty_weights(include_buffers=False):
            self.network = TaggerNetwork(config)
        self._sources = {name: ram_name(name) for name in self.network.state_dict()}
        self.expected: dict[str, torch.Size] = {}
        for name, tensor in self.network.state_dict().items():
            source, third = self._sources[name]
            rows = tensor.shape[0] * (1 if third is None else 3)
            self.expected[source] = torch.Size((rows, *tensor.shape[1:]))
        found = {n: t.shape for n, t in state.items() if n in self.expected or is_used(n)}
        check_names(found, self.expected, self.description, tried="RAM with Swin-L")
        self.meta: dict[str, TensorMeta] = {n: (t.shape, t.dtype) for n, t in self.items()}

    def items(self, *, copy: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the network's names and tensors."""
        for name, (source, third) in self._sources.items():
            tensor = self.state[source]
            yield name, tensor if third is None else tensor.chunk(3)[third]

    def merge(self, path: Path) -> None:
        """Add the products of an adapter's file to the weights."""
        self.merge_tensors(_tensors_of(read_pickle(path), path), path.name)

    def merge_tensors(self, tensors: Mapping[str, Tensor], adapter: str) -> None:
        """Add an adapter's products to the weights; `adapter` is its name."""
        pairs: dict[str, dict[str, Tensor]] = {}
        wrong = []
        for name, tensor in tensors.items():
            found = _LORA.fullmatch(name)
            if found is None:
                wrong.append(f"{name} is no lora_A or lora_B")
            else:
                pairs.setdefault(found["module"], {})[found["side"]] = tensor
        for module, pair in pairs.items():
            # RAM ties them by number, and its tag encoder has more layers than the head.
            shared = _SHARED.sub(r"tagging_head\1", module)
            target = f"{shared}.weight"
            if target in self.expected:
                merged = _merge_pair(self.state[target], pair, is_qkv=module.endswith(".qkv"))
                if merged is None:
                    shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
                    wrong.append(f"{module} with {shapes} does not fit {self.expected[target]}")
                else:
                    self.state[target] = merged
            elif not module.startswith(_UNUSED_ADAPTERS):
                wrong.append(f"{module} is no module of RAM's")
        adapted = re.compile(
            r"visual_encoder\..*\.qkv|tagging_head\..*\.crossattention\.self\.(query|key)"
        )
        modules = (name.removesuffix(".weight") for name in self.expected)
        wrong += [f"{m} is missing" for m in modules if adapted.fullmatch(m) and m not in pairs]
        if wrong:
            raise CheckpointError(
                f"{adapter} must hold lora_A and lora_B of every attention's query and value, and "
                f"of the tagging head's query and key, but {len(wrong)} do not fit: "
                f"{'; '.join(wrong[:5])}; adapter=None reads RAM without it"
            )
        self.adapter = adapter


def _merge_pair(weight: Tensor, pair: Mapping[str, Tensor], *, is_qkv: bool) -> Tensor | None:
    """Add a pair's product to a weight, or return None if it does not fit.

    Of a joint matrix of query, key and value the pair holds query and value, each of its rank.
    """
    if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2:
        return None
    num_parts = 2 if is_qkv else 1
    (rows, num_in), (num_out, rank) = pair["A"].shape, pair["B"].shape
    width = len(weight) // 3 if is_qkv else len(weight)
    if (rows, num_in, num_out) != (num_parts * rank, weight.shape[1], num_parts * width):
        return None
    scale = _ADAPTER_ALPHA / rank
    if not is_qkv:
        return merged_weight(weight, pair["A"], pair["B"], scale)
    query, key, value = weight.chunk(3)
    (query_a, value_a), (query_b, value_b) = pair["A"].chunk(2), pair["B"].chunk(2)
    return torch.cat(
        [
            merged_weight(query, query_a, query_b, scale),
            key.float(),
            merged_weight(value, value_a, value_b, scale),
        ]
    )


def ram_name(name: str) -> tuple[str, int | None]:
    """Return a tensor's name in RAM's files, and which third of its rows it is, if only a part."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    part = _QKV.fullmatch(name)
    if part is None:
        return name, None
    third = "qkv".index(part["new"] or part["old"])
    return f"{part['block']}.attn.qkv.{part['leaf']}", third


def is_used(name: str) -> bool:
    """Tell whether a tensor of RAM's files belongs to its tagging part."""
    return _USED.fullmatch(name) is not None and _COMPUTED.fullmatch(name) is None


def read_ram(path: Path) -> dict[str, Tensor]:
    """Read the model's tensors of a training checkpoint, mapped from it."""
    data = read_pickle(path)
    return _tensors_of(
        data["model"] if isinstance(data, Mapping) and "model" in data else data, path
    )


def _tensors_of(data: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(data).__name__}")
    return {n: t for n, t in data.items() if isinstance(n, str) and isinstance(t, Tensor)}
