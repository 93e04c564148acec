import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling
from huggingface_hub.utils import enable_progress_bars

from tadsr.checkpoints import inspect_checkpoint, load_checkpoint
from tadsr.checkpoints.base import load_base
from tadsr.checkpoints.hub import download, needed_files
from tadsr.checkpoints.hub_files import Snapshot
from tadsr.checkpoints.layout import BASE_MODEL_MIRRORS
from tadsr.cli.reporting import silence_libraries
from tadsr.errors import CheckpointError

from .conftest import repository_of, same_tensors, split_into_shards
from .hub_server import RIGHT_TOKEN, Fault, commit_of

LAYOUT = json.loads((Path(__file__).parents[1] / "data" / "official_layout.json").read_text())
TOKENIZER = [
    f"tokenizer/{name}"
    for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
]
PUBLISHED = [f for f in LAYOUT["files"] if not f.endswith("/")] + TOKENIZER
PUBLISHED += ["README.md", "bert-base-uncased/pytorch_model.bin"]
UNET = "unet/diffusion_pytorch_model.safetensors"
OTHERS = ("vae", "prompt_embeddings")


def test_published_repository_needs_only_the_network():
    assert needed_files(PUBLISHED) == sorted(
        [
            "README.md",
            "scheduler/scheduler_config.json",
            "tadsr.pkl",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "time_vae/config.json",
            "time_vae/diffusion_pytorch_model.bin",
            "unet/config.json",
            UNET,
            *TOKENIZER,
        ]
    )


def test_safetensors_come_before_pickles():
    extra = "time_vae/diffusion_pytorch_model.safetensors"
    needed = needed_files([*PUBLISHED, extra, "text_encoder/pytorch_model.bin"])
    assert extra in needed
    assert not any(f.endswith(".bin") for f in needed)


def native_files(*weights):
    folders = ("vae", "unet", "prompt_embeddings")
    configs = ["model_index.json", "scheduler/scheduler_config.json"]
    return [*configs, *(f"{folder}/config.json" for folder in folders), *weights]


def test_variant_chooses_its_shards():
    stem = "diffusion_pytorch_model"

    def weights(variant):
        shards = [f"unet/{stem}{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        others = [f"{folder}/{stem}{variant}.safetensors" for folder in OTHERS]
        return [f"unet/{stem}.safetensors.index{variant}.json", *shards, *others]

    plain, fp16 = weights(""), weights(".fp16")
    files = native_files(*fp16, *plain, "adapters.safetensors", "vae/other.bin")
    common = {*native_files(), "adapters.safetensors"}
    assert set(needed_files(files, variant="fp16")) == {*fp16, *common}
    assert set(needed_files(files)) == {*plain, *common}


def test_absent_variant_lists_what_exists():
    weights = (f"{f}/diffusion_pytorch_model.fp16.safetensors" for f in ("unet", *OTHERS))
    files = native_files(*weights)
    assert len(needed_files(files)) == 8
    with pytest.raises(CheckpointError, match=r"found diffusion_pytorch_model\.fp16"):
        needed_files(files, variant="bf16")


def test_other_adapter_of_the_repository_is_fetched_instead():
    needed = needed_files([*PUBLISHED, "runs/mine.pkl"], adapter="runs/mine.pkl")
    assert "runs/mine.pkl" in needed
    assert "tadsr.pkl" not in needed


def test_other_repositories_are_refused():
    with pytest.raises(CheckpointError, match="no TADSR checkpoint"):
        needed_files(["README.md", "model.onnx"])


@pytest.fixture
def native(model_dir, tmp_path):
    """A smaller one than elsewhere, as most tests here download it."""
    return shutil.copytree(model_dir, tmp_path / "native")


@pytest.fixture
def repository(native, hub):
    """The same at the hub, as owner/name."""
    hub.repositories["owner/name"] = repository_of(native)
    return hub.repositories["owner/name"]


@pytest.mark.parametrize(
    "request_", [{"repo_id": "owner/other"}, {"repo_id": "owner/name", "revision": "v2"}]
)
def test_uncached_repository_says_what_to_do(repository, tmp_path, monkeypatch, request_):
    download("owner/name", cache_dir=tmp_path / "mine")
    place = {"cache_dir": tmp_path / "mine"}
    load_checkpoint("owner/name", **place, local_files_only=True)
    told = r"must be in the hub's cache .*only the cache may be used.*connect once"
    with pytest.raises(CheckpointError, match=told):
        download(**request_, **place, local_files_only=True)
    # What the environment's HF_HUB_OFFLINE=1 sets when huggingface_hub is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_checkpoint("owner/name", **place)
    with pytest.raises(CheckpointError, match=told):
        download(**request_, **place)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 5000, b""])
def test_a_damaged_reference_means_nothing(repository, content):
    folder = download("owner/name")
    (folder.parents[1] / "refs" / "main").write_bytes(content)
    with pytest.raises(CheckpointError, match="must be in the hub's cache"):
        download("owner/name", local_files_only=True)


@pytest.mark.parametrize("kind", ["native", "official"])
def test_what_was_downloaded_loads_offline(kind, request, hub):
    repository = hub.repositories["owner/name"] = repository_of(request.getfixturevalue(kind))
    online = load_checkpoint("owner/name")
    assert online.source == "owner/name"
    assert not any("DAPE" in path or "samples" in path for _, _, path, _ in hub.requests)
    hub.requests.clear()
    for revision in (None, commit_of(repository)):
        offline = load_checkpoint("owner/name", revision=revision, local_files_only=True)
        assert same_tensors(offline.unet, online.unet)
    assert inspect_checkpoint("owner/name").format == online.format == kind
    assert not hub.requests
    hub.close()
    load_checkpoint("owner/name")


def test_a_part_of_a_repository_is_no_checkpoint_offline(repository, hub):
    folder = download("owner/name")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks unet/config\.json"):
        download("owner/name", local_files_only=True)
    download("owner/name")  # with a connection it is fetched again


@pytest.mark.parametrize("knows_range", [True, False])
def test_a_cut_is_resumed_at_once(repository, hub, knows_range):
    repository.knows_range = knows_range
    hub.faults = [Fault("large", "unet", times=2, cut_after=5000)]
    load_checkpoint("owner/name")
    spans = [h["Range"] for p, _, _, h in hub.requests if p == "large" and "Range" in h]
    assert spans[0] == "bytes=5000-"


def test_what_arrived_is_kept_for_another_call(repository, hub):
    hub.faults = [Fault("large", UNET, times=1, cut_after=5000), Fault("large", UNET, status=503)]
    with pytest.raises(CheckpointError, match=r"status 503.*another call goes on from there"):
        download("owner/name")
    hub.faults.clear()
    hub.requests.clear()
    folder = download("owner/name")
    assert (folder / UNET).read_bytes() == repository.files[UNET]
    spans = [h.get("Range") for part, _, _, h in hub.requests if part == "large"]
    assert "bytes=5000-" in spans
    hub.requests.clear()
    assert download("owner/name") == folder
    assert len(hub.requests) == 1  # the listing


@pytest.mark.parametrize("revision", ["..", "../../..", "/", "a\0b", "a\\..\\b"])
def test_revisions_are_no_paths(revision, hub):
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(CheckpointError, match="a revision must be"):
            download("owner/name", revision=revision, **options)
    assert not hub.requests


def test_a_hash_is_no_path(tmp_path):
    mine = tmp_path / "mine"
    mine.touch()
    large = BlobLfsInfo(size=5, sha256=str(mine), pointer_size=134)
    with pytest.raises(CheckpointError, match="listed with a SHA-256"):
        Snapshot("owner/name", "0" * 40, tmp_path).fetch([RepoSibling("a.pkl", 5, lfs=large)])
    assert mine.exists()


@pytest.mark.parametrize("is_later", [False, True])
def test_what_is_no_beginning_of_a_file_is_fetched_anew(repository, hub, is_later):
    # A proxy's page in place of the file, which the library keeps.
    hub.faults = [Fault("large", UNET, times=10**9 if is_later else 1, status=200)]
    if is_later:
        with pytest.raises(CheckpointError):
            download("owner/name")
        hub.faults.clear()
    assert (download("owner/name") / UNET).read_bytes() == repository.files[UNET]


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("tadsr.pkl", "lacks tadsr.pkl"),
        ("tokenizer/vocab.json", "no prompt can be embedded"),
        ("scheduler/scheduler_config.json", "lacks scheduler/scheduler_config.json"),
        (UNET, "unet/ must contain"),
    ],
)
def test_what_lacks_is_noticed_before_anything_is_fetched(official, adapter_file, hub, lacks, told):
    hub.repositories["owner/name"] = repository_of(official)
    del hub.repositories["owner/name"].files[lacks]
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint("owner/name")
    assert len(hub.requests) == 1
    if lacks == "tadsr.pkl":  # not needed where it is given
        assert load_checkpoint("owner/name", adapter=adapter_file).format == "official"
        assert load_base("owner/name").format == "official"
        assert inspect_checkpoint("owner/name").adapter_file is None
        with pytest.raises(CheckpointError, match=r"lacks other\.pkl"):
            load_checkpoint("owner/name", adapter="other.pkl")


def test_a_missing_shard_is_noticed_before_anything_is_fetched(native, hub):
    split_into_shards(native / UNET, "diffusion_pytorch_model")
    repository = hub.repositories["owner/name"] = repository_of(native)
    load_checkpoint("owner/name")
    del repository.files["unet/diffusion_pytorch_model-00001-of-00002.safetensors"]
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="all shards"):
        load_checkpoint("owner/name")
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("place", "fault", "told"),
    [
        ("info", {"status": 401}, "missing, wrong or expired"),
        ("info", {"status": 403}, "may not be read with this token"),
        ("info", {"status": 429, "headers": {"Retry-After": "0"}}, "asked for too often"),
        ("info", {"status": 500}, "is not served at the moment .status 500."),
        ("file", {"status": 403}, "may not be read with this token"),
        ("large", {"status": 500}, "is not served at the moment .status 500."),
        ("large", {"flipped_byte": 700}, "arrived damaged"),
        ("file", {"flipped_byte": 7}, "arrived damaged"),
    ],
)
def test_failures_are_explained_and_leave_nothing_damaged(repository, hub, place, fault, told):
    match = {"file": "vae/config.json", "large": "unet"}.get(place, "")
    hub.faults = [Fault(place, match, **fault)]
    with pytest.raises(CheckpointError, match=told):
        download("owner/name")
    hub.faults.clear()
    load_checkpoint("owner/name")


@pytest.mark.parametrize("place", ["info", "file", "large"])
@pytest.mark.parametrize("status", [429, 500])
def test_passing_failures_are_tried_again(repository, hub, place, status):
    hub.faults = [Fault(place, times=1, status=status, headers={"Retry-After": "0"})]
    download("owner/name")
    assert hub.faults[0].times == 0


def test_trouble_at_the_hub_falls_back_to_the_cache(repository, hub):
    folder = download("owner/name")
    hub.faults = [Fault("info", status=503)]
    assert download("owner/name") == folder


def test_who_may_read_is_the_hubs_business_and_tokens_stay_there(native, hub):
    hub.repositories["owner/gated"] = repository_of(native, gated=True)
    hub.repositories["owner/private"] = repository_of(native, private=True)
    for name, token, told in [
        ("owner/gated", None, "accept its terms"),
        ("owner/private", None, "does not exist or is private"),
        ("owner/private", "hf_wrong", "missing, wrong or expired"),
        ("owner/absent", RIGHT_TOKEN, "does not exist or is private"),
        ("stabilityai/stable-diffusion-2-1-base", None, " and ".join(BASE_MODEL_MIRRORS)),
    ]:
        with pytest.raises(CheckpointError, match=told) as error:
            download(name, token=token)
        assert ("copies" in str(error.value)) == ("diffusion" in name)
    for name in ("owner/gated", "owner/private"):
        load_checkpoint(name, token=RIGHT_TOKEN)
    elsewhere = [headers for part, _, _, headers in hub.requests if part == "large"]
    assert elsewhere
    assert not any("Authorization" in headers for headers in elsewhere)


def test_a_file_of_another_size_or_kind_in_the_cache_is_fetched_again(repository, hub):
    folder = download("owner/name")
    for name in (UNET, "unet/config.json"):
        (folder / name).resolve().write_bytes(repository.files[name][:-1])
    (folder / "vae/config.json").unlink()
    os.mkfifo(folder / "vae/config.json")
    download("owner/name")
    for name in (UNET, "unet/config.json", "vae/config.json"):
        assert (folder / name).read_bytes() == repository.files[name]


def test_the_doctor_finds_damage_that_leaves_a_files_size(repository, hub):
    from tadsr.doctor.findings import verify_model

    folder = download("owner/name")
    assert verify_model("owner/name").is_right
    weights = folder / UNET
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.resolve().write_bytes(data)
    found = verify_model("owner/name")
    assert found.is_right is False
    assert weights.name in found.detail


def test_too_little_room_is_said_first(repository, hub):
    repository.sizes[UNET] = 10**18
    with pytest.raises(CheckpointError, match=r"must have room for 1000000000\.\d GB.*cache_dir"):
        download("owner/name")
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("size", "siblings", "told"),
    [
        *((size, None, "must be listed with a size in bytes") for size in ("700", [1], -5)),
        *((7, siblings, "listed in a form that cannot be read") for siblings in ("abc", 5, [1])),
    ],
)
def test_a_listing_that_is_none_is_said_to_be_the_fault(repository, hub, size, siblings, told):
    repository.sizes[UNET] = size
    repository.siblings = siblings
    with pytest.raises(CheckpointError, match=told) as caught:
        download("owner/name")
    assert "is kept" not in str(caught.value)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_commands_show_how_far_a_download_is(repository, hub, quiet, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # as on a terminal
    enable_progress_bars()  # which another test's quiet command ends for the process
    try:
        with warnings.catch_warnings():
            silence_libraries(debug=False, quiet=quiet)
            download("owner/name")
    finally:
        enable_progress_bars()
    assert (f"{UNET}: 100%" in capfd.readouterr().err) != quiet
