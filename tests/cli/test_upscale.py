"""`tadsr upscale`: what is written where, what is said, and what is refused before any work."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.cli.reporting import parse_bytes


def files_under(folder) -> set[str]:
    """Return the files of a folder, without those that every run over many images keeps."""
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if "tadsr-manifest" not in name}


def read(path) -> tuple[str, str, tuple[int, int]]:
    with Image.open(path) as image:
        image.load()
        return image.format, image.mode, image.size


def test_one_file_is_written_beside_its_input(upscale, photo):
    result = upscale(photo("photo.jpg"))
    assert read("photo_x4.png") == ("PNG", "RGB", (24, 20))
    assert result.stdout.startswith("photo.jpg -> photo_x4.png (24×20, ")
    assert result.stderr == "on cpu, float32, engine fused\n"
    assert files_under(".") == {"photo.jpg", "photo_x4.png"}


def test_verbose_says_why(upscale, photo):
    options = ("-v", "--engine", "eager", "--dtype", "bf16", "--device", "cpu")
    said = upscale(photo("photo.jpg"), *options).stderr
    assert said.startswith("on cpu, bfloat16, engine eager\n")
    assert "engine: asked for eager" in said


def test_scale_format_and_quality_shape_the_file(upscale, photo):
    path = photo("photo.png", size=(64, 64))
    upscale(path, "--scale", 2.5, "--format", "jpg", "--quality", 5)
    assert read("photo_x2.5.jpg") == ("JPEG", "RGB", (160, 160))
    upscale(path, "fine.jpg", "--scale", 2.5, "--quality", 100)
    assert os.path.getsize("fine.jpg") > 3 * os.path.getsize("photo_x2.5.jpg")


def test_gray_and_alpha_survive(upscale, photo):
    upscale(photo("gray.png", mode="L"), photo("clear.png", mode="RGBA"), "-o", "out")
    assert read("out/gray.png")[1] == "L"
    assert read("out/clear.png")[1] == "RGBA"


def test_a_folder_is_mirrored_around_a_broken_file(upscale, photo):
    photo("photos/a.jpg")
    photo("photos/sub/c.PNG")
    photo("photos/.hidden/d.png")
    photo("photos/._a.png")
    broken = photo("photos/b.png", size=(40, 40))
    broken.write_bytes(broken.read_bytes()[:900])
    Path("photos/notes.txt").write_text("no image")

    result = upscale("photos", code=1)
    assert files_under("photos_x4") == {"a.png", "sub/c.png"}
    assert "1 of 3 images failed:\n  photos/b.png: " in result.stderr
    assert "2 written, 0 skipped, 1 failed" in result.stdout
    assert "0.00096 megapixels, " in result.stdout
    assert "Traceback" not in result.output


def test_outputs_inside_the_input_folder_are_not_read(upscale, photo):
    photo("photos/a.jpg")
    upscale("photos", "photos/sharp")
    upscale("photos", "photos/sharp", "--overwrite")
    assert files_under("photos") == {"a.jpg", "sharp/a.png"}


def test_existing_outputs_are_skipped_unless_overwritten(upscale, photo):
    photo("photos/a.jpg")
    photo("photos/b.jpg")
    photo("out/a.png", size=(1, 1))
    result = upscale("photos/", "out/")
    assert read("out/a.png")[2] == (1, 1)
    assert "out/a.png: exists, skipped; --overwrite replaces it" in result.stderr
    assert "1 written, 1 skipped, 0 failed" in result.stdout
    upscale("photos/", "out/", "--overwrite")
    assert read("out/a.png")[2] == (24, 20)


def test_what_is_in_the_way_and_no_image_is_a_failure(upscale, photo):
    for name in "abc":
        photo(f"photos/{name}.png")
    Path("out/a.png").mkdir(parents=True)
    Path("out/b.png").write_bytes(b"")
    result = upscale("photos/", "out/", code=1)
    assert "out/a.png: exists, but is no whole image" in result.stderr
    assert "out/b.png: exists, but is no whole image" in result.stderr
    assert "1 written, 0 skipped, 2 failed" in result.stdout


def test_a_run_with_nothing_to_do_loads_no_model(tadsr, photo):
    result = tadsr("upscale", photo("a.jpg"), "-o", photo("b.png"), "-m", "owner/missing")
    assert "b.png: exists, skipped" in result.stderr


def test_what_a_format_cannot_hold_becomes_png(upscale, photo):
    photo("photos/clear.png", mode="RGBA")
    photo("photos/plain.png")
    result = upscale("photos", "-f", "jpg")
    assert files_under("photos_x4") == {"plain.jpg", "clear.png"}
    assert "becomes clear.png, since JPEG cannot hold an alpha channel\n" in result.stderr
    assert "0 written, 2 skipped" in upscale("photos", "-f", "jpg").stdout
    upscale("photos", "over", "-f", "bmp", "--background", "#204060")
    assert files_under("over") == {"plain.bmp", "clear.bmp"}
    error = upscale("photos/clear.png", "clear.jpg", code=1).stderr
    assert "JPEG cannot hold an alpha channel; write PNG or WebP, or lay it over" in error


def test_same_input_same_output_and_seeds_differ(upscale, photo):
    path = photo("photo.png")
    runs = {"a": (), "b": (), "c": ("--seed", 1), "d": ("--seed", 1), "e": ("--seed", 2)}
    for name, options in runs.items():
        upscale(path, f"{name}.png", "--color-fix", "none", *options)
    pixels = {name: Image.open(f"{name}.png").tobytes() for name in runs}
    assert pixels["a"] == pixels["b"]
    assert pixels["c"] == pixels["d"]
    assert len(set(pixels.values())) == 3


def test_quiet_says_nothing(upscale, photo):
    photo("photos/a.jpg")
    photo("photos/b.jpg")
    for _ in ("written", "skipped"):
        assert upscale("photos", "--quiet").output == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-t 1000", "--timestep must be in 0..999, got 1000"),
        ("-t -1", "--timestep must be in 0..999, got -1"),
        ("-t 1.5", "--timestep"),
        ("-t abc", "'--timestep' / '-t': 'abc' is not a"),
        ("--quality 0", "--quality must be in 1..100, got 0"),
        ("--scale 0.5", "scale must be a finite number of at least 1, got 0.5"),
        ("-s x", "'--scale' / '-s': 'x' is not a"),
        ("--process-size -1", "at least 0 px, got -1"),
        ("--seed -1", "--seed must be in 0.."),
        ("--color-fix adian", "'adian' is not one of 'adain'"),
        ("--dtype fp8", "'--dtype': 'fp8' is not one of 'auto', 'fp32'"),
        ("-f doc", "'--format' / '-f': must be one of same, png,"),
        ("--background plaid", "--background must be a colour such as white"),
        ("--suffix a/b", "--suffix must be part of a file's name"),
        ("--device gpu", "--device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("--device cuda:99", "--device cuda:99 must exist"),
        ("--device 7", "--device cuda:7 must exist"),
        ("--prompt house", "prompt must be left out for this model, got 'house'"),
        ("--tile small", "--tile must be auto, off or a number"),
        ("--tile 100", "--tile must be auto, off or a multiple of 128 px, got 100"),
        ("--max-memory much", "a size must be like 6GB"),
        ("--max-memory 0GB", "a size must be like 6GB"),
        ("--max-memory 10MB", "--max-memory must be at least 100 MB, since the program"),
        ("--max-memory 1GB --tile off", "needs pieces"),
        *(
            (f"--max-pixels={text}", "--max-pixels must be a number such as 500M or 2G")
            for text in ("many", "0", "-5", "0.1", "5MB")
        ),
        ("--width 0", "width must be a whole number of px from 1"),
        ("--width 9 --long-side 9", "a size must be width, height, both"),
        ("--width 9 -s 2", "--scale and a size in px must not both be given"),
        ("--lora style.safetensors:much", "--lora must be FILE or FILE:WEIGHT"),
        ("--lora missing.safetensors", "--lora must name a file that exists"),
        ("-o b.jpg --lossless", "--lossless must be for"),
        ("-i b.png", "No such option: -i: inputs need no option"),
        ("--outscale 2", "No such option: --outscale: -s is"),
        ("--face_enhance", "--timestep-map keeps faces"),
        ("-g 0", "--device takes"),
        ("b.png -o -", "stands for one image"),
    ],
)
def test_misuse_is_named_as_it_was_typed_and_writes_nothing(
    tadsr, photo, model_dir, options, message
):
    result = tadsr("upscale", photo("photo.jpg"), "-m", model_dir, *options.split(), code=2)
    assert message in result.stderr
    assert files_under(".") == {"photo.jpg"}


def test_a_missing_model_is_one_readable_error(tadsr, photo):
    result = tadsr("upscale", photo("photo.jpg"), "-m", "tadsr-tny", code=1)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "did you mean 'tadsr-tiny'?" in result.stderr


def test_an_unwritable_place_is_an_error_before_work(tadsr, photo):
    Path("taken").write_text("a file")
    args = ("upscale", photo("photo.jpg"), "-o", "taken/new/out.png", "-m", "missing-model")
    result = tadsr(*args, code=1)
    assert result.stderr == (
        "Error: taken/new/out.png: cannot be written, for taken is not a folder; choose another "
        "folder\n"
    )


def test_a_name_too_long_for_the_result_is_an_error_before_work(upscale, photo, monkeypatch):
    from tadsr.restorer import Restorer

    monkeypatch.setattr(Restorer, "__call__", None)
    result = upscale(photo("a" * 250 + ".jpg"), code=1)
    assert "has 257 bytes; choose a shorter one" in result.stderr


def test_one_broken_file_is_an_error_and_leaves_nothing(tadsr):
    Path("photo.jpg").write_bytes(b"\xff\xd8 no jpeg")
    result = tadsr("upscale", "photo.jpg", "out/", code=1)
    assert result.stderr.startswith("Error: photo.jpg: ")
    assert not Path("out").exists()


def test_debug_shows_the_traceback(upscale):
    Path("photo.jpg").write_bytes(b"\xff\xd8 no jpeg")
    assert "Traceback" in upscale("photo.jpg", "--debug", code=1).stderr


def test_a_result_that_is_not_finite_is_reported(upscale, photo, model_dir, tmp_path, tadsr):
    from tadsr import TADSRPipeline

    pipe = TADSRPipeline.from_pretrained(model_dir)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    result = tadsr("upscale", photo("photo.jpg"), "-m", "./nan", "--process-size", 0, code=1)
    assert "photo.jpg: the result must be finite" in result.stderr
    assert not Path("photo_x4.png").exists()


def test_pieces_a_limit_of_memory_and_engines_change_nothing_that_is_seen(upscale, photo):
    path = photo("photo.png", size=(48, 40))

    def pixels(*options):
        said = upscale(path, "out.png", "--overwrite", *options).stderr
        return np.asarray(Image.open("out.png")).astype(int), said

    whole, _ = pixels("--tile", "off", "--engine", "eager")
    assert np.abs(whole - pixels("--tile", "off", "--engine", "fused")[0]).max() <= 1
    pieces, said = pixels("--max-memory", "100MB")
    assert np.abs(whole - pieces).max() <= 1
    assert "--max-memory 100 MB cannot be kept, since the program and the model take" in said
    assert pixels("--tile", 128)[0].shape == whole.shape


def test_larger_inputs_are_read_when_they_are_trusted(upscale, photo, monkeypatch):
    path = photo("photo.png", size=(6, 5))
    result = upscale(path, "--max-pixels", 29, code=1)
    assert "at most 29 pixels" in result.stderr
    assert "--max-pixels" in result.stderr
    upscale(path, "--max-pixels", "0.03k")
    assert read("photo_x4.png")[2] == (24, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14)
    assert "--max-pixels" in upscale(path, "a.png", code=1).stderr
    upscale(path, "a.png", "--max-pixels", "200M")
    assert Image.MAX_IMAGE_PIXELS == 14


def test_results_do_not_depend_on_the_largest_input(upscale, photo):
    photo("photos/a.png")
    upscale("photos", "--max-pixels", "1G")
    assert "other settings" not in upscale("photos").stderr


def test_very_large_results_are_written_in_strips(upscale, photo, monkeypatch):
    path = photo("photo.png", size=(20, 30))
    upscale(path, "whole.png")
    monkeypatch.setattr(sys.modules["tadsr.folders.restoring"], "STREAMED_PIXELS", 1000)
    for name in ("large.png", "large.tif"):
        result = upscale(path, name)
        assert f"{name} (80×120" in result.stdout
        assert np.array_equal(np.asarray(Image.open(name)), np.asarray(Image.open("whole.png")))
    upscale(path, "large.webp")  # which cannot be written in strips
    assert read("large.webp") == ("WEBP", "RGB", (80, 120))
    assert "skipped" in upscale(path, "-o", "large.png").stderr


@pytest.mark.parametrize(
    ("text", "number"),
    [("6GB", 6e9), ("1.5 MB", 1.5e6), ("2GiB", 2**31), ("500k", 5e5), ("7", 7), ("1TB", 1e12)],
)
def test_sizes_are_read_as_people_write_them(text, number):
    assert parse_bytes(text) == number


def test_a_tagger_for_a_model_that_reads_no_text_is_refused(upscale, photo):
    photo("photo.png")
    result = upscale("photo.png", "a.png", "--tagger", "dape", code=1)
    assert "this model has none" in result.stderr
    assert not Path("a.png").exists()
