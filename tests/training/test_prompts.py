"""Prompts embedded once, and the public names of training."""

import copy
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tadsr.training
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.training import prompts
from tadsr.training.prompts import PromptEncoder

TEXTS = ["the cat", "a garden", "the cat"]


def checkpoint_of(text_encoder, tokenizer):
    fields = dict.fromkeys(("vae", "unet", "scheduler"))
    return Checkpoint(**fields, text_encoder=text_encoder, tokenizer=tokenizer)


@pytest.fixture
def checkpoint(golden_pipeline):
    return checkpoint_of(copy.deepcopy(golden_pipeline.text_encoder), golden_pipeline.tokenizer)


def started(checkpoint, cache=None, texts=TEXTS):
    encoder = PromptEncoder(checkpoint, cache)
    encoder.check(texts)
    encoder.start(torch.device("cpu"))
    return encoder


def test_prompts_are_embedded_once_and_kept_in_one_file(checkpoint, tmp_path, golden_pipeline):
    expect = golden_pipeline.encode_prompt(TEXTS)
    for cache in (None, tmp_path):
        found = started(checkpoint, cache)(TEXTS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expect, atol=2e-3, rtol=1e-3)  # stored as float16
    (path,) = tmp_path.iterdir()

    # A second run reads them: with broken weights it could not compute the same.
    again = PromptEncoder(checkpoint, tmp_path)
    with torch.no_grad():
        for parameter in checkpoint.text_encoder.parameters():
            parameter.zero_()
    again.check(TEXTS)
    again.start(torch.device("cpu"))
    assert torch.equal(again(TEXTS), found)
    # Another text encoder does not take them for its own.
    assert not torch.allclose(started(checkpoint, tmp_path)(TEXTS), expect)
    # Other prompts of the same text encoder replace them, and a damaged file is written anew.
    for texts in (TEXTS, [*TEXTS, "a tree"]):
        encoder = started(checkpoint, tmp_path, texts)
        assert path.is_file()
        assert len(list(tmp_path.iterdir())) == 2
        (other,) = set(tmp_path.iterdir()) - {path}
        del encoder
        other.write_bytes(b"broken")
        assert torch.isfinite(started(checkpoint, tmp_path, texts)(texts)).all()


def test_prompts_of_a_stream_are_embedded_as_they_come(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_UNFORESEEN", 8)
    encoder = started(checkpoint, tmp_path)
    foreseen = encoder(TEXTS)
    for number in range(11):
        encoder([f"{number} trees"])
    assert len(encoder.unforeseen) == 8
    late = PromptEncoder(checkpoint)(TEXTS)
    torch.testing.assert_close(late, foreseen, atol=2e-3, rtol=1e-3)


def test_embeddings_that_float16_cannot_hold_are_refused(checkpoint):
    with torch.no_grad():
        checkpoint.text_encoder.state_dict()["final_layer_norm.weight"].fill_(1e6)
    with pytest.raises(ValueError, match=r"must be finite in float16.*'the cat'"):
        started(checkpoint)


class StubEncoder(torch.nn.Module):
    """A text encoder of numbers that says where it is and how much it has computed."""

    config = SimpleNamespace(hidden_size=4, to_json_string=lambda: "stub")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.num_texts = 0

    def to(self, device):
        self.places.append(str(device))
        return self

    def forward(self, ids):
        assert self.places[-1] == "meta", "it computes on the device"
        self.num_texts += len(ids)
        return (embeds_of(ids),)


def embeds_of(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, :, None].expand(-1, 2, 4) / 8


def ids_of(texts) -> torch.Tensor:
    return torch.tensor([divmod(int(text), 1000) for text in texts])


def tokenize(texts, **_):
    ids = ids_of(texts)
    ids.to = lambda device: ids  # the stub's device has no memory
    return SimpleNamespace(input_ids=ids)


tokenize.model_max_length = 2


def embed_in_process(rank: int, num_processes: int, cache: Path, results) -> None:
    """One of the processes of a run with 20,000 captions, twice."""
    torch.set_num_threads(1)
    store = f"file://{cache}.store"
    dist.init_process_group("gloo", store, rank=rank, world_size=num_processes)
    counts = []
    for _ in range(2):
        stub = StubEncoder()
        encoder = PromptEncoder(checkpoint_of(stub, tokenize), cache)
        encoder.check([str(number) for number in range(20_000)])
        encoder.start(torch.device("meta"))
        assert stub.places[-1] == "cpu", "it leaves the device again"
        encoder.device = torch.device("cpu")
        for first in range(0, 20_000, 500):
            texts = [str(number) for number in range(first, first + 3)]
            found = encoder(texts)
            assert torch.equal(found, embeds_of(ids_of(texts)))
            assert found.untyped_storage().nbytes() == 3 * 2 * 4 * 4, "a batch's alone are moved"
        assert isinstance(encoder.table, np.memmap)
        assert encoder.unforeseen == {}
        counts.append(stub.num_texts)
    dist.destroy_process_group()
    results.put(counts)


def test_20000_captions_are_shared_by_two_processes_in_one_file(tmp_path):
    cache = tmp_path / "prompts"
    context = multiprocessing.get_context("fork")  # what is imported need not be again
    results = context.Queue()
    processes = [
        context.Process(target=embed_in_process, args=(rank, 2, cache, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    counts = [results.get(timeout=1) for _ in processes]
    assert sum(first for first, _ in counts) == 20_000
    assert all(9_900 < first < 10_100 and second == 0 for first, second in counts)
    (path,) = cache.iterdir()
    assert path.stat().st_size < 20_000 * (2 * 4 * 2 + 2) + 1000


def test_the_public_names_of_training():
    assert set(tadsr.training.__all__) == {
        "AutoencoderConfig", "DataConfig", "DistillationConfig", "OptimizerConfig",
        "RestoredConfig", "TeacherConfig", "TimestepRamp", "Trainer", "TrainingConfig",
        "ValidationConfig", "load_recipe",
    }  # fmt: skip
    for name in tadsr.training.__all__:
        assert getattr(tadsr.training, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tadsr.training.Nothing
