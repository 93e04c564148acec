"""Folders, pairs and lists: samples are functions of (configuration, seed, number)."""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.errors import DataError, TADSRWarning
from tadsr.training.data import DataConfig, find_photos, open_data
from tests.training.conftest import same, take

CROP_PX = 32


@pytest.fixture
def config(photos):
    return DataConfig(str(photos), crop_px=CROP_PX, min_zoom=0.5, rotate=True, num_workers=0)


def test_a_sample_depends_neither_on_workers_nor_on_the_batch(config):
    one_by_one = take(open_data(config, seed=3), 8, batch_size=1)
    with_workers = replace(config, num_workers=2, cache_photos=True)
    for b, batch in enumerate(take(open_data(with_workers, seed=3), 2, batch_size=4)):
        for i in range(4):
            single = one_by_one[4 * b + i]
            assert batch.hq[i].equal(single.hq[0])
            assert batch.lq[i].equal(single.lq[0])
            assert batch.names[i] == single.names[0]
    assert not same(one_by_one[0], take(open_data(config, seed=4), 1, batch_size=1)[0])


def test_processes_share_the_samples_of_one_with_their_batches_together(config):
    whole = take(open_data(config, seed=0), 3, batch_size=4)
    shares = [
        take(open_data(config, seed=0), 3, batch_size=2, rank=r, num_processes=2) for r in (0, 1)
    ]
    for step, batch in enumerate(whole):
        joined = torch.cat([shares[0][step].hq, shares[1][step].hq])
        assert joined.equal(batch.hq)
        indices = torch.cat([shares[0][step].indices, shares[1][step].indices])
        assert indices.equal(batch.indices)


def test_resuming_gives_what_would_have_come(config):
    unbroken = take(open_data(config, seed=0), 5)
    resumed = take(open_data(config, seed=0), 3, first_sample=4)
    assert all(same(a, b) for a, b in zip(unbroken[2:], resumed, strict=True))


def test_an_epoch_shows_every_photo_once(config):
    names = [b.names[0] for b in take(open_data(config, seed=0), 12, batch_size=1)]
    epochs = [names[i : i + 4] for i in (0, 4, 8)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_device_degrades_as_the_worker_does(config):
    later = replace(config, degrade_on="device")
    pending = take(open_data(later, seed=0), 2)[1]
    assert pending.lq is None
    assert same(pending.to("cpu"), take(open_data(config, seed=0), 2)[1].to("cpu"))


def test_crops_are_pieces_of_the_photo(photos):
    config = DataConfig(str(photos), crop_px=CROP_PX, flip=False, num_workers=0)
    batch = take(open_data(config, seed=0), 1, batch_size=1)[0]
    with Image.open(batch.names[0]) as image:
        photo = np.array(image)
    crop = ((batch.hq[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(photo, (CROP_PX, CROP_PX, 3))
    assert (windows.reshape(-1, CROP_PX, CROP_PX, 3) == crop).all((1, 2, 3)).any()


def test_a_largest_zoom_enlarges_what_is_cut(tmp_path):
    board = np.indices((48, 48)).sum(0) % 2 * 255  # as sharp as pixels can be
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    config = DataConfig(str(tmp_path), crop_px=CROP_PX, num_workers=0)
    steps = []
    for max_zoom in (1.0, 3.0):
        batches = take(open_data(replace(config, max_zoom=max_zoom), seed=0), 4)
        steps.append(torch.cat([b.hq for b in batches]).diff(dim=-1).abs().mean((1, 2, 3)))
    assert (steps[0] == 2).all()
    assert (steps[1] < 1).all()


def make_pairs(photos, folder, scale):
    for path in find_photos(photos):
        with Image.open(path) as image:
            size = (image.width // scale, image.height // scale)
            small = image.resize(size, Image.Resampling.BICUBIC)
            folder.mkdir(exist_ok=True)
            small.save(folder / path.name)
    return folder


def test_pairs_are_cut_at_the_same_place(photos, tmp_path):
    lq = make_pairs(photos, tmp_path / "lq", 4)
    config = DataConfig(
        str(photos), kind="pairs", lq=str(lq), crop_px=CROP_PX, rotate=True, num_workers=0
    )
    for batch in take(open_data(config, seed=0), 4):
        down = torch.nn.functional.interpolate(batch.hq, scale_factor=0.25, mode="area")
        lq_down = torch.nn.functional.interpolate(batch.lq, scale_factor=0.25, mode="area")
        error = (down - lq_down).abs().mean()
        shuffled = (down - lq_down.roll(1, 0)).abs().mean()
        assert error < 0.25 * shuffled
    assert open_data(config, seed=0).description == f"4 pairs in {photos.name}"


def test_stored_lq_can_be_enlarged_as_the_published_code_does(photos, tmp_path):
    lq = make_pairs(photos, tmp_path / "lq", 4)
    config = DataConfig(str(photos), lq=str(lq), crop_px=96, flip=False, num_workers=0)
    (batch,) = take(open_data(replace(config, lq_resize="lanczos"), seed=0), 1, batch_size=1)
    (bicubic,) = take(open_data(config, seed=0), 1, batch_size=1)
    with Image.open(lq / Path(batch.names[0]).name) as small:  # a crop as high as the photo
        height = small.height
        wanted = {
            left: np.asarray(
                small.crop((left, 0, left + height, height))
                .resize((96, 96), Image.Resampling.LANCZOS)
            )
            for left in range(small.width - height + 1)
        }  # fmt: skip
    got = ((batch.lq[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert any(np.array_equal(got, image) for image in wanted.values())
    assert not batch.lq.equal(bicubic.lq)


def test_swapped_or_missing_partners_are_refused(photos, tmp_path):
    lq = make_pairs(photos, tmp_path / "lq", 4)
    with pytest.raises(ValueError, match="swap"):
        open_data(DataConfig(str(lq), lq=str(photos), crop_px=CROP_PX), seed=0)
    (lq / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 have none, first \['2'\]"):
        open_data(DataConfig(str(photos), lq=str(lq), crop_px=CROP_PX), seed=0)


def test_the_published_list_carries_pairs_and_tags(photos, tmp_path):
    blurred = tmp_path / "blurred photos"
    blurred.mkdir()
    lines = []
    for path in find_photos(photos):
        with Image.open(path) as image:
            small = image.resize((image.width // 4, image.height // 4))
            small.resize(image.size, Image.Resampling.BICUBIC).save(blurred / path.name)
        lines.append((path, blurred / path.name, "a cat, grass"))
    listed = tmp_path / "pairs.txt"
    listed.write_text("\n".join("\t".join(map(str, line)) for line in lines))
    data = open_data(DataConfig(str(listed), crop_px=CROP_PX, num_workers=0), seed=0)
    batch = take(data, 1)[0]
    assert batch.prompts == ("a cat, grass",) * 2
    assert data.prompts() == ("a cat, grass",)
    assert (batch.hq - batch.lq).abs().mean() > 0.01
    listed.write_text("\n".join(f"{lq}\t{hq}\ttags" for hq, lq, _ in lines))
    with pytest.raises(ValueError, match=r"columns of .*pairs\.txt must be HQ first.*4 of 4"):
        open_data(DataConfig(str(listed), crop_px=CROP_PX), seed=0)
    listed.write_text("one_word\n")
    with pytest.raises(ValueError, match="line 1"):
        open_data(DataConfig(str(listed), crop_px=CROP_PX), seed=0)
    listed.write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        open_data(DataConfig(str(listed), crop_px=CROP_PX), seed=0)


@pytest.fixture
def captioned(photos, tmp_path):
    """A copy of the photographs, and what their captions are configured with."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    return {"source": str(folder), "crop_px": CROP_PX, "num_workers": 0, "prompt": "photo"}


def test_captions_come_from_sidecars_lists_or_one_prompt(captioned, tmp_path):
    (Path(captioned["source"]) / "0.txt").write_text("a red house\n")
    with pytest.warns(TADSRWarning, match=r"beside them: 3 of 4 photographs have no .*1\.png, 2"):
        data = open_data(DataConfig(**captioned, captions="sidecar"), seed=0)
    assert data.prompts() == ("a red house", "photo")
    captions = {}
    for batch in take(data, 2):
        captions |= dict(zip(batch.names, batch.prompts, strict=True))
    assert {p.rpartition("/")[2]: c for p, c in captions.items()}["0.png"] == "a red house"
    tsv, tags = tmp_path / "captions.tsv", tmp_path / "tags.jsonl"
    tsv.write_text("".join(f"{i}.png\ta tree\n" for i in range(4)))
    tags.write_text(
        "".join(json.dumps({"file_name": f"{i}.jpg", "tags": "sea"}) + "\n" for i in range(4))
    )
    for listed, caption in ((tsv, "a tree"), (tags, "sea")):
        data = open_data(DataConfig(**captioned, captions=str(listed)), seed=0)
        assert data.prompts() == (caption,)
        dropped = DataConfig(**captioned, captions=str(listed), prompt_dropout=1.0)
        assert {p for b in take(open_data(dropped, seed=0), 2) for p in b.prompts} == {""}


def test_captions_that_match_no_photograph_are_refused(captioned, tmp_path):
    listed = tmp_path / "captions.tsv"

    def open_with(captions: object) -> None:
        open_data(DataConfig(**captioned, captions=str(captions)), seed=0)

    with pytest.raises(
        ValueError, match=r"\.txt files beside them matches none of 4: it lacks 0\."
    ):
        open_with("sidecar")
    listed.write_text("lq/0.png\ta tree\nlq/1.png\ta tree\n")
    with pytest.raises(ValueError, match=r"matches none of 4: .*, … and has lq/0, lq/1"):
        open_with(listed)
    listed.write_text("0.png\ta tree\n7.png\ta tree\n")
    with pytest.warns(TADSRWarning, match=r"3 of 4 .*on data\.prompt; 1 captions name no .*7"):
        open_with(listed)
    listed.write_text("no tab\n")
    with pytest.raises(ValueError, match="line 1"):
        open_with(listed)
    (tmp_path / "tags.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match=r"tags\.jsonl, line 1, must be"):
        open_with(tmp_path / "tags.jsonl")
    with pytest.raises(ValueError, match="readable file"):
        open_with(tmp_path / "no.tsv")
    with pytest.raises(ValueError, match="third column"):
        open_data(DataConfig("pairs.txt", kind="list", captions="sidecar"), seed=0)


def test_unusable_photos_are_replaced_and_named(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:400])
    Image.new("RGB", (16, 200)).save(folder / "small.png")
    config = DataConfig(str(folder), crop_px=CROP_PX, num_workers=1)
    with pytest.warns(TADSRWarning, match=f"1 of 6 photographs.*1 below {CROP_PX} px"):
        data = open_data(config, seed=0)
    batches = take(data, 6, batch_size=1)
    assert "broken.png" in " ".join(r for b in batches for r in b.skipped)
    assert all("broken" not in name and "small" not in name for b in batches for name in b.names)
    with pytest.warns(TADSRWarning, match="left out"):
        again = take(open_data(config, seed=0), 6, batch_size=1)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_reading_headers_in_threads_leaves_warnings_as_they_were(tmp_path):
    for i in range(64):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    config = DataConfig(str(tmp_path), crop_px=8, num_workers=0)
    sys.setswitchinterval(1e-5)
    try:
        with warnings.catch_warnings():
            before = list(warnings.filters)
            for _ in range(10):
                open_data(config, seed=0)
            assert warnings.filters == before
    finally:
        sys.setswitchinterval(5e-3)


def test_a_folder_of_unusable_photos_ends_with_the_reason(photos, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((photos / "0.png").read_bytes()[:400])
    data = open_data(DataConfig(str(tmp_path), crop_px=CROP_PX, num_workers=0), seed=0)
    with pytest.raises(DataError, match="in a row"):
        take(data, 1)


def test_oriented_and_sixteen_bit_photos_are_read_as_they_look(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 48).astype(np.uint16), (40, 1))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    config = DataConfig(str(tmp_path), crop_px=40, flip=False, num_workers=0)
    hq = take(open_data(config, seed=0), 1, batch_size=1)[0].hq
    assert hq[0, 0, 0].diff().min() > 0
    assert hq.abs().max() <= 1
    (tmp_path / "wide.png").unlink()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (64, 32), "red").save(tmp_path / "turned.jpg", exif=turned)
    batch = take(open_data(DataConfig(str(tmp_path), crop_px=32, num_workers=0), seed=0), 1)[0]
    assert batch.hq.shape == (2, 3, 32, 32)


def test_presets_come_in_their_shares(photos):
    def drawn(**shares):
        config = DataConfig(
            str(photos), crop_px=CROP_PX, num_workers=0, degrade_on="device", **shares
        )
        batches = take(open_data(config, seed=0), 40, batch_size=1)
        return [batch.degradations for batch in batches]

    alone = {
        "bicubic": drawn(bicubic_probability=1.0),
        "mild": drawn(bicubic_probability=0.0, mild_probability=1.0),
        "heavy": drawn(bicubic_probability=0.0),
    }
    mixed = drawn(bicubic_probability=0.3, mild_probability=0.4)
    origins = [
        next(name for name, pure in alone.items() if pure[i] == drawn_one)
        for i, drawn_one in enumerate(mixed)
    ]
    assert 4 <= origins.count("bicubic") <= 20
    assert 8 <= origins.count("mild") <= 24
    assert 4 <= origins.count("heavy") <= 20


def test_nothing_to_train_on_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        open_data(DataConfig(str(tmp_path)), seed=0)
    with pytest.raises(ValueError, match="folder of photographs"):
        open_data(DataConfig(str(tmp_path / "missing")), seed=0)
    with pytest.raises(ValueError, match=r"data\.lq must name"):
        open_data(DataConfig(str(tmp_path), kind="pairs"), seed=0)
