import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tadsr.networks.adapter_targets import AdapterSet, adapter_shapes, target_modules
from tadsr.networks.adapters import (
    adapter_parameters,
    attach_adapters,
    attach_new_adapters,
    detach_adapters,
    extract_adapters,
    fuse_adapters,
    has_adapters,
    merge_adapters,
    plain_state_dict,
)
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LAYOUT = json.loads((GOLDEN.parent / "official_layout.json").read_text())
ATOL = {torch.float32: 1e-5, torch.float16: 2e-2}


def read_config(name):
    return json.loads((GOLDEN / "base" / name / "config.json").read_text())


@pytest.fixture(scope="module")
def pickle():
    return torch.load(GOLDEN / "tadsr.pkl", weights_only=True)


@pytest.fixture(scope="module")
def adapters(pickle):
    return AdapterSet(
        pickle["state_dict_unet"], pickle["state_dict_vae"], pickle["state_dict_vae_time"]
    )


@pytest.fixture(scope="module")
def untouched():
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(read_config("unet")).eval()
    vae = TimeAwareAutoencoderKL.from_config(read_config("time_vae")).eval()
    return unet, vae


@pytest.fixture
def models(untouched):
    return copy.deepcopy(untouched)


@pytest.fixture(scope="module")
def attached(untouched, adapters):
    """The models with their adapters apart, which tests only read."""
    unet, vae = copy.deepcopy(untouched)
    attach_adapters(unet, vae, adapters)
    return unet, vae


@pytest.fixture(scope="module")
def merged(untouched, adapters):
    unet, vae = copy.deepcopy(untouched)
    merge_adapters(unet, vae, adapters)
    return unet, vae


@torch.no_grad()
def run(unet, vae, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    lq = torch.rand(1, 3, 32, 32, generator=generator).to(dtype) * 2 - 1
    latents = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    prompt = torch.randn(1, 7, 16, generator=generator).to(dtype)
    moments = vae.encode(lq, 500).latent_dist.mode()
    return unet(latents, 500, prompt).sample.float(), moments.float()


def test_target_modules_are_the_published_lists(untouched, pickle):
    unet, vae = untouched
    found = target_modules(unet)
    for adapter in ("encoder", "decoder", "others"):
        assert set(found[f"default_{adapter}"]) == set(pickle[f"unet_lora_{adapter}_modules"])
    assert set(target_modules(vae)["default_encoder"]) == set(pickle["vae_lora_encoder_modules"])


def test_adapter_shapes_are_the_published_tensors_at_full_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(LAYOUT["configs"]["unet"])
        vae = TimeAwareAutoencoderKL.from_config(LAYOUT["configs"]["time_vae"])
    published = LAYOUT["tadsr_pkl"]["tensors"]
    shapes = adapter_shapes(unet, vae)
    for part in ("unet", "vae", "vae_time"):
        assert {n: list(s) for n, s in shapes[part].items()} == published[f"state_dict_{part}"]
    assert (len(shapes["unet"]), len(shapes["vae"])) == (518, 64)


def test_module_lists_of_a_set_follow_its_tensors(adapters, untouched):
    unet, vae = untouched
    for found, model in ((adapters.unet_modules, unet), (adapters.vae_modules, vae)):
        expected = target_modules(model)
        assert {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in expected.items()}


def test_merged_equals_unmerged(untouched, merged, attached):
    for base, one, other in zip(run(*untouched), run(*merged), run(*attached), strict=True):
        torch.testing.assert_close(one, other, atol=ATOL[torch.float32], rtol=0)
        assert (one - base).abs().max() > 1e-3


def test_every_adapter_is_active(attached):
    unet, vae = attached
    names, before = list(unet.peft_config), run(unet, vae)[0]
    assert set(names) == {"default_encoder", "default_decoder", "default_others"}
    try:
        for left_out in names:
            unet.set_adapter([name for name in names if name != left_out])
            assert (run(unet, vae)[0] - before).abs().max() > 1e-5, left_out
    finally:
        unet.set_adapter(names)


def test_half_precision_merge_rounds_once(models, adapters):
    unet, vae = (m.half() for m in models)
    name = "mid_block.attentions.0.proj_in"
    base = unet.get_submodule(name).weight.float()
    a, b = (adapters.unet[f"{name}.lora_{s}.default_others.weight"] for s in "AB")
    merge_adapters(unet, vae, adapters)
    assert torch.equal(unet.get_submodule(name).weight, (base + 2 * (b @ a)).half())


def test_half_precision_base_keeps_single_precision_adapters(models, adapters):
    unet, vae = (m.half() for m in models)
    attach_adapters(unet, vae, adapters)
    assert unet.dtype == vae.dtype == torch.float16
    extracted = extract_adapters(unet, vae)
    for name, tensor in adapters.vae.items():
        assert torch.equal(extracted.vae[name], tensor)
    unmerged = run(unet, vae, torch.float16)
    fuse_adapters(unet, vae)
    for x, y in zip(unmerged, run(unet, vae, torch.float16), strict=True):
        torch.testing.assert_close(x, y, atol=ATOL[torch.float16] * x.abs().max().item(), rtol=0)


def test_extract_returns_what_was_attached(attached, adapters):
    extracted = extract_adapters(*attached)
    for part in ("unet", "vae", "vae_time"):
        expected, found = getattr(adapters, part), getattr(extracted, part)
        assert set(found) == set(expected)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert (extracted.rank_unet, extracted.rank_vae, extracted.alpha) == (4, 4, 8)


def test_fuse_equals_merge_and_leaves_no_wrapper(attached, merged):
    unet, vae = copy.deepcopy(attached)
    fuse_adapters(unet, vae)
    for fused, expected in zip((unet, vae), merged, strict=True):
        assert not has_adapters(fused)
        state, reference = fused.state_dict(), expected.state_dict()
        assert list(state) == list(reference)
        assert all(torch.equal(state[n], reference[n]) for n in state)
    attach_new_adapters(unet, vae)  # a fused model is plain again


def test_detached_model_has_its_plain_names(untouched, attached):
    names, unet = list(untouched[0].state_dict()), copy.deepcopy(attached[0])
    assert list(plain_state_dict(unet)) == names
    detach_adapters(unet)
    assert list(unet.state_dict()) == names


def test_new_adapters_change_nothing_yet(models):
    unet, vae = models
    before = run(unet, vae)
    attach_new_adapters(unet, vae, rank=2, alpha=4)
    for x, y in zip(before, run(unet, vae), strict=True):
        assert torch.equal(x, y)
    adapters = extract_adapters(unet, vae)
    assert (adapters.rank_unet, adapters.alpha) == (2, 4)
    a = torch.cat([t.flatten() for n, t in adapters.unet.items() if ".lora_A." in n])
    assert a.std().item() == pytest.approx(1 / 2, rel=0.05)


def test_unet_alone_takes_new_adapters(models):
    attach_new_adapters(models[0], None)
    assert has_adapters(models[0])
    assert not has_adapters(models[1])


def test_adapter_parameters_are_the_stored_tensors(attached, adapters):
    unet, vae = attached
    assert set(adapter_parameters(unet)) == set(adapters.unet)
    assert set(adapter_parameters(vae)) == {*adapters.vae, *adapters.vae_time}


def test_misfitting_adapters_are_refused_before_anything_changes(models, adapters):
    broken = dict(adapters.unet)
    name = "mid_block.resnets.0.conv1.lora_A.default_others.weight"
    del broken[name]
    broken["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing.*mid_block.*1 extra.*surprise"):
        attach_adapters(*models, AdapterSet(broken, adapters.vae, adapters.vae_time))
    with pytest.raises(ValueError, match="misshapen"):
        merge_adapters(*models, AdapterSet(adapters.unet, adapters.vae, adapters.vae_time, 8))
    assert not has_adapters(models[0])


def test_adapters_attach_once(attached, adapters):
    for change in (
        lambda: attach_adapters(*attached, adapters),
        lambda: merge_adapters(*attached, adapters),
        lambda: attach_new_adapters(*attached),
    ):
        with pytest.raises(ValueError, match="must have no adapters yet"):
            change()


def test_merged_models_cannot_be_extracted(untouched):
    with pytest.raises(ValueError, match="merge_adapters=False"):
        extract_adapters(*untouched)


def test_other_classes_are_refused():
    with pytest.raises(TypeError, match="Linear"):
        target_modules(torch.nn.Linear(1, 1))
