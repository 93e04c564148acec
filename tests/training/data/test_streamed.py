"""Streams: data sets of parquet and image folders, and WebDataset shards."""

import io
import sys
import tarfile

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tadsr.errors import DataError
from tadsr.training.data import DataConfig, find_photos, open_data
from tadsr.training.data.streamed import shuffle_buffered
from tests.training.conftest import same, take

CROP_PX = 32
NUM_PHOTOS = 8
BROKEN = 3


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The library waits five seconds for its threads whenever a data set ends; ours end often."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def encoded_photos(photos):
    """Eight photographs as files' contents; the fourth is cut off."""
    contents = [path.read_bytes() for path in find_photos(photos)] * 2
    contents[BROKEN] = contents[BROKEN][:200]
    return contents


@pytest.fixture(scope="module")
def parquet(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    rows = {
        "image": [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(encoded_photos(photos))],
        "text": [f"caption {i}" for i in range(NUM_PHOTOS)],
    }
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "part.parquet")
    return DataConfig(
        str(folder), kind="huggingface", caption_column="text", crop_px=CROP_PX,
        shuffle_buffer=4, num_workers=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    contents = encoded_photos(photos)
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for i in range(4 * number, 4 * number + 4):
                members = {f"{i}.png": contents[i], f"{i}.txt": f"caption {i}\n".encode()}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return DataConfig(
        str(folder / "part-{0..1}.tar"), crop_px=CROP_PX, shuffle_buffer=4, num_workers=2
    )


@pytest.fixture(params=["parquet", "shards"])
def config(request):
    return request.getfixturevalue(request.param)


def test_an_epoch_shows_every_photo_and_its_caption(config):
    batches = take(open_data(config, seed=0), NUM_PHOTOS // 2)
    prompts = {p for b in batches for p in b.prompts}
    assert f"caption {BROKEN}" not in prompts
    assert len(prompts) == NUM_PHOTOS - 1
    assert any(f"{BROKEN}" in reason for b in batches for reason in b.skipped)
    for batch in batches:
        assert batch.hq.shape == batch.lq.shape == (2, 3, CROP_PX, CROP_PX)


@pytest.mark.parametrize("folder", [False, True])
def test_shards_are_no_commands(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "pipe:touch executed; cat ://x.tar"
    if folder:  # a file of that name is one
        (tmp_path / command).parent.mkdir(parents=True)
        tarfile.open(tmp_path / command, "w").close()
        with pytest.raises(ValueError, match="No samples"):
            take(open_data(DataConfig(command), seed=0), 1)
    else:
        with pytest.raises(ValueError, match="must name WebDataset shards that exist"):
            open_data(DataConfig(command), seed=0)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("is_inside", [True, False])
def test_rows_name_files_of_their_folder_only(photos, tmp_path, is_inside):
    folder = tmp_path / "rows"
    folder.mkdir()
    path = (folder if is_inside else tmp_path) / "photo.png"
    path.write_bytes(encoded_photos(photos)[0])
    image = {"bytes": None, "path": f"{folder}/../{path.relative_to(tmp_path)}"}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [image] * 3}, features=features)
    rows.to_parquet(folder / "part.parquet")
    data = open_data(
        DataConfig(str(folder), kind="huggingface", crop_px=CROP_PX, num_workers=1), seed=0
    )
    if is_inside:
        assert take(data, 1, batch_size=1)[0].hq.shape == (1, 3, CROP_PX, CROP_PX)
    else:
        with pytest.raises(DataError, match="could not be used"):
            take(data, 1, batch_size=1)


def test_the_order_is_the_seeds_and_differs_between_epochs(config):
    first, again = (take(open_data(config, seed=1), NUM_PHOTOS) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    prompts = [p for b in first for p in b.prompts]
    assert prompts[:NUM_PHOTOS] != prompts[NUM_PHOTOS:]


@pytest.mark.parametrize("place", [{}, {"rank": 1, "num_processes": 2}])
def test_resuming_changes_nothing(place, config):
    unbroken = take(open_data(config, seed=0), 6, **place)
    first = 6 * place.get("num_processes", 1)
    resumed = take(open_data(config, seed=0), 3, first_sample=first, **place)
    assert all(same(a, b) for a, b in zip(unbroken[3:], resumed, strict=True))


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_an_epoch(num_processes, config):
    data = open_data(config, seed=0)
    shares = [
        {photo.caption for photo in data.read(0, rank, num_processes)}
        for rank in range(num_processes)
    ]
    assert sum(map(len, shares)) == NUM_PHOTOS
    assert set.union(*shares) == {f"caption {i}" for i in range(NUM_PHOTOS)}
    batches = [
        take(data, 2, rank=rank, num_processes=num_processes) for rank in range(num_processes)
    ]
    order = [i for step in zip(*batches, strict=True) for b in step for i in b.indices.tolist()]
    assert order == list(range(4 * num_processes))


def test_a_process_opens_its_own_shards_alone(shards):
    data = open_data(shards, seed=0)
    for epoch in range(2):
        opened = [
            {photo.name.split("/")[0] for photo in data.read(epoch, rank, 2)} for rank in (0, 1)
        ]
        assert sorted(opened, key=str) == [{"part-0.tar"}, {"part-1.tar"}]


def test_a_folder_of_images_is_a_data_set(photos):
    config = DataConfig(str(photos), kind="huggingface", crop_px=CROP_PX, prompt="photo")
    data = open_data(config, seed=0)
    assert data.prompts() == ("photo",)
    assert take(data, 1)[0].prompts == ("photo", "photo")


def test_what_is_not_there_is_named(parquet, shards, tmp_path):
    with pytest.raises(ValueError, match="columns image, text, got caption, image"):
        open_data(DataConfig(parquet.source, kind="huggingface", caption_column="caption"), seed=0)
    with pytest.raises(ValueError, match=r"part-2\.tar"):
        open_data(DataConfig(shards.source.replace("1}", "2}")), seed=0)
    with pytest.raises(ValueError, match="must be left out"):
        open_data(DataConfig(shards.source, lq=str(tmp_path)), seed=0)


@pytest.mark.parametrize(("kind", "library"), [("huggingface", "datasets"), ("webdataset",) * 2])
def test_a_missing_library_is_named(kind, library, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(DataError, match=r"tadsr\[data\]"):
        open_data(DataConfig("a.tar", kind=kind), seed=0)


@given(st.lists(st.integers()), st.integers(1, 10), st.integers(0, 5))
def test_shuffling_loses_and_invents_nothing(items, buffer_size, seed):
    shuffled = list(shuffle_buffered(items, buffer_size, np.random.default_rng(seed)))
    assert sorted(shuffled) == sorted(items)
    if buffer_size == 1:
        assert shuffled == items
