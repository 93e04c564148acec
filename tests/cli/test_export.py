from __future__ import annotations

from pathlib import Path


def test_onnx_checks_its_target_before_the_model_is_loaded(tadsr):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    assert "must be new or empty" in tadsr("export", "onnx", "tadsr-tiny", "out", code=1).stderr
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"]


def test_onnx_of_nothing_is_one_readable_error(tadsr):
    result = tadsr("export", "onnx", "no-model", "out", code=1)
    assert result.stderr.startswith("Error: source must name a checkpoint, got 'no-model'")
    assert not Path("out").exists()
