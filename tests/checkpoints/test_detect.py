import json
from pathlib import Path

import pytest

from tadsr.checkpoints.detect import detect_format, locate
from tadsr.checkpoints.layout import NATIVE, OFFICIAL
from tadsr.errors import CheckpointError


def test_formats_are_told_from_content(native, golden_base):
    assert detect_format(native) is NATIVE
    assert detect_format(golden_base) is OFFICIAL


def test_plain_stable_diffusion_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"unet \(its .* StableDiffusionPipeline\)"):
        detect_format(tmp_path)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        detect_format(tmp_path)


def test_existing_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")


def test_file_as_source_explains_adapter(golden_adapter):
    with pytest.raises(CheckpointError, match="adapter="):
        locate(golden_adapter)


def test_misspelt_embedded_name_is_suggested():
    with pytest.raises(CheckpointError, match="did you mean 'tadsr-tiny'"):
        locate("tadsr-tny")


def test_absent_path_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for an embedded one .*hub id"):
        locate(tmp_path / "absent")
