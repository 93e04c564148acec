import json
import shutil
import time

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from tadsr.checkpoints import Checkpoint, load_checkpoint, save_native
from tadsr.networks.prompt_embeddings import PromptEmbeddings

from .hub_server import HubServer, Repository


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def merged(base_dir, adapter_file):
    return load_checkpoint(base_dir, adapter=adapter_file)


@pytest.fixture(scope="session")
def apart(base_dir, adapter_file):
    return load_checkpoint(base_dir, adapter=adapter_file, merge_adapters=False)


@pytest.fixture
def official(base_dir, adapter_file, tmp_path):
    """A published checkpoint that a test may damage."""
    folder = tmp_path / "official"
    shutil.copytree(base_dir, folder)
    shutil.copy(adapter_file, folder)
    return folder


@pytest.fixture(scope="session")
def native_original(merged, tmp_path_factory):
    """A small native checkpoint with prompt embeddings instead of a text encoder."""
    folder = tmp_path_factory.mktemp("native") / "model"
    checkpoint = Checkpoint(
        vae=merged.vae,
        unet=merged.unet,
        scheduler=merged.scheduler,
        prompt_embeddings=PromptEmbeddings(("", "sharp"), 3, 16),
        metadata={"license": "apache-2.0"},
    )
    return save_native(folder, **checkpoint.components())


@pytest.fixture
def native(native_original, tmp_path):
    """A native checkpoint that a test may damage."""
    folder = tmp_path / "native"
    shutil.copytree(native_original, folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which the library takes for the one, and an empty cache."""
    server = HubServer()
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "DOWNLOAD_CHUNK_SIZE": 5000,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # Versions before 1.0 have it by its own name.
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield server
    server.close()


def repository_of(folder, **options):
    """Return a folder as a repository, with files that loading has no use for."""
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    unwanted = {
        ".gitattributes": b"*.bin filter=lfs",
        "samples/a.png": b"png",
        "DAPE.pth": b"x" * 99,
    }
    return Repository({**unwanted, **files}, **options)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_tensors(left, right):
    """Tell whether two models, or tensors by name, have the same names, dtypes and values."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (left, right))
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def split_into_shards(path, stem):
    """Replace a safetensors file by two shards and their index."""
    tensors = load_file(path)
    names = sorted(tensors)
    variant = path.name.removeprefix(stem).removesuffix(".safetensors")  # "" or ".fp16"
    halves = {
        f"{stem}{variant}-00001-of-00002.safetensors": names[::2],
        f"{stem}{variant}-00002-of-00002.safetensors": names[1::2],
    }
    for shard, part in halves.items():
        save_file({n: tensors[n].clone() for n in part}, path.parent / shard)
    path.unlink()
    index = {"weight_map": {n: shard for shard, part in halves.items() for n in part}}
    (path.parent / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
