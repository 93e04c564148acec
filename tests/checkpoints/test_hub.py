import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from tadsr.checkpoints import load_checkpoint
from tadsr.checkpoints.hub import download, needed_files
from tadsr.checkpoints.layout import BASE_MODEL_MIRRORS
from tadsr.errors import CheckpointError

LAYOUT = json.loads((Path(__file__).parents[1] / "data" / "official_layout.json").read_text())
TOKENIZER = [
    f"tokenizer/{name}"
    for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
]
PUBLISHED = (
    [f for f in LAYOUT["files"] if not f.endswith("/")]
    + TOKENIZER
    + [
        "README.md",
        "bert-base-uncased/pytorch_model.bin",
    ]
)


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
            "unet/diffusion_pytorch_model.safetensors",
            *TOKENIZER,
        ]
    )


def test_safetensors_come_before_pickles():
    extra = "time_vae/diffusion_pytorch_model.safetensors"
    needed = needed_files([*PUBLISHED, extra, "text_encoder/pytorch_model.bin"])
    assert extra in needed
    assert not any(f.endswith(".bin") for f in needed)


def native_files(*weights):
    return [
        "model_index.json",
        "vae/config.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        *weights,
    ]


def test_variant_chooses_its_shards():
    stem = "unet/diffusion_pytorch_model"
    fp16 = [
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16-00001-of-00002.safetensors",
        f"{stem}.fp16-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    plain = [
        f"{stem}.safetensors.index.json",
        f"{stem}-00001-of-00002.safetensors",
        f"{stem}-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    files = native_files(*fp16, *plain, "adapters.safetensors", "vae/other.bin")
    common = {*native_files(), "adapters.safetensors"}
    assert set(needed_files(files, variant="fp16")) == {*fp16, *common}
    assert set(needed_files(files)) == {*plain, *common}


def test_absent_variant_lists_what_exists():
    files = native_files(
        *(f"{f}/diffusion_pytorch_model.fp16.safetensors" for f in ("vae", "unet"))
    )
    assert len(needed_files(files)) == 6
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
def cache(native, tmp_path):
    """A hub cache as huggingface_hub lays it out, with one repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    native.rename(repo / "snapshots" / commit)
    return tmp_path / "cache"


def test_cached_repository_loads_without_network(cache):
    loaded = load_checkpoint("owner/name", cache_dir=cache, local_files_only=True)
    assert loaded.source == "owner/name"
    assert loaded.format == "native"


@pytest.mark.parametrize(
    "request_", [{"repo_id": "owner/other"}, {"repo_id": "owner/name", "revision": "v2"}]
)
def test_uncached_repository_says_what_to_do(cache, request_):
    with pytest.raises(CheckpointError, match=r"must be in the hub's cache .*connect once"):
        download(**request_, cache_dir=cache, local_files_only=True)


SERVER = """
import http.server, threading
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if "partial" in self.path:
            body = b'{"id": "owner/partial", "siblings": [{"rfilename": "a.pth"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        code = "GatedRepo" if "gated" in self.path else "RepoNotFound"
        self.send_response(403 if "gated" in self.path else 401)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
"""
CLIENT = """
import os, sys
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
from tadsr.checkpoints.hub import download
from tadsr.errors import CheckpointError
try:
    download("owner/partial", names=["a.pth", "b.txt"], cache_dir=sys.argv[1])
except CheckpointError as error:
    print("owner/partial", error)
for repo in ("owner/absent", "stabilityai/stable-diffusion-2-1-base", "owner/gated", "owner/name"):
    try:
        print(repo, download(repo, cache_dir=sys.argv[1]))
    except CheckpointError as error:
        print(repo, error)
    if repo == "owner/gated":
        server.shutdown(); server.server_close()
"""


def run_client(cache):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SERVER + CLIENT, str(cache)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_answers_of_the_hub_are_explained_and_silence_falls_back_to_the_cache(cache):
    answers = run_client(cache)
    assert "but lacks b.txt" in answers["owner/partial"]
    assert "does not exist or is private" in answers["owner/absent"]
    moved = answers["stabilityai/stable-diffusion-2-1-base"]
    assert moved.endswith(
        f"copies of Stable Diffusion 2.1-base are {' and '.join(BASE_MODEL_MIRRORS)}"
    )
    assert "copies" not in answers["owner/absent"]
    assert "accept its terms" in answers["owner/gated"]
    assert answers["owner/name"].startswith(str(cache))


def test_offline_mode_uses_the_cache_only(cache, monkeypatch):
    # What the environment's HF_HUB_OFFLINE=1 sets when huggingface_hub is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("owner/name", cache_dir=cache).parent.name == "snapshots"
    with pytest.raises(CheckpointError, match="only the cache may be used"):
        download("owner/absent", cache_dir=cache)
