"""Prompts as the networks read them, computed once, by all processes together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from tadsr.caches import RecentlyUsed
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.prompts.choice import embed_texts
from tadsr.whole_file import whole_file

MAX_UNFORESEEN = 256
"""Embeddings kept of prompts that were not known beforehand; Stable Diffusion's take 0.16 MB."""
_BATCH_PROMPTS = 64
_ZEROS = bytes(2**24)


class PromptEncoder:
    """Turn prompts into embeddings by a frozen text encoder, or by embeddings of known prompts.

    Prompts known beforehand are embedded before the first step, a share by each process, into one
    file of float16 that all of them map; a batch's embeddings alone come to the device.

    Args:
        cache: Folder of the file, which later runs go on with; None keeps embeddings in memory.
            The processes of a run share it.
    """

    def __init__(
        self, checkpoint: Checkpoint, cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.text_encoder = checkpoint.text_encoder
        self.tokenizer = checkpoint.tokenizer
        self.prompt_embeddings = checkpoint.prompt_embeddings
        self.device = device
        self.cache = cache
        self.known: dict[str, int] = {}
        self.table: np.ndarray | None = None
        self.unforeseen: dict[str, Tensor] = RecentlyUsed(MAX_UNFORESEEN)
        # Another text encoder's cache in the same folder must not be mistaken for this one's.
        self.identity = "" if self.text_encoder is None else _identify(self.text_encoder)

    def check(self, prompts: Sequence[str]) -> None:
        """Register prompts that will come; raise ValueError unless each can be embedded."""
        self.foresee(prompts)
        if self.text_encoder is None:
            self.prompt_embeddings(list(prompts))

    def foresee(self, prompts: Sequence[str]) -> None:
        """Register prompts that may come."""
        texts = dict.fromkeys([*self.known, *prompts])
        self.known = {text: row for row, text in enumerate(texts)}

    def start(self, device: torch.device) -> None:
        """Embed the prompts that will come, and let the text encoder leave the device again.

        Raises:
            OSError: The file cannot be written.
        """
        self.device = device
        if self.text_encoder is None or self.table is not None:
            return
        rank, num_processes = _place()
        path = self._open_table(rank)
        texts = list(self.known)
        # The same prompts go together whoever computes them and when: rounding depends on it.
        batches = [slice(i, i + _BATCH_PROMPTS) for i in range(0, len(texts), _BATCH_PROMPTS)]
        missing = [b for b in batches[rank::num_processes] if not self.table["is_done"][b].all()]
        for batch in tqdm(missing, "prompts", unit="batch", disable=True if rank else None):
            self.table["embeds"][batch] = self._compute(texts[batch]).numpy()
            self.table["is_done"][batch] = 1
        self.text_encoder.to("cpu")
        if path is not None:
            self.table.flush()
            _wait_for_everyone()
            self.table = np.load(path, mmap_mode="r")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of B prompts, (B, L, D), float32; ValueError for an unknown one."""
        if self.text_encoder is None:
            return self.prompt_embeddings(list(prompts)).detach().float().to(self.device)
        embeds = torch.stack([self._find(prompt) for prompt in prompts])
        return embeds.to(self.device).float()

    def _find(self, prompt: str) -> Tensor:
        """Return a prompt's embeddings, computed now if it is a stream's, known by nobody before.

        One at a time, so that rounding does not depend on which others are kept.
        """
        if self.table is not None and prompt in self.known:
            return torch.from_numpy(self.table["embeds"][self.known[prompt]].copy())
        if prompt not in self.unforeseen:
            self.unforeseen[prompt] = self._compute([prompt])[0]
        return self.unforeseen[prompt]

    @torch.no_grad()
    def _compute(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings (B, L, D) in float16, on the CPU."""
        self.text_encoder.to(self.device)
        embeds = embed_texts(self.text_encoder, self.tokenizer, self.device, prompts)
        embeds = embeds.to("cpu", torch.float16)
        if not torch.isfinite(embeds).all():
            raise ValueError(
                "embeddings of prompts must be finite in float16, but the text encoder's are not, "
                f"for one of {list(prompts)[:3]}; use another text encoder"
            )
        return embeds

    def _open_table(self, rank: int) -> Path | None:
        """Open the table of known prompts' embeddings, made by the first process."""
        shape = (self.tokenizer.model_max_length, self.text_encoder.config.hidden_size)
        row = np.dtype([("embeds", "<f2", shape), ("is_done", "<u2")])
        if self.cache is None:
            self.table = np.zeros(len(self.known), row)
            return None
        content = hashlib.sha256("\0".join(self.known).encode()).hexdigest()
        path = self.cache / f"{self.identity[:16]}-{content[:16]}.npy"
        if rank == 0 and not _is_table(path, row, len(self.known)):
            for old in self.cache.glob(f"{self.identity[:16]}-*.npy"):
                old.unlink()
            _write_table(path, row, len(self.known))
        _wait_for_everyone()
        self.table = np.load(path, mmap_mode="r+")
        return path


def _is_table(path: Path, row: np.dtype, count: int) -> bool:
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return table.dtype == row and table.shape == (count,)


def _write_table(path: Path, row: np.dtype, count: int) -> None:
    """Write a table of zeros: with room for all rows, or a full disk would kill who maps it."""
    header = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, count * row.itemsize, len(_ZEROS)):
            file.write(_ZEROS[: count * row.itemsize - start])


def _place() -> tuple[int, int]:
    """Return this process among all, and their number."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _wait_for_everyone() -> None:
    if dist.is_initialized():
        dist.barrier()


def _identify(text_encoder: nn.Module) -> str:
    """Return a fingerprint of a text encoder's weights, cheap and sensitive to any training."""
    digest = hashlib.sha256(str(text_encoder.config.to_json_string()).encode())
    for name, tensor in text_encoder.state_dict().items():
        if tensor.is_floating_point():
            digest.update(f"{name}{tensor.double().sum().item():.6f}".encode())
    return digest.hexdigest()
