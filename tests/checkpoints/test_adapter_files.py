import pytest
import torch

from tadsr.checkpoints import load_adapters, save_adapters
from tadsr.checkpoints.adapter_files import NATIVE_FORMAT
from tadsr.errors import CheckpointError
from tadsr.networks.adapter_targets import AdapterSet

from .conftest import same_tensors


@pytest.mark.parametrize("name", ["adapters.safetensors", "tadsr.pkl"])
def test_adapters_round_trip(adapter_file, tmp_path, name):
    original = load_adapters(adapter_file)
    save_adapters(original, tmp_path / name)
    copy = load_adapters(tmp_path / name)
    for part in ("unet", "vae", "vae_time"):
        assert same_tensors(getattr(original, part), getattr(copy, part))
    assert (copy.rank_unet, copy.rank_vae, copy.alpha) == (4, 4, 8)


def test_safetensors_keep_another_alpha_but_the_pickle_cannot(tmp_path):
    adapters = AdapterSet({"a": torch.zeros(1)}, {}, {}, rank_unet=2, rank_vae=3, alpha=1.5)
    save_adapters(adapters, tmp_path / "a.safetensors")
    copy = load_adapters(tmp_path / "a.safetensors")
    assert (copy.rank_unet, copy.rank_vae, copy.alpha) == (2, 3, 1.5)
    with pytest.raises(CheckpointError, match="implies alpha 8"):
        save_adapters(adapters, tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rank_unet"), r"1 are missing \['rank_unet'\]"),
        (lambda d: d.update(more=1), r"1 are extra \['more'\]"),
        (lambda d: d.update(rank_vae="4"), "rank_vae as an integer"),
        (lambda d: d.update(state_dict_vae=[1]), "under 'state_dict_vae'"),
        (lambda d: d["state_dict_unet"].pop("conv_in.lora_A.default_encoder.weight"), "conv_in"),
        (lambda d: d["unet_lora_others_modules"].append("phantom"), "phantom"),
    ],
)
def test_wrong_keys_in_the_pickle_are_named(adapter_file, tmp_path, change, message):
    data = torch.load(adapter_file, weights_only=True)
    change(data)
    path = tmp_path / "tadsr.pkl"
    torch.save(data, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapters(path)
    assert str(path) in str(caught.value)


def test_other_safetensors_are_no_adapters(base_dir):
    path = base_dir / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=NATIVE_FORMAT):
        load_adapters(path)
