"""What the demo's buttons do; the page itself is in `test_page.py`."""

import io
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from tadsr import TimestepMap
from tadsr.demo.actions import (
    KEPT_PRIMITIVES,
    PREVIEW_PX,
    Choices,
    DemoLimits,
    Models,
    canvas_for,
    draw_sweep,
    paint_of,
    reads_text,
    restore,
    sentence_for,
    uploaded_file,
)
from tadsr.errors import CheckpointError, ImageReadError, ImageWriteError, TADSRError
from tadsr.images import ArrayImage, read_image, write_image

pytestmark = pytest.mark.usefixtures("unenlarged")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    gradient = Image.linear_gradient("L").resize((24, 16))
    Image.merge("RGB", (gradient, gradient.rotate(180), gradient)).save(path)
    return path


def test_a_photo_is_restored_as_the_library_does(pipe, photo, tmp_path):
    told = []
    found = restore(
        pipe,
        photo,
        Choices(timestep=800, scale=2),
        tmp_path,
        limits=DemoLimits(),
        progress=told.append,
    )
    with Image.open(photo) as image, Image.open(found.file) as written:
        assert np.array_equal(written, pipe(image, 800, scale=2))
        assert np.array_equal(found.after, written)
        assert np.array_equal(found.before, image.resize((48, 32), Image.Resampling.BICUBIC))
    assert found.file.name == "photo_x2.png"
    assert found.summary.startswith("24×16 to 48×32 px in ")
    assert found.summary.endswith(" s, timestep 800.")


def test_the_file_keeps_16_bits_and_every_pixel(pipe, tmp_path):
    pixels = np.linspace(0, 65535, 2 * 600 * 3).astype(np.uint16).reshape(2, 600, 3)
    write_image(ArrayImage(pixels), tmp_path / "scan.tif")
    found = restore(pipe, tmp_path / "scan.tif", Choices(), tmp_path, limits=DemoLimits())
    assert read_image(found.file).pixels.shape == (8, 2400, 3)
    assert read_image(found.file).pixels.dtype == np.uint16
    assert found.before.size == found.after.size == (PREVIEW_PX, 7)


def test_paint_is_a_map(pipe, photo, tmp_path):
    layer = np.zeros((8, 12, 4), np.uint8)
    layer[:, :6] = (255, 59, 48, 255)
    painted = paint_of([as_png(layer), as_png(np.zeros_like(layer))])
    choices = Choices(timestep=900, painted_timestep=1, painted=painted, scale=1)
    assert choices.timestep_map(5).values.unique().tolist() == [1, 900]
    found = restore(pipe, photo, choices, tmp_path, limits=DemoLimits())
    assert found.summary.endswith(" s, timestep 900, 1 where painted.")
    values = np.full((8, 12), 900)
    values[:, :6] = 1
    with Image.open(photo) as image:
        expected = pipe(image, TimestepMap.from_image(values), scale=1)
    assert np.array_equal(found.after, expected)


def as_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file


@pytest.mark.parametrize(
    "layers",
    [
        [io.BytesIO(b"no picture")],
        [as_png(np.zeros((1, 4097, 4), np.uint8))],
        [as_png(np.zeros((4, 4, 4), np.uint8)), as_png(np.zeros((4, 5, 4), np.uint8))],
        [as_png(np.zeros((4, 4, 4), np.uint8))] * 9,
    ],
)
def test_a_painting_is_no_way_in_for_other_files(layers):
    with pytest.raises(ValueError, match="painting"):
        paint_of(layers)


def test_only_uploads_can_be_named(photo, tmp_path):
    uploaded = partial(uploaded_file, tmp_path / "uploads")
    inside = tmp_path / "uploads" / "0123" / "photo.png"
    inside.parent.mkdir(parents=True)
    photo.rename(inside)
    assert uploaded({"path": str(inside), "meta": None}) == inside
    assert uploaded(None) is uploaded({"path": None}) is None
    (tmp_path / "secret.png").write_bytes(inside.read_bytes())
    (tmp_path / "secret.txt").write_text("secret")
    (inside.parent / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "uploads2").mkdir()
    (tmp_path / "uploads2" / "secret.png").write_bytes(inside.read_bytes())
    told = set()
    for name in (
        tmp_path / "secret.png",
        tmp_path / "secret.txt",
        tmp_path / "absent.png",
        tmp_path / "uploads2" / "secret.png",
        inside.parent / "link.png",
        inside.parent / ".." / ".." / "secret.png",
        inside.parent,
        "/etc/passwd",
        "/dev/zero",
        f"{inside}\0",
        "a" * 5000,
        "",
        "http://127.0.0.1/photo.png",
        5,
    ):
        with pytest.raises(ValueError, match="uploaded") as error:
            uploaded({"path": name})
        told.add(str(error.value))
    assert len(told) == 1
    assert str(tmp_path) not in told.pop()


def test_errors_name_no_place_of_the_server(pipe, tmp_path, caplog):
    (tmp_path / "notes.png").write_text("no photo")
    with pytest.raises(ImageReadError, match=r"^notes\.png: must be an image") as error:
        restore(pipe, tmp_path / "notes.png", Choices(), tmp_path, limits=DemoLimits())
    assert sentence_for(error.value) == str(error.value)
    assert "smaller" in sentence_for(MemoryError())
    for secret in (CheckpointError, ImageWriteError, OSError, KeyError):
        assert "/srv/place" not in sentence_for(secret("/srv/place"))
        assert "/srv/place" in caplog.text
        caplog.clear()


def test_a_canvas_that_nobody_painted_on_is_no_map():
    assert paint_of([]) is None
    clean = paint_of([as_png(np.zeros((4, 4, 4), np.uint8))])
    assert Choices(timestep=7, painted=clean).timestep_map(5) == 7
    assert Choices(painted=clean).timestep_map(5) == 5


def test_a_sweep_is_a_sheet(pipe, photo):
    sheet = draw_sweep(pipe, photo, Choices(scale=1), (1, 900), limits=DemoLimits())
    assert sheet.width > 3 * 24


def test_what_is_too_much_is_refused_in_a_sentence(pipe, photo, tmp_path):
    def refused(path, limits, choices=None):
        with pytest.raises((TADSRError, ValueError)) as error:
            restore(pipe, path, choices or Choices(), tmp_path, limits=limits)
        return str(error.value)

    assert "upload one" in refused(None, DemoLimits())
    num_bytes = photo.stat().st_size
    assert "MB" in refused(photo, DemoLimits(max_upload_bytes=num_bytes - 1))
    message = refused(photo, DemoLimits(max_output_pixels=24 * 16 * 16 - 1))
    assert "megapixels" in message
    assert "scale" in refused(photo, DemoLimits(), Choices(scale=0.5))
    text = tmp_path / "notes.txt"
    text.write_text("no photo")
    assert "got .txt" in refused(text, DemoLimits())
    text.rename(tmp_path / "notes.png")
    assert "notes.png" in refused(tmp_path / "notes.png", DemoLimits())
    assert not list(tmp_path.glob("*_x*"))


def test_a_canvas_has_one_size_whatever_the_photos(photo, tmp_path):
    assert canvas_for(photo, DemoLimits()).size == (1024, 683)
    Image.new("RGB", (3000, 1500)).save(tmp_path / "large.png")
    assert canvas_for(tmp_path / "large.png", DemoLimits()).size == (1024, 512)
    Image.new("RGB", (1, 5000)).save(tmp_path / "thin.png")
    assert canvas_for(tmp_path / "thin.png", DemoLimits()).size == (1, 1024)
    for limits in (DemoLimits(max_output_pixels=10**6), DemoLimits(max_canvas_pixels=10**6)):
        with pytest.raises(ImageReadError, match="at most"):
            canvas_for(tmp_path / "large.png", limits)
    write_image(ArrayImage(np.full((1000, 3000, 3), 65535, np.uint16)), tmp_path / "deep.png")
    assert canvas_for(tmp_path / "deep.png", DemoLimits()).getpixel((500, 200)) == (255,) * 3
    with pytest.raises(ImageReadError, match="painted on"):
        canvas_for(tmp_path / "deep.png", DemoLimits(max_canvas_pixels=3_000_000))


def test_visitors_choose_among_the_models_that_are_offered(pipe, golden_dir):
    loaded = []

    def load(name):
        loaded.append(name)
        return pipe

    models = Models(["tadsr-tiny", "other"], load)
    assert models.get("other") is models.get("other")
    assert loaded == ["other"]
    with pytest.raises(ValueError, match="tadsr-tiny, other"):
        models.get("somebody/else")
    assert not reads_text(pipe)


@pytest.mark.parametrize("name", ["max_upload_bytes", "max_output_pixels"])
def test_limits_are_above_zero(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        DemoLimits(**{name: 0})


def test_a_service_bounds_what_is_kept_of_every_size(monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    monkeypatch.setenv(names[0], "7")
    monkeypatch.delenv(names[1], raising=False)
    Models(["tadsr-tiny"], lambda name: None)
    assert [os.environ[name] for name in names] == ["7", str(KEPT_PRIMITIVES)]
