"""The same command again, what is left out, and other habits of people at a shell."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tadsr.folders.jobs import mirror_folder
from tadsr.folders.restoring import FileRequest
from tadsr.images import ArrayImage, lay_over, read_facts

TWICE = ("-s", "2x")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_the_same_command_again_skips_or_replaces(suffix, tadsr, upscale, photo):
    name = f"sharp.{suffix}"
    upscale(photo("a.png"), name, *TWICE)
    assert Image.open(name).format == {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    first = os.stat(name).st_mtime_ns
    assert "sharp" in upscale("a.png", name, *TWICE).stderr  # skipped
    assert os.stat(name).st_mtime_ns == first
    assert "name a checkpoint" in tadsr("upscale", "a.png", name, "-m", "tny", code=1).stderr
    upscale("a.png", name, *TWICE, "--overwrite")
    assert os.stat(name).st_mtime_ns > first
    assert not Path("sharp_x2.png").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_pattern_takes_any_number_of_files_and_again(count, upscale, photo):
    names = ["a.png", "bb.png", "ccc.png"][:count]
    for name in names:
        photo(name)
    results = {name.replace(".png", "_x2.png") for name in names}
    upscale(*names, *TWICE)
    assert set(os.listdir()) == {*names, *results}
    expanded = sorted(os.listdir())
    upscale(*expanded, *TWICE)
    upscale(*expanded, *TWICE, "--overwrite", "-q")
    # Of another scale, and by a pattern that reaches us.
    upscale("*.png", "-s", 3)
    assert set(os.listdir()) == {*names, *results, *(n.replace("_x2", "_x3") for n in results)}


def test_a_photo_is_no_result_whatever_its_name_and_size(upscale, photo):
    photo("b.png", size=(12, 10))
    photo("a.png")
    os.utime("b.png", (1, 1))
    upscale("a.png", "b.png", *TWICE, "--overwrite")
    assert Image.open("b.png").size == (12, 10)
    assert Image.open("b_x2.png").size == (24, 20)


def test_results_keep_their_names_when_files_come_and_go(upscale, photo):
    photo("in/a.jpg")
    upscale("in", "out", *TWICE)
    photo("in/a.webp")
    assert "1 written, 1 skipped" in upscale("in", "out", *TWICE).stdout
    assert {p.name for p in Path("out").glob("*.png")} == {"a.png", "a.webp.png"}
    Path("in/a.jpg").unlink()
    assert "skipped" in upscale("in", "out", *TWICE).stderr
    assert [job.target.name for job in mirror_folder("in", "out")] == ["a.webp.png"]


def test_what_a_folder_run_leaves_out_is_said(upscale, photo, tmp_path):
    photo("in/a.png")
    photo("elsewhere/b.png")
    for name in ("notes.txt", "more.txt", "drawing.psd", ".hidden"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    said = upscale("in", *TWICE).stderr
    assert "in/linked is a link to a folder, which is left out; name it as well" in said
    assert "in: left out 1 .psd, 2 .txt;" in said
    assert upscale("in", "-q", *TWICE).output == ""


def test_sizes_that_nothing_holds_are_refused_before_the_model_is_loaded(upscale, photo, tmp_path):
    photo("in/a.png", size=(64, 48))
    photo("in/b.png")
    error = upscale("in/a.png", "-s", 1e9, code=1).stderr
    assert "would have 64000000000×48000000000 px, but PNG holds at most 2147483647" in error
    # Enough for the small one alone: 12 bytes a pixel.
    error = upscale("in", "-s", 2e6, "-m", "none-such", code=1).stderr
    for name, size in (("a", "128000000×96000000"), ("b", "12000000×10000000")):
        assert f"in/{name}.png: the result would have {size} px, which takes at least" in error
    assert not list((tmp_path / "in_x2e+06").glob("*.png"))


def test_names_and_formats_of_outputs(upscale, photo):
    photo("in/a.jpg")
    photo("in/b.webp")
    for name, suffix in (("jpeg", "jpg"), ("JPG", "jpg"), (".tif", "tiff")):
        assert f"in/a_x2.{suffix} (" in upscale("in/a.jpg", "-f", name, "--dry-run", *TWICE).stdout
    upscale("in/a.jpg", "--suffix", "_sharp", "-f", "same", *TWICE)
    assert Path("in/a_sharp.jpg").exists()
    upscale("in/b.webp", "-o", "new/dir/", *TWICE)
    assert Path("new/dir/b.png").exists()
    upscale("in", "out", "-f", "same", "--suffix", "-2", *TWICE)
    assert {p.name for p in Path("out").glob("*-2.*")} == {"a-2.jpg", "b-2.webp", "a_sharp-2.jpg"}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "16 bit"])
def test_laid_over_a_colour(mode):
    half = np.array([[[200, 200, 200, 128]]], np.uint8)
    image = ArrayImage(half.astype(np.uint16) * 257) if mode == "16 bit" else Image.fromarray(half)
    if mode in ("LA", "P"):
        image = image.convert("LA") if mode == "LA" else image.convert("RGBA").quantize()
    result = lay_over(image, (0, 100, 255))
    assert not result.has_transparency_data
    pixel = np.asarray(getattr(result, "pixels", result)).reshape(-1, 3)[0]
    pixel = pixel / 257 if mode == "16 bit" else pixel
    np.testing.assert_allclose(
        pixel, np.array([200, 200, 200]) * 0.502 + np.array([0, 100, 255]) * 0.498, atol=2
    )


def test_results_say_who_made_them_unless_stripped(upscale, photo):
    upscale(photo("a.png"), "b.webp", *TWICE)
    assert read_facts("b.webp").is_ours
    assert not read_facts("a.png").is_ours
    upscale("a.png", "c.webp", "--strip", *TWICE)
    assert not read_facts("c.webp").is_ours
    assert "background" not in FileRequest().described()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--width", 21), (21, 14)),
        (("--height", 31), (46, 31)),
        (("--width", 60, "--height", 20), (30, 20)),
        (("--long-side", 25), (25, 17)),
        (("--short-side", 7), (10, 7)),
        (("--width", 3), (3, 2)),
    ],
)
def test_results_have_the_size_that_was_asked_for(options, expected, upscale, photo):
    upscale(photo("a.png", size=(9, 6), mode="RGBA"), *options)
    name = f"a_{max(option for option in options if isinstance(option, int))}px.png"
    assert Image.open(name).size == expected


def test_a_size_holds_for_turned_photos_and_frames(upscale, photo):
    exif = Image.Exif()
    exif[274] = 6
    Image.open(photo("a.png", size=(9, 6))).save("a.jpg", exif=exif)
    frames = [Image.new("RGB", (9, 6), color) for color in ("red", "blue")]
    frames[0].save("b.gif", save_all=True, append_images=frames[1:])
    upscale("a.jpg", "b.gif", "-o", "out", "--width", 12)
    assert Image.open("out/a.png").size == (12, 18)
    assert Image.open("out/b.png").size == (12, 8)
    assert "2 skipped" in upscale("a.jpg", "b.gif", "-o", "out", "--width", 12).stdout


def test_webp_without_loss(upscale, photo):
    upscale(photo("a.png"), "b.webp", "--lossless", *TWICE)
    upscale("a.png", "b.png", *TWICE)
    assert np.array_equal(np.asarray(Image.open("b.webp")), np.asarray(Image.open("b.png")))


def test_standard_streams(upscale, photo):
    data = photo("a.png").read_bytes()
    upscale("a.png", "b.png", *TWICE)
    for arguments in (("-",), ("-", "-"), ("-", "-o", "-")):
        found = upscale(*arguments, *TWICE, input=data)
        assert Image.open(io.BytesIO(found.stdout_bytes)).tobytes() == Image.open("b.png").tobytes()
    assert "standard input -> c.webp" in upscale("-", "c.webp", *TWICE, input=data).stdout
    assert upscale("-", input=data[:50], code=1).stderr.startswith("Error: standard input: ")
    assert Image.open("c.webp").size == (12, 10)
    assert Image.open(io.BytesIO(upscale("a.png", "-", "-f", "jpg").stdout_bytes)).format == "JPEG"


def test_a_dry_run_says_what_would_be_and_makes_nothing(upscale, photo):
    photo("in/a.png")
    photo("in/b.png", mode="RGBA")
    Path("in/c.png").write_bytes(b"no image")
    before = sorted(Path().rglob("*"))
    lines = upscale("in", "out", "-f", "jpg", "--dry-run", *TWICE).stdout.splitlines()
    assert lines[:2] == ["in/a.png -> out/a.jpg (12×10)", "in/b.png -> out/b.png (12×10)"]
    assert lines[2].startswith("would fail: in/c.png")
    assert sorted(Path().rglob("*")) == before


def test_file_dates_are_kept_on_demand(upscale, photo):
    photo("in/a.png")
    os.utime("in/a.png", (1_000_000, 1_000_000))
    upscale("in", "out", "--keep-dates", *TWICE)
    assert os.stat("out/a.png").st_mtime == 1_000_000
    assert "skipped" in upscale("in", "out", "--keep-dates", *TWICE).stderr


def test_loras_by_their_weight(upscale, photo, model_dir, tmp_path):
    layer = next(
        n for n in load_file(model_dir / "unet" / WEIGHTS) if n.endswith("attn1.to_v.weight")
    )
    side = load_file(model_dir / "unet" / WEIGHTS)[layer].shape[0]
    stem, generator = f"unet.{layer.removesuffix('.weight')}.lora", torch.Generator().manual_seed(0)
    down, up = (9 * torch.randn(shape, generator=generator) for shape in ((1, side), (side, 1)))
    tensors = {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    save_file(tensors, tmp_path / "style.safetensors")
    photo("a.png")
    runs = {"plain": (), "none": (":0",), "half": (":0.5",), "whole": ("",)}
    for name, weight in runs.items():
        lora = [f"--lora=style.safetensors{each}" for each in weight]
        upscale("a.png", f"{name}.png", *lora, *TWICE)
    pixels = {name: Image.open(f"{name}.png").tobytes() for name in runs}
    assert pixels["plain"] == pixels["none"]
    assert len(set(pixels.values())) == 3
