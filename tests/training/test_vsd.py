"""Distillation losses against the published figures, and what must get no gradient."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tadsr.networks.adapters import attach_new_adapters
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.vsd import (
    diffusion_loss,
    guidance_scale,
    guided_noise,
    link_timesteps,
    vsd_loss,
)

ALPHAS = make_alphas_cumprod()
VANISHING = 1e-9
"""Gradients below this are rounding: attention over one token has none."""


@pytest.fixture(scope="module")
def fake_score(golden_dir):
    unet = UNet2DConditionModel.from_pretrained(golden_dir / "base" / "unet")
    attach_new_adapters(unet, None)
    parameters = dict(unet.named_parameters())
    lora = load_file(golden_dir / "fake_score_lora.safetensors")
    assert set(lora) == {name for name in parameters if ".lora_" in name}
    with torch.no_grad():
        for name, tensor in lora.items():
            parameters[name].copy_(tensor)
    return unet


def noise_of(unet, prompt_embeds, *, adapters):
    def predict(noisy, timesteps):
        unet.enable_adapters() if adapters else unet.disable_adapters()
        return unet(noisy, timesteps, prompt_embeds).sample

    return predict


def published_vsd(fake_score, golden, latents):
    timesteps = link_timesteps(golden["tavsd.timesteps"])
    teacher = guided_noise(
        noise_of(fake_score, golden["tavsd.prompt_embeds"], adapters=False),
        noise_of(fake_score, golden["tavsd.neg_prompt_embeds"], adapters=False),
        guidance_scale(timesteps),
    )
    fake = noise_of(fake_score, golden["tavsd.prompt_embeds"], adapters=True)
    return vsd_loss(latents, golden["tavsd.noise"], timesteps, ALPHAS, teacher, fake)


def test_tavsd_matches_the_published_loss_and_gradient(fake_score, golden):
    fake_score.requires_grad_(True)  # even if someone forgot to freeze them
    fake_score.zero_grad()
    latents = golden["tavsd.latents"].clone().requires_grad_()
    loss = published_vsd(fake_score, golden, latents).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["tavsd.loss"][0], rtol=1e-4, atol=0)
    largest = golden["tavsd.grad"].abs().max().item()
    torch.testing.assert_close(latents.grad, golden["tavsd.grad"], rtol=1e-4, atol=1e-4 * largest)
    assert all(p.grad is None for p in fake_score.parameters()), "it reaches the student alone"


def test_the_fake_score_loss_matches_the_published_loss_and_gradients(
    fake_score, golden, golden_dir
):
    names = json.loads((golden_dir / "diff_grad_names.json").read_text())
    parameters = dict(fake_score.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(".lora_" in name)
    latents = golden["tavsd.latents"].clone().requires_grad_()
    loss = diffusion_loss(
        noise_of(fake_score, golden["tavsd.prompt_embeds"], adapters=True),
        latents,
        golden["tavsd.noise"],
        golden["diff.timesteps"],
        ALPHAS,
    ).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["diff.loss"][0], rtol=1e-4, atol=0)
    norms = torch.stack([parameters[name].grad.norm() for name in names])
    torch.testing.assert_close(norms, golden["diff.grad_norms"], rtol=1e-4, atol=VANISHING)
    assert (norms > VANISHING).sum() > 0.9 * len(names)
    assert latents.grad is None


def test_a_student_equal_to_the_teacher_is_left_alone():
    latents = torch.randn(2, 4, 8, 8)

    def predict(noisy, timesteps):
        return torch.zeros_like(noisy)

    t = torch.tensor([10, 900])
    loss = vsd_loss(latents, torch.randn_like(latents), t, ALPHAS, predict, predict)
    torch.testing.assert_close(loss, torch.zeros(2))


def test_items_do_not_influence_each_other(fake_score, golden):
    both = published_vsd(fake_score, golden, golden["tavsd.latents"])
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in golden.items() if k.startswith("tavsd.") and len(v) > 1}
        alone = published_vsd(fake_score, one, one["tavsd.latents"])
        torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-6)


@given(st.integers(0, 999), st.sampled_from([0.25, 0.5, 0.75, 1.0, 2.0]), st.integers(-50, 100))
def test_linked_timesteps_stay_in_the_schedule(timestep, factor, offset):
    linked = link_timesteps(torch.tensor([timestep]), factor, offset).item()
    assert linked == min(999, max(0, int((factor * timestep + offset) // 1)))


def test_guidance_of_one_is_the_prompt_and_of_zero_the_negative_prompt():
    predict = guided_noise(
        lambda x, t: x + 1, lambda x, t: x - 1, guidance=torch.tensor([1.0, 0.0, 3.0])
    )
    x = torch.zeros(3, 1, 2, 2)
    assert predict(x, torch.zeros(3))[:, 0, 0, 0].tolist() == [1, -1, 5]
    assert guidance_scale(torch.tensor([0, 200])).tolist() == [7.5, 8.5]
    assert guidance_scale(torch.tensor([0, 200]), 5.0, 0.0).tolist() == [5, 5]
