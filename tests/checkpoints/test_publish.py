"""Publishing to a hub that answers over HTTP on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load

from tadsr.checkpoints.card import model_card

# A hub of few words: it takes a commit's files within the commit itself.
SERVER = """
import base64, http.server, json, os, sys, threading
out = sys.argv[1]
class Hub(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        token = self.headers.get("Authorization", "")
        if "readonly" in self.path or b"readonly" in body:
            return self.answer(403, {"error": "Forbidden"})
        if token != "Bearer hf_right":
            return self.answer(401, {"error": "Unauthorized"})
        if self.path == "/api/repos/create":
            self.note("create.json", body)
            name = json.loads(body)
            full = f"{name.get('organization') or 'me'}/{name['name']}"
            return self.answer(200, {"url": f"{os.environ['HF_ENDPOINT']}/{full}", "name": full})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/missing" in self.path:
            return self.answer(404, {"error": "no revision"}, "RevisionNotFound")
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            self.note("commit.ndjson", body)
            url = f"{os.environ['HF_ENDPOINT']}/owner/mine/commit/{'a' * 40}"
            return self.answer(200, {"success": True, "commitOid": "a" * 40, "commitUrl": url})
        self.answer(404, {"error": self.path})
    def do_GET(self):
        if "/revision/missing" in self.path:
            return self.answer(404, {"error": "no revision"}, "RevisionNotFound")
        self.answer(200, {"id": "owner/mine", "sha": "b" * 40, "siblings": []})
    do_HEAD = do_GET
    def read_chunks(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data
    def note(self, name, body):
        open(os.path.join(out, name), "wb").write(body)
    def answer(self, code, data, error=None):
        body = json.dumps(data).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
"""
CLIENT = """
from tadsr import TADSRPipeline
from tadsr.errors import CheckpointError
pipe = TADSRPipeline.from_pretrained("tadsr-tiny")
def attempt(name, repo_id, **options):
    try:
        print(name, pipe.push_to_hub(repo_id, **options).replace(os.environ["HF_ENDPOINT"], ""))
    except CheckpointError as error:
        print(name, str(error).replace("\\n", " "))
attempt("published", "owner/mine", token="hf_right", private=True, commit_message="First")
attempt("wrong", "owner/mine", token="hf_wrong")
attempt("forbidden", "owner/readonly", token="hf_right")
attempt("branch", "owner/mine", token="hf_right", revision="missing")
attempt("named", "no/such/name", token="hf_right")
server.shutdown(); server.server_close()
attempt("gone", "owner/mine", token="hf_right")
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What a client was told, and what the hub then has."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVER + CLIENT, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "commit.ndjson").read_text().splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return told, json.loads((folder / "create.json").read_text()), lines[0], files


def test_the_whole_model_is_published_in_one_commit(hub):
    told, created, header, files = hub
    assert told["published"] == f"/owner/mine/commit/{'a' * 40}"
    assert header["value"]["summary"] == "First"
    assert created["name"] == "mine"
    assert {"model_index.json", "README.md", "scheduler/scheduler_config.json"} <= files.keys()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "TADSRPipeline"
    assert index["tadsr_metadata"]["license"] == "apache-2.0"
    for folder in ("vae", "unet", "prompt_embeddings"):
        assert load(files[f"{folder}/diffusion_pytorch_model.safetensors"])


def test_the_card_says_what_it_is(hub):
    card = hub[3]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-to-image"
    assert 'from_pretrained("owner/mine")' in card
    assert "only ['']" in card


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("wrong", "needs a login"),
        ("forbidden", "is not yours to write to"),
        ("branch", "has no branch 'missing'"),
        ("named", "name it 'owner/name'"),
        ("gone", "could not be written"),
    ],
)
def test_refusals_are_explained(hub, attempt, message):
    assert message in hub[0][attempt]


def test_a_licence_that_the_hub_has_no_name_for_is_given_in_words():
    licence = 'published: "non-commercial"; see\ntheir page'
    card = model_card(
        "me/mine", num_parameters={"unet": 2_000_000}, prompts="any", metadata={"license": licence}
    )
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other"
    assert front["license_name"] == licence
    assert "| unet | 2.00 M parameters |" in card


def test_a_licence_that_is_not_known_is_not_made_up():
    card = model_card("me/mine", num_parameters={}, prompts="any", metadata={})
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "not stated" in card


def test_saving_a_pipeline_keeps_its_metadata(native, tmp_path):
    from tadsr import TADSRPipeline

    TADSRPipeline.from_pretrained(native).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["tadsr_metadata"] == {"license": "apache-2.0"}
