"""Whole images through the pipeline in pieces."""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torch.utils._python_dispatch import TorchDispatchMode

from tadsr import TADSRError, TADSRPipeline
from tadsr.config import UpscaleSettings
from tadsr.errors import TADSRWarning
from tadsr.images import resize_bicubic, resize_bicubic_rows
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.onestep import OneStepEngine, TileSpec, banded, upscaling
from tadsr.onestep.stages import FusedStages
from tadsr.onestep.storage import BandStorage
from tadsr.onestep.tasks import Task
from tadsr.prompts import Prompts
from tests.crossings import crossed
from tests.small_models import pipeline_of, small_unet, small_vae

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "lighthouse.jpg"
IN_PIECES = TileSpec(band_bytes=2**18, max_memory=1, attention_px=0)
"""Small bands, and nothing kept in memory between layers."""
SAME_PART_DB = 65
"""What docs/tiling.md promises of a part of a picture wherever the grid falls."""


@pytest.fixture(scope="module")
def lq():
    return Image.open(PHOTO).crop((150, 60, 174, 90))


@pytest.fixture(scope="module")
def flat():
    """A model of few layers, wide enough for bands, where not the picture is the point."""
    torch.manual_seed(0)
    vae = small_vae((32, 32), mid_block_add_attention=False)
    return pipeline_of(vae, small_unet((32, 32)), PromptEmbeddings(embedding_dim=8))


@pytest.mark.parametrize(
    ("color_fix", "scale"),
    crossed(
        [("adain", 4), ("adain", 2.7), ("wavelet", 2.7), ("none", 4)],
        ("adain", "wavelet", "none"),
        (4, 2.7),
    ),
)
def test_pieces_give_the_whole(pipe, lq, color_fix, scale):
    options = {"color_fix": color_fix, "scale": scale, "process_size": 0, "output_type": "pt"}
    lq = lq.crop((0, 0, 21, 25))
    whole = pipe(lq, 300, tiling=None, **options)
    for tiling in (IN_PIECES, TileSpec(attention_px=0), TileSpec()):
        found = pipe(lq, 300, tiling=tiling, **options)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_the_same_part_is_restored_alike_wherever_the_grid_falls(pipe):
    period, count = 28, 4  # no multiple of the windows' steps, nor of the bands
    part = Image.open(PHOTO).crop((150, 60, 150 + period, 60 + period))
    lq = Image.new("RGB", (count * period, count * period))
    for number in range(count**2):
        lq.paste(part, (number % count * period, number // count * period))
    spec = TileSpec(band_bytes=2**18, attention_px=128)
    options = {"color_fix": "none", "process_size": 0, "output_type": "pt"}
    result = pipe(lq, tiling=spec, **options)
    parts = result.unflatten(1, (count, -1)).unflatten(3, (count, -1))[:, 1:-1, :, 1:-1]
    first = parts[:, :1, :, :1]
    errors = (parts - first).square().mean(dim=(0, 2, 4)).flatten()[1:]
    psnr = -10 * errors.max().log10().item()
    # Found: 73 dB, by windows far smaller than those that large images get; 94 dB without windows.
    assert psnr >= SAME_PART_DB


@settings(max_examples=8)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 1.5, 4]))
def test_pieces_give_the_whole_at_any_size(pipe, height, width, scale):
    array = np.random.default_rng(height).integers(0, 256, (height, width, 4), np.uint8)
    options = {"scale": scale, "process_size": 0}
    whole = pipe(array, tiling=None, **options)
    found = pipe(array, tiling=IN_PIECES, **options)
    assert found.shape == whole.shape
    # A value on the edge between two integers may fall either way.
    assert np.abs(found.astype(int) - whole).max() <= 1


def test_every_kind_comes_back_as_from_the_whole(flat, lq):
    lq = lq.crop((0, 0, 24, 20))
    gray = lq.convert("L")
    kinds = [
        lq,
        gray,
        lq.convert("P"),
        Image.merge("RGBA", (*lq.split(), gray)),
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257),
        np.asarray(lq),
        np.asarray(gray).astype(np.float32) / 255,
        torch.rand(3, 20, 24),
        torch.rand(2, 3, 20, 24),
    ]
    for image in kinds:
        whole = flat(image, tiling=None, process_size=0)
        found = flat(image, tiling=IN_PIECES, process_size=0)
        assert type(found) is type(whole)
        if isinstance(whole, Image.Image):
            assert found.mode == whole.mode
            assert found.info.keys() == whole.info.keys()
        a, b = (torch.as_tensor(np.asarray(x).astype(np.float64)) for x in (found, whole))
        assert a.shape == b.shape
        step = 1 if b.max() > 1 else 1e-4
        assert (a - b).abs().max() <= (257 if b.max() > 255 else step)


def test_a_seeded_posterior_is_that_of_the_whole(flat, lq):
    options = {"process_size": 0, "output_type": "pt"}
    whole, found = (
        flat(lq, tiling=tiling, generator=torch.Generator().manual_seed(5), **options)
        for tiling in (None, IN_PIECES)
    )
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)


def test_what_does_not_fit_into_memory_is_cut_without_being_asked(monkeypatch):
    # Plain modules, beside which nothing is timed at such sizes.
    pipe, chosen = TADSRPipeline.from_pretrained("tadsr-tiny", engine="eager"), []
    original = upscaling.upscale_in_strips

    def noting(engine, task, spec):
        chosen.append(spec)
        return original(engine, task, spec)

    monkeypatch.setattr(upscaling, "upscale_in_strips", noting)
    images = [Image.new("RGB", size) for size in ((50, 50), (75, 65), (16, 130))]
    pipe(images[1], process_size=0, scale=1)
    monkeypatch.setattr(upscaling, "available_bytes", lambda device: 2**23)
    pipe(images[0], process_size=256)  # from 200 × 200 px
    pipe(images[2], process_size=0, scale=1)
    assert not chosen
    assert pipe(images[1], process_size=0).size == (300, 260)
    assert chosen == [TileSpec()]
    assert chosen[0].attention_px_for(520, 600) == 0
    assert chosen[0].attention_px_for(2100, 2048) == 768


@pytest.mark.parametrize("room", [2**40, 2**20], ids=["fits", "does not fit"])
def test_an_engine_that_is_asked_for_is_used_or_a_warning_says_why_not(lq, room, monkeypatch):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny", engine="fused")
    monkeypatch.setattr(upscaling, "available_bytes", lambda device: room)
    decode, calls = FusedStages.decode, []
    monkeypatch.setattr(FusedStages, "decode", lambda *a: calls.append(1) or decode(*a))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            pipe(lq, process_size=0)
    is_whole = room > 2**20
    assert len(calls) == 2 * is_whole
    assert len(caught) == (not is_whole)
    if caught:
        assert "engine 'fused' computes whole images" in str(caught[0].message)
        assert "the whole would take about" in str(caught[0].message)


@pytest.mark.parametrize("part", ["encoder", "UNet", "decoder"])
def test_a_network_that_overflows_halves_in_bands_is_run_again(part, own_pipeline):
    pipe = own_pipeline
    network = {"encoder": pipe.vae.encoder, "UNet": pipe.unet, "decoder": pipe.vae.decoder}[part]
    with torch.no_grad():
        network.conv_in.weight.copy_(network.conv_in.weight.sign() * 6e4)
        network.conv_in.bias.fill_(6e4)
    photo, options = torch.rand(3, 16, 12), {"process_size": 0, "color_fix": "none"}
    generator = torch.Generator()
    exact = pipe(photo, tiling=IN_PIECES, generator=generator.manual_seed(1), **options)
    pipe.to(torch.float16)
    with pytest.warns(UserWarning, match=f"{part} overflowed torch.float16") as caught:
        found = pipe(photo, tiling=IN_PIECES, generator=generator.manual_seed(1), **options)
    # Others' warnings, given once a process, may be among them.
    assert sum(warning.category is TADSRWarning for warning in caught) == 1
    assert (found - exact).abs().mean() < 0.02


@pytest.mark.parametrize("tiling", [None, IN_PIECES])
@pytest.mark.parametrize("timestep", [300, np.array([[1, 900]])])
def test_progress_rises_to_the_end_and_can_cancel(flat, lq, tiling, timestep, monkeypatch):
    monkeypatch.setattr("tadsr.restorer.paced", lambda progress: progress)
    options = {"tiling": tiling, "process_size": 0}
    seen = []
    flat([lq, lq], timestep, **options, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[0] < 0.3
    assert seen[-1] == 1

    class CancelledError(Exception):
        pass

    def cancel(share):
        if share > 0.3:
            raise CancelledError

    with pytest.raises(CancelledError):
        flat(lq, timestep, **options, progress=cancel)


def test_memory_that_runs_out_is_tried_again_in_smaller_pieces(flat, lq, monkeypatch):
    allocate = BandStorage.allocate
    calls = []

    def scarce(self, shape, dtype):
        calls.append(shape)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(self, shape, dtype)

    whole = flat(lq, tiling=None, process_size=0, output_type="pt")
    monkeypatch.setattr(BandStorage, "allocate", scarce)
    spec = TileSpec(band_bytes=2**19, attention_px=0)
    with pytest.warns(UserWarning, match="memory ran out") as record:
        found = flat(lq, tiling=spec, process_size=0, output_type="pt")
    assert len(record) == 1
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-4)

    def none_left(self, shape, dtype):
        raise MemoryError

    monkeypatch.setattr(BandStorage, "allocate", none_left)
    warnings.simplefilter("ignore")
    with pytest.raises(TADSRError, match="memory must suffice"):
        flat(lq, tiling=spec, process_size=0)


def test_other_errors_are_not_taken_for_missing_memory(flat, lq, monkeypatch):
    def broken(self, shape, dtype):
        raise RuntimeError("something else")

    monkeypatch.setattr(BandStorage, "allocate", broken)
    with pytest.raises(RuntimeError, match="something else"):
        flat(lq, tiling=IN_PIECES, process_size=0)


def test_infinities_are_an_error_and_no_picture(lq):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.inf)
    for tiling in (None, IN_PIECES):
        with pytest.raises(TADSRError, match="finite"):
            pipe(lq, tiling=tiling, process_size=0)


def test_what_is_no_tiling_is_refused(pipe, lq):
    with pytest.raises(TypeError, match="tiling must be"):
        pipe(lq, tiling=512)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 12)),
    st.tuples(st.integers(1, 90), st.integers(1, 30)),
    st.integers(1, 20),
)
def test_rows_of_a_resized_image_are_those_of_the_whole(size, new, rows):
    x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(size[0]))
    whole = resize_bicubic(x, new)
    found = torch.cat(
        [resize_bicubic_rows(x, new, a, min(a + rows, new[0])) for a in range(0, new[0], rows)], 2
    )
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "I;16", "rgb16"])
def test_a_file_written_in_strips_holds_the_image(flat, lq, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("tadsr.onestep.banded.STRIP_PIXELS", 80 * 7)
    image = lq = lq.crop((0, 0, 20, 17))
    if kind == "RGBA":
        image = Image.merge("RGBA", (*lq.split(), lq.convert("L")))
    elif kind == "L":
        image = lq.convert("L")
    elif kind == "I;16":
        image = Image.fromarray(np.asarray(lq.convert("L")).astype(np.uint16) * 250)
    elif kind == "rgb16":
        image = np.asarray(lq).astype(np.uint16) * 250
    whole = flat(image, 300, tiling=IN_PIECES, process_size=0)
    for name in ("out.png", "out.tif"):
        path, expected = tmp_path / name, np.asarray(whole)
        flat.upscale_to_file(image, path, 300, tiling=IN_PIECES, process_size=0)
        assert [file.name for file in tmp_path.iterdir()] == [name]
        if kind != "rgb16":
            with Image.open(path) as opened:
                assert opened.mode == whole.mode
                found = np.asarray(opened)
        elif name == "out.png":  # Pillow reads 8 of the 16 bits
            found, expected = np.asarray(Image.open(path)), whole >> 8
        else:
            found = tifffile.imread(path)
        assert np.array_equal(found, expected)
        path.unlink()


def test_a_file_written_in_strips_keeps_profile_exif_and_resolution(flat, lq, tmp_path):
    lq = lq.copy()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    lq.info |= {"icc_profile": profile, "dpi": (300, 300), "exif": exif.tobytes()}
    for name in ("out.png", "out.tif"):
        flat.upscale_to_file(lq, tmp_path / name, scale=1, process_size=0)
        with Image.open(tmp_path / name) as found:
            assert found.info["icc_profile"] == profile
            assert found.info["dpi"] == pytest.approx((300, 300), abs=0.02)
            if name == "out.png":
                assert found.getexif()[0x010F] == "Maker"


def test_a_failed_strip_leaves_nothing_and_the_old_file(flat, lq, tmp_path):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    class CancelledError(Exception):
        pass

    def cancel(share):
        raise CancelledError

    with pytest.raises(CancelledError):
        flat.upscale_to_file(lq, path, tiling=IN_PIECES, process_size=0, progress=cancel)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TADSRError, match="exists"):
        flat.upscale_to_file(lq, path, overwrite=False)
    with pytest.raises(TADSRError, match="in strips"):
        flat.upscale_to_file(lq, tmp_path / "out.jpg")


def task_of(pipe, rgb, device="cpu"):
    prompts = Prompts(pipe.encode_prompt([""]).to(device))
    return Task([5], prompts, torch.device(device), UpscaleSettings(), rgb=rgb)


def test_memory_is_counted_once_for_a_size(pipe, lq, monkeypatch):
    def count(size):
        return upscaling.planned_bytes(pipe.engine, task_of(pipe, torch.rand(1, 3, *size)))

    small, large = count((16, 24)), count((32, 48))
    assert 3.5 * small < large < 4.5 * small
    monkeypatch.delattr(banded._Run, "compute")
    assert (count((32, 48)), count((16, 24))) == (large, small)


def test_memory_is_counted_on_any_device_without_the_weights(pipe):
    # Meta stands in for all devices but the CPU: mixing it with another one raises.
    meta = torch.device("meta")
    on_meta = [copy.deepcopy(network).to(meta) for network in (pipe.vae, pipe.unet)]
    counted = set()
    for networks, device in ((on_meta, meta), ((pipe.vae, pipe.unet), torch.device("cpu"))):
        engine = OneStepEngine(*networks, pipe.alphas_cumprod)
        task = task_of(pipe, torch.zeros(1, 3, 40, 24), device)
        counted.add(upscaling.planned_bytes(engine, task))
    assert len(counted) == 1


class WholeMaps(TorchDispatchMode):
    """Notes the shapes of maps with all rows of an image, but for pictures."""

    def __init__(self, height):
        super().__init__()
        self.height, self.shapes = height, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[2] == self.height:
                self.shapes |= {tuple(x.shape)} if x.shape[1] > 3 else set()
        return results


def test_no_map_of_the_whole_image_is_kept_beside_the_storage(pipe):
    lq = torch.rand(1, 3, 90, 24)  # latents of as many rows
    with WholeMaps(90) as seen:
        found = pipe(lq, process_size=0, tiling=IN_PIECES)
    assert found.shape == (1, 3, 360, 96)
    assert not seen.shapes


def test_a_batch_that_does_not_fit_is_halved_before_its_images_are_cut(flat, monkeypatch):
    images = torch.rand(3, 3, 8, 12)
    expected = flat(images, [1, 300, 900], process_size=0, tiling=None)
    restore, sizes = flat.engine.restore, []

    def scarce(lq, *arguments, **options):
        sizes.append(len(lq))
        if len(lq) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return restore(lq, *arguments, **options)

    monkeypatch.setattr(flat.engine, "restore", scarce)
    monkeypatch.setattr(flat, "images_at_once", lambda *_: 3)
    found = flat(images, [1, 300, 900], process_size=0)
    assert sizes == [3, 1, 2, 1, 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_does_not_fit_as_a_whole_is_cut(flat, lq, monkeypatch):
    expected = flat(lq, 300, process_size=0, output_type="pt", tiling=TileSpec())

    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(flat.engine, "restore", fails)
    with pytest.warns(UserWarning, match="memory ran out for the image as a whole") as caught:
        found = flat(lq, 300, process_size=0, output_type="pt")
    assert len(caught) == 1
    # Bands of another height: on some processors convolutions round by it.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        flat(lq, 300, process_size=0, tiling=None)


def test_no_more_memory_is_asked_for_than_an_image_needs(pipe, lq):
    # More than this machine has; an allocation of it would fail.
    pipe(lq, process_size=0, tiling=TileSpec(max_memory=2**50))
