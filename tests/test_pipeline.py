import copy
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tadsr import TADSRPipeline, UpscaleSettings
from tadsr.images import resize_bicubic
from tadsr.onestep import OneStepEngine
from tests.small_models import photo, small_pipeline


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


FAST = {"process_size": 0}


def test_each_kind_of_image_comes_back_as_its_kind(pipe):
    array = photo()
    pil = pipe(Image.fromarray(array), **FAST)
    assert isinstance(pil, Image.Image)
    assert (pil.mode, pil.size) == ("RGB", (52, 36))

    eight = pipe(array, **FAST)
    assert (eight.dtype, eight.shape) == (np.uint8, (36, 52, 3))
    np.testing.assert_array_equal(eight, np.asarray(pil))

    sixteen = pipe(photo(dtype=np.uint16), **FAST)
    assert (sixteen.dtype, sixteen.shape) == (np.uint16, (36, 52, 3))
    assert len(np.unique(sixteen)) > 256

    tensor = torch.rand(3, 9, 13)
    assert pipe(tensor, **FAST).shape == (3, 36, 52)
    batch = torch.rand(2, 3, 9, 13)
    together = pipe(batch, [1, 900], **FAST)
    assert together.shape == (2, 3, 36, 52)
    for row, timestep in enumerate((1, 900)):
        alone = pipe(batch[row], timestep, **FAST)
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_a_list_in_is_a_list_out_in_order(pipe):
    images = [Image.fromarray(photo(5, 8)), photo(6, 7), torch.rand(3, 4, 4)]
    results = pipe(images, [1, 500, 999], **FAST)
    assert isinstance(results, list)
    assert results[0].size == (32, 20)
    assert results[1].shape == (24, 28, 3)
    assert results[2].shape == (3, 16, 16)
    np.testing.assert_array_equal(np.asarray(results[1]), pipe(images[1], 500, **FAST))


def test_a_batch_goes_through_as_a_list_does(pipe, monkeypatch):
    batches = []
    restore = OneStepEngine.restore

    def counted(engine, lq, *arguments, **options):
        batches.append(len(lq))
        return restore(engine, lq, *arguments, **options)

    monkeypatch.setattr(OneStepEngine, "restore", counted)
    batch, timesteps = torch.rand(5, 3, 8, 9), [5, 5, 900, 30, 5]
    together = pipe(batch, timesteps, **FAST)
    assert batches == [1] * 5  # a CPU gains nothing by more
    torch.testing.assert_close(together, torch.stack(pipe(list(batch), timesteps, **FAST)))
    monkeypatch.setattr("tadsr.restorer.batch_pixels", lambda *_: 2 * 32 * 36)
    batches.clear()
    torch.testing.assert_close(pipe(batch, timesteps, **FAST), together)
    assert sorted(batches) == [1, 2, 2]
    # Neighbours of another size go by themselves.
    mixed = [*batch[:4], torch.rand(3, 8, 8)]
    batches.clear()
    for found, image, timestep in zip(
        pipe(mixed, timesteps, **FAST), mixed, timesteps, strict=True
    ):
        torch.testing.assert_close(found, pipe(image, timestep, **FAST), atol=1e-4, rtol=0)
    assert batches[:3] == [2, 2, 1]


@pytest.mark.parametrize("as_batch", [True, False])
def test_each_image_has_its_generator(as_batch, pipe):
    images = torch.rand(2, 3, 8, 8)
    seeded = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    results = pipe(images if as_batch else list(images), generator=seeded, **FAST)
    for image, result, seed in zip(images, results, (3, 4), strict=True):
        alone = pipe(image, generator=torch.Generator().manual_seed(seed), **FAST)
        assert torch.equal(result, alone)


@pytest.mark.parametrize(
    ("generator", "error", "message"),
    [
        (7, TypeError, "torch.Generator, or one per image, got int"),
        ([7], TypeError, "got int"),
        ([None], TypeError, "got NoneType"),
        ([torch.Generator()] * 2, ValueError, r"one per image \(1\), got 2"),
        ([], ValueError, "got 0"),
    ],
)
def test_wrong_generators_are_refused(generator, error, message, pipe, tmp_path):
    with pytest.raises(error, match=message):
        pipe(photo(), generator=generator)
    with pytest.raises(error, match=message):
        pipe.upscale_to_file(photo(), tmp_path / "x.png", generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(1, 4.5),
    st.sampled_from([0, 16]),
)
def test_any_size_and_scale_gives_exactly_the_rounded_size(
    pipe, height, width, scale, process_size
):
    result = pipe(photo(height, width), scale=scale, process_size=process_size)
    assert result.shape == (round(scale * height), round(scale * width), 3)


def test_one_pixel_at_the_paper_s_process_size(pipe):
    assert pipe(photo(1, 1), process_size=512).shape == (4, 4, 3)


def test_the_models_own_process_size_is_taken_where_none_is_named():
    pipe, small = TADSRPipeline.from_pretrained("tadsr-tiny"), photo(8, 12)
    assert pipe.default_process_size == 64  # it is trained on small crops
    for options in ({}, {"settings": UpscaleSettings()}):
        assert np.array_equal(pipe(small, **options), pipe(small, process_size=64))
    assert not np.array_equal(pipe(small), pipe(small, process_size=0))


def test_small_images_are_processed_enlarged(pipe):
    small = torch.rand(3, 8, 8)
    enlarged = resize_bicubic(small[None], (64, 64)).clamp(0, 1)
    inner = pipe(enlarged[0], scale=1, process_size=0)
    expect = resize_bicubic(inner[None], (32, 32)).clamp(0, 1)[0]
    torch.testing.assert_close(pipe(small, process_size=64), expect)


def test_padding_never_stretches_the_picture(pipe):
    """A picture that needs padding equals the crop of the picture padded by hand."""
    image = torch.rand(3, 10, 15)
    by_hand = torch.cat([image, image.flip(1)[:, 1:3]], 1)
    by_hand = torch.cat([by_hand, by_hand.flip(2)[:, :, 1:2]], 2)
    got = pipe(image, scale=1, color_fix="none", **FAST)
    expect = pipe(by_hand, scale=1, color_fix="none", **FAST)[:, :10, :15]
    torch.testing.assert_close(got, expect)


def test_the_same_input_gives_the_same_output_and_a_generator_samples(pipe):
    image = photo()
    np.testing.assert_array_equal(pipe(image, **FAST), pipe(image, **FAST))
    seeded = [pipe(image, generator=torch.Generator().manual_seed(s), **FAST) for s in (1, 1, 2)]
    np.testing.assert_array_equal(seeded[0], seeded[1])
    assert (seeded[0] != seeded[2]).any()
    assert (seeded[0] != pipe(image, **FAST)).any()


def test_the_colour_fixes_differ_and_adain_keeps_the_mean(pipe):
    image = photo(32, 32).astype(np.float32) / 255 * 0.2
    results = {c: pipe(image, scale=1, color_fix=c, **FAST) for c in ("adain", "wavelet", "none")}
    assert abs(results["adain"].mean() - image.mean()) < 0.02
    assert abs(results["none"].mean() - image.mean()) > 0.1
    assert np.abs(results["adain"] - results["wavelet"]).max() > 0.01


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("channels", [3, 4])
def test_bytes_are_the_rounded_floats(color_fix, channels, pipe):
    array = photo(channels=channels)
    options = {"timestep": 300, "color_fix": color_fix, **FAST}
    floats = pipe(array.astype(np.float32) / 255, **options)[..., :3]
    for result in (pipe(array, **options), np.asarray(pipe(Image.fromarray(array), **options))):
        assert result.dtype == np.uint8
        # One beside it where a value lies at the border of two.
        difference = result[..., :3] - (floats * 255)
        assert np.abs(difference).max() < 0.51
        if channels == 4:
            alpha = resize_bicubic(torch.from_numpy(array[..., 3] / 255)[None, None], (36, 52))
            assert np.abs(result[..., 3] - alpha[0, 0].clamp(0, 1).numpy() * 255).max() < 0.51


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_waits_for_no_thread(pipe):
    image, is_held, may_end = photo(), threading.Event(), threading.Event()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = pipe(image, **FAST).astype(int)  # with torch's threads

    def hold():
        with pipe._lock:
            is_held.set()
            may_end.wait()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        is_held.wait()
        child = os.fork()
        if child == 0:
            is_same = False
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                is_same = np.abs(pipe(image, **FAST) - expected).max() <= 1
            finally:
                os._exit(0 if is_same else 1)
        status = os.waitpid(child, 0)[1]
        may_end.set()
    torch.set_num_threads(num_threads)
    assert status == 0


def test_threads_share_a_pipeline(pipe):
    images = [photo(height, 12) for height in (8, 9, 10, 11)] * 3
    expected = [pipe(image, 300, **FAST) for image in images]
    is_used = threading.Event()

    def restore(*arguments, **options):
        assert not is_used.is_set(), "two threads are at the networks at once"
        is_used.set()
        try:
            time.sleep(0.005)
            return OneStepEngine.restore(pipe.engine, *arguments, **options)
        finally:
            is_used.clear()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(pipe.engine, "restore", restore)
        found = list(threads.map(lambda image: pipe(image, 300, **FAST), images))
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_a_copy_of_a_pipeline_does_not_wait_for_it(pipe):
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        with pipe._lock, ThreadPoolExecutor(1) as threads:
            result = threads.submit(other, photo(), **FAST).result(timeout=60)
        np.testing.assert_array_equal(result, pipe(photo(), **FAST))


def test_output_type_overrides_the_kind(pipe):
    image = photo()
    assert isinstance(pipe(image, output_type="pil", **FAST), Image.Image)
    assert pipe(image, output_type="pt", **FAST).shape == (3, 36, 52)
    assert pipe(Image.fromarray(image), output_type="np", **FAST).shape == (36, 52, 3)


def test_prompts_are_looked_up_per_image(pipe):
    image = photo()
    plain, sharp = pipe([image, image], prompt=["", "sharp photo"], **FAST)
    np.testing.assert_array_equal(plain, pipe(image, **FAST))
    np.testing.assert_array_equal(sharp, pipe(image, prompt="sharp photo", **FAST))


@pytest.mark.parametrize("prompt", ["", "a sharp photo"])
def test_a_prompts_embedding_is_kept(prompt, golden_pipeline):
    first = golden_pipeline.encode_prompt([prompt])
    again = golden_pipeline.encode_prompt([prompt, prompt])
    assert again.shape[0] == 2
    assert again.data_ptr() == first.data_ptr()


def test_settings_stand_alone(pipe):
    settings = UpscaleSettings(2, "none", 0)
    expected = pipe(photo(), 300, scale=2, color_fix="none", process_size=0)
    np.testing.assert_array_equal(pipe(photo(), 300, settings=settings), expected)
    with pytest.raises(TypeError, match="settings must hold scale, tiling"):
        pipe(photo(), settings=settings, scale=3, tiling=None)
    with pytest.raises(TypeError, match="guidance_scale"):
        pipe.sweep(photo(), settings=settings, guidance_scale=2)
    with pytest.raises(TypeError, match="settings must hold seamless"):
        pipe.upscale_to_file(photo(), "x.png", settings=settings, seamless="x")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timestep": 1000}, ValueError, "must be in 0..999, got 1000"),
        ({"timestep": -1}, ValueError, "must be in 0..999, got -1"),
        ({"timestep": 2.5}, ValueError, "whole number, got 2.5"),
        ({"timestep": float("nan")}, ValueError, "whole number, got nan"),
        ({"timestep": "500"}, TypeError, "whole number, got str"),
        ({"timestep": True}, TypeError, "whole number, got bool"),
        ({"timestep": [1, 2]}, ValueError, r"one per image \(1\), got 2"),
        ({"prompt": ["a", "b"]}, ValueError, r"one per image \(1\), got 2"),
        ({"prompt": 3}, TypeError, "prompt must be text"),
        ({"prompt": "a dog"}, ValueError, "got 'a dog'"),
        ({"output_type": "tensor"}, ValueError, "output_type"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, error, message, pipe, monkeypatch):
    monkeypatch.setattr(OneStepEngine, "restore", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(error, match=message):
        pipe(photo(), **arguments)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ([], ValueError),
        (None, TypeError),
        ("photo.png", TypeError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (np.zeros((4, 4, 2), np.uint8), ValueError),
        (np.zeros((4, 4, 3), np.int64), TypeError),
        (np.full((4, 4, 3), np.nan, np.float32), ValueError),
        (torch.full((3, 4, 4), 1.5), ValueError),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError),
        ([photo(), torch.full((3, 4, 4), -1.0)], ValueError),
    ],
)
def test_wrong_images_are_refused_before_any_work(image, error, pipe):
    with pytest.raises(error):
        pipe(image)


def test_parts_that_do_not_fit_are_refused(pipe):
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="stable-diffusion-2-1-base"):
        TADSRPipeline(pipe.vae, pipe.unet, scheduler, prompt_embeddings=pipe.prompt_embeddings)
    with pytest.raises(ValueError, match="text_encoder"):
        TADSRPipeline(pipe.vae, pipe.unet, pipe.scheduler)


def test_diffusers_own_habits_work(pipe, tmp_path):
    image = photo()
    expect = pipe(image, **FAST)
    pipe.save_pretrained(tmp_path / "model")
    ours = TADSRPipeline.from_pretrained(tmp_path / "model")
    assert np.abs(ours(image, **FAST).astype(int) - expect).max() <= 1
    half = ours.to(torch.bfloat16)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    close = half(image, **FAST).astype(int)
    assert np.abs(close - expect).mean() < 8


def test_adapters_kept_apart_merge_to_the_same_picture(unmerged_pipeline):
    pipe = copy.deepcopy(unmerged_pipeline)
    image = torch.rand(1, 3, 16, 16)
    assert pipe.adapters is not None
    before = pipe(image, 300, **FAST)
    pipe.merge_adapters()
    assert pipe.adapters is None
    torch.testing.assert_close(pipe(image, 300, **FAST), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1, 4])
def test_a_callers_inference_mode_leaves_no_traces(scale):
    generator = torch.Generator().manual_seed(0)
    expect = TADSRPipeline.from_pretrained("tadsr-tiny")
    with torch.inference_mode():
        pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
        image = torch.rand(3, 16, 24, generator=generator)
        settings = {"scale": scale, "process_size": 0}
        first = pipe(image, 500, **settings)
    assert not any(p.is_inference() for p in pipe.unet.parameters())
    assert torch.equal(first, expect(image, 500, **settings))
    # What was kept from the first call serves the second, in either mode.
    assert torch.equal(pipe(image, 500, **settings), first)
    assert torch.equal(pipe.sweep(image, (500,), **settings)[0], first)


def test_weights_converted_in_inference_mode_serve_too():
    image = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
    settings = {"torch_dtype": torch.bfloat16}
    expect = TADSRPipeline.from_pretrained("tadsr-tiny", **settings)(image, 500, process_size=0)
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    with torch.inference_mode():
        pipe.to(torch.bfloat16)
    assert next(pipe.unet.parameters()).is_inference()
    assert torch.equal(pipe(image, 500, process_size=0), expect)
