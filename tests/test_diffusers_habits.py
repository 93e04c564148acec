"""What users of diffusers type by habit works, or is answered with what to type here."""

import copy
import pickle
from operator import attrgetter, itemgetter

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.errors import CheckpointError, TADSRError

FAST = {"process_size": 0, "timestep": 300}


@pytest.fixture
def pipe(small_pipeline):
    return copy.deepcopy(small_pipeline)


@pytest.fixture
def image():
    return Image.linear_gradient("L").resize((12, 9)).convert("RGB")


@pytest.fixture
def lora(small_pipeline, tmp_path):
    """A LoRA of UNet and text encoder, as diffusers writes it."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False)
    other = copy.deepcopy(small_pipeline)
    layers = {}
    for name in ("unet", "text_encoder"):
        model = other.components[name]
        model.add_adapter(config, "extra")
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="extra")
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    return tmp_path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("has_text", [True, False])
def test_diffusers_opens_a_saved_folder(pipe, model_dir, image, tmp_path, has_text):
    if has_text:
        pipe.metadata = {"default_timestep": 300, "default_process_size": 0}
        pipe.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model" if has_text else model_dir)
    opened = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True
    )
    assert type(opened) is TADSRPipeline
    ours = TADSRPipeline.from_pretrained(folder)
    assert opened.metadata == ours.metadata
    for options in (FAST, {"process_size": 0}):  # without a timestep the model's own
        assert np.array_equal(opened(image, **options), ours(image, **options))
    at = ours.default_timestep
    assert (at, ours.default_process_size) == ((300, 0) if has_text else (500, 512))
    assert np.array_equal(ours(image, at, process_size=0), ours(image, process_size=0))


def test_results_have_images(small_pipeline, image):
    found = small_pipeline(image, **FAST)
    plain = Image.fromarray(np.asarray(found))
    (same,) = found.images
    for take in (itemgetter(0), list):
        with pytest.raises(TypeError, match="one image in is one image out"):
            take(found)
    assert same is found
    assert found == plain
    assert plain == found
    assert found != image
    for copied in (found.copy(), pickle.loads(pickle.dumps(found)), copy.copy(found)):
        assert type(copied) is Image.Image
        assert copied == found
    many = small_pipeline([image, image], **FAST)
    assert many.images == many == [found, found]


@pytest.mark.parametrize(
    ("is_dict", "images_of"), [(True, attrgetter("images")), (False, itemgetter(0))]
)
def test_return_dict_says_how_images_come(small_pipeline, image, is_dict, images_of):
    def images(source):
        return images_of(small_pipeline(source, **FAST, return_dict=is_dict))

    (only,) = images(image)
    assert only == small_pipeline(image, **FAST)
    assert images([image, image]) == [only, only]
    assert images(torch.rand(2, 3, 9, 12)).shape == (2, 3, 36, 48)


def test_arrays_are_bytes_and_tensors_floats(small_pipeline, image):
    assert small_pipeline(image, **FAST, output_type="np").dtype == np.uint8
    assert small_pipeline(image, **FAST, output_type="pt").dtype == torch.float32


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("num_inference_steps", "timestep="),
        ("guidance_scale", "timestep="),
        ("strength", "timestep="),
        ("callback_on_step_end", "progress="),
        ("width", "scale="),
        ("mask_image", "takes a map"),
        ("seed", "generator="),
        ("outscale", "scale="),
        ("tile_pad", "TileSpec"),
        ("batch_size", "list of images"),
        ("images", "comes first"),
    ],
)
def test_arguments_are_answered_with_ours(small_pipeline, image, argument, instead):
    with pytest.raises(TypeError, match=f"{argument} has no meaning here: .*{instead}"):
        small_pipeline(image, **{argument: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'timestepp'"):
        small_pipeline(image, timestepp=1)
    for arguments, named in ((("a house",), {"image": image}), (("a house", image), {})):
        with pytest.raises(TypeError, match="the image comes first"):
            small_pipeline(*arguments, **named)
    with pytest.raises(TypeError, match="prompt="):
        small_pipeline(image, "a house")


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("use_safetensors", "leave it out"),
        ("device_map", "to\\("),
        ("device", "to\\("),
        ("vae", "pipe.unet = "),
    ],
)
def test_loading_and_saving_are_answered_with_ours(small_pipeline, argument, instead, tmp_path):
    for call in (TADSRPipeline.from_pretrained, small_pipeline.save_pretrained):
        with pytest.raises(TypeError, match=f"{argument} has no meaning here: .*{instead}"):
            call(tmp_path / "model", **{argument: True})
    with pytest.raises(TypeError, match="from_pretrained\\('tadsr-tiny'"):
        TADSRPipeline("tadsr-tiny")


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("enable_vae_tiling", "tiling=TileSpec"),
        ("enable_vae_slicing", "give a list"),
        ("enable_freeu", "timestep="),
        ("fuse_qkv_projections", "set_engine"),
        ("vae.enable_tiling", "tiling=TileSpec"),
        ("load_ip_adapter", "image to restore"),
        ("enable_xformers_memory_efficient_attention", "PyTorch's own"),
        ("process", "pipe\\(image"),
        ("cuda", "to\\(.cuda"),
    ],
)
def test_methods_are_answered_with_ours(small_pipeline, method, instead):
    name = method.removeprefix("vae.")
    with pytest.raises(TADSRError, match=f"{name} has no meaning here: .*{instead}"):
        attrgetter(method)(small_pipeline)()


def test_loras_are_attached_weighed_fused_and_taken_away(pipe, image, lora):
    def restored():
        return np.asarray(pipe(image, prompt="a house", output_type="pt", **FAST))

    plain = restored()
    pipe.load_lora_weights(lora, adapter_name="style")
    attached = restored()
    assert abs(attached - plain).max() > 1e-3
    pipe.set_adapters("style", 0.0)
    assert abs(restored() - plain).max() < 1e-4
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert abs(restored() - attached).max() < 1e-4
    pipe.merge_lora(lora, scale=-1.0)  # ours says the same
    assert abs(restored() - plain).max() < 1e-4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.safetensors", "does not exist; check the path"),
        ("loras/missing.safetensors", "does not exist"),  # not a hub's repository
        ("./folder", "does not exist"),
        ("photo.jpg", "photo.jpg cannot be loaded as a LoRA"),
        (".", "cannot be loaded as a LoRA"),
        ({"conv.weight": torch.zeros(1)}, "these tensors cannot be loaded as a LoRA"),
        ({}, "these tensors cannot be loaded as a LoRA .*nothing for these networks"),
    ],
)
def test_what_is_no_lora_is_refused_without_the_network(
    small_pipeline, source, message, tmp_path, monkeypatch, image
):
    monkeypatch.chdir(tmp_path)
    image.save("photo.jpg")
    with pytest.raises(CheckpointError, match=message):
        small_pipeline.load_lora_weights(source)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there are such devices")
@pytest.mark.parametrize(
    "ask",
    [
        *(lambda pipe, device=device: pipe.to(device) for device in ("cuda", "mps", 0, "float16")),
        lambda pipe: pipe.to(torch.device("cuda", 7), torch.float16),
        lambda pipe: pipe.to(device="gpu"),
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_model_cpu_offload(gpu_id=1),
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cuda"),
    ],
)
def test_a_device_must_be_there(small_pipeline, ask):
    with pytest.raises(TADSRError, match=r"device must be one that torch .* finds here, got "):
        ask(small_pipeline)
    assert small_pipeline.device.type == "cpu"
    assert small_pipeline.dtype == torch.float32


def test_an_argument_of_to_is_not_passed_over(small_pipeline):
    with pytest.raises(TypeError, match="got torch_device="):
        small_pipeline.to(torch_device="cuda")


def test_loras_do_not_mix_with_adapters_kept_apart(unmerged_pipeline, tmp_path):
    with pytest.raises(TADSRError, match="merge_adapters"):
        unmerged_pipeline.load_lora_weights(tmp_path)


def test_a_bar_comes_when_diffusers_bar_is_set(pipe, image, capsys):
    pipe(image, **FAST)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="photo", mininterval=0)
    pipe(image, **FAST)
    assert "photo: 100%" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(image, **FAST)
    assert capsys.readouterr().err == ""


def test_no_line_of_the_libraries_is_logged(pipe, image, capsys, base_dir, adapter_file):
    pipe.to(torch.bfloat16).to("cpu")
    pipe.to(torch.float16)
    pipe(image, **FAST)
    TADSRPipeline.from_pretrained(base_dir, adapter=adapter_file)
    assert capsys.readouterr() == ("", "")
