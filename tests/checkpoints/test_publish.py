"""Publishing to a hub on this machine."""

from __future__ import annotations

import json

import pytest
import yaml
from safetensors.torch import load

from tadsr import TADSRPipeline
from tadsr.checkpoints.card import model_card
from tadsr.errors import CheckpointError

from .hub_server import RIGHT_TOKEN, Fault


def test_a_model_is_published_in_one_commit_and_loads(hub, pipe):
    told = pipe.push_to_hub("owner/mine", token=RIGHT_TOKEN, private=True, commit_message="First")
    assert told.startswith(f"{hub.address}/owner/mine/commit/")
    assert [commit["summary"] for commit in hub.commits] == ["First"]
    repository = hub.repositories["owner/mine"]
    assert repository.private
    files = repository.files
    assert {"model_index.json", "README.md", "scheduler/scheduler_config.json"} <= files.keys()
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "TADSRPipeline"
    assert index["tadsr_metadata"]["license"] == "apache-2.0"
    for folder in ("vae", "unet", "prompt_embeddings"):
        assert load(files[f"{folder}/diffusion_pytorch_model.safetensors"])
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-to-image"
    assert 'from_pretrained("owner/mine")' in card
    assert "only ['']" in card
    assert TADSRPipeline.from_pretrained("owner/mine", token=RIGHT_TOKEN).unet is not None


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("owner/mine", {"token": "hf_wrong"}, "needs a login"),
        ("owner/readonly", {}, "is not yours to write to"),
        ("owner/mine", {"revision": "missing"}, "has no branch 'missing'"),
        ("no/such/name", {}, "name it 'owner/name'"),
    ],
)
def test_refusals_are_explained(hub, pipe, repo_id, options, message):
    with pytest.raises(CheckpointError, match=message):
        pipe.push_to_hub(repo_id, **{"token": RIGHT_TOKEN, **options})
    assert not hub.commits


@pytest.mark.parametrize("place", ["put", "commit"])
def test_a_failed_upload_publishes_nothing(hub, pipe, place):
    hub.faults = [Fault(place, status=500)]
    with pytest.raises(CheckpointError, match="nothing was published, try again"):
        pipe.push_to_hub("owner/mine", token=RIGHT_TOKEN)
    assert not hub.commits
    hub.close()
    with pytest.raises(CheckpointError, match="nothing was published, try again"):
        pipe.push_to_hub("owner/mine", token=RIGHT_TOKEN)


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
    TADSRPipeline.from_pretrained(native).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["tadsr_metadata"] == {"license": "apache-2.0"}
