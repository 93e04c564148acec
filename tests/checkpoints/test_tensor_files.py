import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tadsr.checkpoints.tensor_files import TensorReader, load_strict, read_pickle
from tadsr.errors import CheckpointError


class RunsCode:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, capsys, is_zip):
    path = tmp_path / "model.bin"
    if is_zip:
        torch.save({"x": RunsCode()}, path)
    else:
        path.write_bytes(pickle.dumps({"x": RunsCode()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"model\.bin was refused for safety"):
        read_pickle(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["new.bin", "old.bin", "model.safetensors"])
def test_torch_files_of_any_age_are_read_and_truncated_ones_are_damaged(tmp_path, name):
    path = tmp_path / name
    tensors = {"x": torch.rand(100)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "new.bin")
    assert torch.equal(dict(TensorReader([path]).items())["x"], tensors["x"])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=rf"{name} .*is damaged"):
        TensorReader([path])
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} must exist, but is missing"):
        TensorReader([path])


def test_shards_must_not_repeat_a_tensor(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="different tensors"):
        TensorReader(paths)


def build():
    with torch.device("meta"):
        return nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])


def test_strict_loading_counts_every_kind_in_one_error(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.zeros(2, 3), "extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_strict(build(), TensorReader([path]), dtype=None)
    message = str(caught.value)
    assert str(path) in message
    assert "7 missing (0.bias, 1.weight, 1.bias, 2.weight, 2.bias, …)" in message
    assert "1 extra (extra)" in message
    assert "1 misshapen (0.weight (2, 3) instead of (2, 2))" in message
    assert "tried it as Sequential" in message


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_loading_keeps_values_and_casts(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    state = {n: torch.randn(t.shape) for n, t in build().state_dict().items()}
    save_file(state, path)
    model = load_strict(build(), TensorReader([path]), dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(dtype or torch.float32))
    assert not model.training
    if Path("/proc/self/maps").exists():
        # Pages of the file, which all processes of a machine share; a cast has its own.
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        spans = [line[0].split("-") for line in maps if line[-1] == str(path)]
        address = model[0].weight.data_ptr()
        is_mapped = any(int(a, 16) <= address < int(b, 16) for a, b in spans)
        assert is_mapped == (dtype != torch.float16)
