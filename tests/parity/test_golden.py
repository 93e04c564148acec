"""The published implementation's own figures, on a small model in the published layout."""

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.schedule import residual_to_x0

ATOL = 2e-4
CASES = range(5)


@pytest.fixture(params=["merged", "unmerged"])
def pipeline(request, golden_pipeline, unmerged_pipeline):
    return golden_pipeline if request.param == "merged" else unmerged_pipeline


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("posterior", ["mode", "sample"])
@torch.no_grad()
def test_every_stage_matches_the_published_figures(case, posterior, pipeline, golden, golden_cases):
    _, _, timestep, prompt = golden_cases[case]
    lq = golden[f"{case}.lq"]
    timesteps = torch.tensor([timestep])

    prompt_embeds = pipeline.encode_prompt([prompt])
    torch.testing.assert_close(prompt_embeds, golden[f"{case}.prompt_embeds"], atol=ATOL, rtol=0)

    distribution = pipeline.vae.encode(lq, timesteps).latent_dist
    z = distribution.mode()
    if posterior == "sample":
        torch.testing.assert_close(
            distribution.std, golden[f"{case}.latent_std"], atol=ATOL, rtol=0
        )
        z = z + distribution.std * golden[f"{case}.noise"]
    latents = z * pipeline.vae.config.scaling_factor
    expect = {k: golden[f"{case}.{posterior}.{k}"] for k in ("latent", "unet", "x0", "image")}
    torch.testing.assert_close(latents, expect["latent"], atol=ATOL, rtol=0)

    residual = pipeline.unet(latents, timesteps, prompt_embeds).sample
    torch.testing.assert_close(residual, expect["unet"], atol=ATOL, rtol=0)

    pred_x0 = residual_to_x0(latents, residual, timesteps, pipeline.alphas_cumprod)
    torch.testing.assert_close(pred_x0, expect["x0"], atol=ATOL, rtol=0)
    torch.testing.assert_close(
        pipeline.predict_x0(latents, timesteps, prompt_embeds), expect["x0"], atol=ATOL, rtol=0
    )

    image = pipeline.decode_latents(pred_x0)
    torch.testing.assert_close(image, expect["image"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_restore_and_call_give_the_published_image(case, golden_pipeline, golden, golden_cases):
    _, _, timestep, prompt = golden_cases[case]
    lq = golden[f"{case}.lq"]
    expect = golden[f"{case}.mode.image"]
    restored = golden_pipeline.restore(
        lq, torch.tensor([timestep]), golden_pipeline.encode_prompt([prompt])
    )
    torch.testing.assert_close(restored, expect, atol=ATOL, rtol=0)

    called = golden_pipeline(
        lq / 2 + 0.5, timestep, scale=1, prompt=prompt, color_fix="none", process_size=0
    )
    torch.testing.assert_close(called * 2 - 1, expect, atol=2 * ATOL, rtol=0)


def test_a_pil_image_takes_the_same_path(golden_pipeline, golden):
    lq = golden["0.lq"][0]
    pixels = ((lq / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    prompt = "the cat in a garden"
    restored = golden_pipeline.restore(
        exact, torch.tensor([500]), golden_pipeline.encode_prompt([prompt])
    )
    expect = (restored[0].permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255).numpy()
    got = golden_pipeline(
        Image.fromarray(pixels), 500, scale=1, prompt=prompt, color_fix="none", process_size=0
    )
    assert np.abs(np.asarray(got, dtype=float) - expect).max() <= 0.51  # rounding to 8 bits
