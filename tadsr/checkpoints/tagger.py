"""Load the published tagger: RAM's weights with the DAPE adapter merged, and its tag list."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from tadsr.checkpoints.detect import locate
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.tensors import TensorMeta, check_names, load_strict, read_pickle
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import merged_weight
from tadsr.prompts.tagger import Tagger, TaggerConfig, TaggerNetwork

TAGGER_FILE = "ram_swin_large_14m.pth"
TAGGER_ADAPTER_FILE = "DAPE.pth"
TAG_LIST_FILE = "ram_tag_list.txt"
THRESHOLDS_FILE = "ram_tag_list_threshold.txt"
PUBLISHED_TAGGER = "dape"
"""The name of the tagger whose files lie beside a published checkpoint's."""

_FILES = (TAGGER_FILE, TAGGER_ADAPTER_FILE, TAG_LIST_FILE, THRESHOLDS_FILE)

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
_LORA = re.compile(
    r"(?P<module>.+)\.(lora_(?P<side>[AB])|lora_(?P<way>down|up))(\.(?!bias)\w+)?(\.weight)?"
)
_WRAPPERS = re.compile(r"^(module\.|base_model\.model\.|model\.)+")


def open_tagger(
    tagger: str | Path | Callable[[Any], str] | None,
    checkpoint: str | Path,
    **hub: Any,
) -> Callable[[Any], str] | None:
    """Turn what a user names as tagger into one.

    Args:
        tagger: A callable from a PIL image to a text, taken as it is; "dape" for the published
            tagger beside the checkpoint's files; a folder or hub id that holds it; None for none.
        checkpoint: The checkpoint's folder or hub id.
        hub: As in `load_tagger`.

    Returns:
        The tagger, or None.

    Raises:
        CheckpointError: The files are missing, damaged, unsafe or do not fit.
        TypeError: `tagger` is none of these.
    """
    if tagger is None or callable(tagger):
        return tagger
    if not isinstance(tagger, str | Path):
        raise TypeError(
            "tagger must be 'dape', a folder, a hub id, or a callable from an image to a text, "
            f"got {type(tagger).__name__}"
        )
    return load_tagger(checkpoint if tagger == PUBLISHED_TAGGER else tagger, **hub)


def load_tagger(
    source: str | Path,
    *,
    adapter: str | Path | None = TAGGER_ADAPTER_FILE,
    adapter_scale: float = 1.0,
    config: TaggerConfig | None = None,
    torch_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Tagger:
    """Load RAM with the DAPE adapter from their published files.

    The folder must hold ram_swin_large_14m.pth, DAPE.pth, ram_tag_list.txt and
    ram_tag_list_threshold.txt. The files are read as data only; of RAM only what tagging needs.

    Args:
        source: A folder or a hub id.
        adapter: The adapter, a path or a name within the folder; None for RAM as it is.
        adapter_scale: Factor of the adapter's matrix products.
        config: Sizes of the network; None for the published ones.
        torch_dtype: Floating dtype of the weights.
        revision: Branch, tag or commit on the hub.
        cache_dir: The hub's cache; None for its usual place.
        local_files_only: Use only what the hub's cache has.
        token: The hub's access token.

    Returns:
        The tagger, on the CPU, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe or does not fit.
    """
    config = config or TaggerConfig()
    location = locate(source)
    folder = location.folder
    if folder is None:
        folder = download(
            location.source,
            names=[n for n in _FILES if n != TAGGER_ADAPTER_FILE or adapter is not None],
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    path = folder / TAGGER_FILE
    adapter_path = None if adapter is None else _find_adapter(folder, adapter)
    needed = (path, folder / TAG_LIST_FILE, folder / THRESHOLDS_FILE, adapter_path)
    missing = [str(p) for p in needed if p is not None and not p.is_file()]
    if missing:
        raise CheckpointError(
            f"the tagger needs {', '.join(missing)}, but {len(missing)} of its files are missing; "
            "the weights are published with TADSR, and the two lists with the Recognize Anything "
            "Model, in ram/data: copy all into one folder"
        )
    tags = _read_lines(folder / TAG_LIST_FILE, config.num_tags)
    thresholds = _read_thresholds(folder / THRESHOLDS_FILE, config.num_tags)
    with init_empty_weights(include_buffers=False):
        network = TaggerNetwork(config)
    published = _Published(path, network)
    if adapter_path is not None:
        published.merge(adapter_path, adapter_scale)
    load_strict(network, published, dtype=torch_dtype, change=_to_float)
    return Tagger(network, tags, thresholds).eval()


class _Published:
    """Present a published file's tensors under the network's names, as `load_strict` reads them."""

    def __init__(self, path: Path, network: TaggerNetwork) -> None:
        self.description = str(path)
        state = _tensors_of(path)
        # An older name of the same part.
        self._state = {n.replace("vision_multi", "tagging_head", 1): t for n, t in state.items()}
        self._sources = {name: _published_name(name) for name in network.state_dict()}
        expected: dict[str, torch.Size] = {}
        for name, tensor in network.state_dict().items():
            source, third = self._sources[name]
            rows = tensor.shape[0] * (1 if third is None else 3) if tensor.ndim else 0
            expected[source] = torch.Size((rows, *tensor.shape[1:]))
        self._expected = expected
        found = {n: t.shape for n, t in self._state.items() if n in expected or _is_used(n)}
        check_names(found, expected, self.description, tried="RAM with Swin-L")
        self.meta: dict[str, TensorMeta] = {n: (t.shape, t.dtype) for n, t in self.items()}

    def items(self, *, copy: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, (source, third) in self._sources.items():
            tensor = self._state[source]
            yield name, tensor if third is None else tensor.chunk(3)[third]

    def merge(self, path: Path, scale: float) -> None:
        """Add an adapter's products to the weights, and take over what it holds besides."""
        pairs: dict[str, dict[str, Tensor]] = {}
        unknown, num_used = [], 0
        for name, tensor in _tensors_of(path).items():
            lora = _LORA.fullmatch(name)
            if lora:
                side = lora["side"] or {"down": "A", "up": "B"}[lora["way"]]
                pairs.setdefault(lora["module"], {})[side] = tensor
            elif name in self._expected and tensor.shape == self._expected[name]:
                self._state[name] = tensor
                num_used += 1
            elif name in self._expected or _is_used(name):
                unknown.append(f"{name} {tuple(tensor.shape)}")
        for module, pair in pairs.items():
            target = f"{module}.weight"
            if target in self._expected and _fits(pair, self._expected[target]):
                self._state[target] = merged_weight(
                    self._state[target], pair["A"], pair["B"], scale
                )
                num_used += 1
            elif _is_used(target):
                shapes = {side: tuple(tensor.shape) for side, tensor in pair.items()}
                unknown.append(f"{module} with matrices {shapes}")
        if unknown or not num_used:
            raise CheckpointError(
                f"{path} must hold matrices lora_A (r, in) and lora_B (out, r) for RAM's modules, "
                f"but {num_used} fit and {len(unknown)} do not ({', '.join(unknown[:5])}); its "
                "layout is not known to this version: load_tagger(..., adapter=None) reads RAM "
                "without it"
            )


def _published_name(name: str) -> tuple[str, int | None]:
    """Return a tensor's published name, and which third of its rows it is, if only a part."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    part = _QKV.fullmatch(name)
    if part is None:
        return name, None
    third = "qkv".index(part["new"] or part["old"])
    return f"{part['block']}.attn.qkv.{part['leaf']}", third


def _is_used(name: str) -> bool:
    return _USED.fullmatch(name) is not None and _COMPUTED.fullmatch(name) is None


def _fits(pair: Mapping[str, Tensor], shape: torch.Size) -> bool:
    if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2:
        return False
    (rank, num_in), (num_out, other_rank) = pair["A"].shape, pair["B"].shape
    return rank == other_rank and (num_out, num_in) == tuple(shape)


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """Read a training checkpoint's tensors by name, whatever lies around them."""
    data = read_pickle(path)
    for key in ("model", "state_dict", "params"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(data).__name__}")
    tensors = {n: t for n, t in data.items() if isinstance(n, str) and isinstance(t, Tensor)}
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _to_float(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor: that it passes here makes the loader copy it out of the large file."""
    return tensor


def _find_adapter(folder: Path, adapter: str | Path) -> Path:
    named = Path(adapter).expanduser()
    return named if named.is_file() else folder / named


def _read_lines(path: Path, count: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) != count:
        raise CheckpointError(
            f"{path} must have {count} lines, one per tag of the network, got {len(lines)}"
        )
    return lines


def _read_thresholds(path: Path, count: int) -> list[float]:
    lines = _read_lines(path, count)
    try:
        return [float(line) for line in lines]
    except ValueError as error:
        raise CheckpointError(f"{path} must hold one number a line: {error}") from error
