import csv
import json
import math
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image

from tadsr.errors import TADSRError
from tadsr.measure.evaluation import Evaluation, Row
from tadsr.measure.metrics import Metric
from tadsr.measure.plot import check_plot, plot
from tadsr.measure.report import format_table, write_csv, write_json


def metric(name: str, needs_reference: bool, is_higher_better: bool | None) -> Metric:
    return Metric(name, lambda *_: 0.0, needs_reference, is_higher_better)


PSNR = metric("psnr_y", True, True)
DETAIL = metric("detail", False, None)
NIQE = metric("niqe", False, False)


def row(name: str, timestep: int | None, a: tuple, b: tuple) -> Row:
    names = ("psnr_y", "detail", "niqe")
    return Row(
        name,
        timestep,
        {
            picture: {n: v for n, v in zip(names, values, strict=True) if v is not None}
            for picture, values in (("a", a), ("sub/b", b))
        },
    )


EVALUATION = Evaluation(
    (PSNR, DETAIL, NIQE),
    (
        row("HQ", None, (None, 9.0, 3.0), (None, 7.0, 4.0)),
        row("bicubic", None, (20.0, 2.0, 6.0), (30.0, 1.0, 6.0)),
        row("t=1", 1, (21.0, 3.0, 5.0), (math.inf, 3.0, 5.0)),
        row("t=900", 900, (19.0, 6.0, 4.0), (29.0, 6.0, 7.0)),
        row("theirs", None, (20.0, 2.5, 6.0), (20.0, 2.5, 6.0)),
    ),
    {"model": "tiny", "timesteps": [1, 900], "version": "1", "num_images": 2},
)


def test_the_table_is_aligned_and_counts_wins():
    assert format_table(EVALUATION).splitlines() == [
        "2 images; mean (images better than bicubic)",
        "         psnr_y ↑     detail  niqe ↓",
        "HQ       –            8.0000  3.5000",
        "bicubic  25.0000      1.5000  6.0000",
        "t=1      21.0000 (2)  3.0000  5.0000 (2)",
        "t=900    24.0000 (0)  6.0000  5.5000 (1)",
        "theirs   20.0000 (0)  2.5000  6.0000 (0)",
        "t=1, psnr_y: 1 infinite (equal images) or undefined value left out of the mean",
    ]


def test_csv_holds_every_value_the_means_and_the_settings(tmp_path):
    write_csv(EVALUATION, tmp_path / "new/figures.csv")
    with open(tmp_path / "new/figures.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 3
    by_key = {(line["method"], line["image"]): line for line in lines}
    assert by_key["t=1", "a"] == {
        **{"method": "t=1", "timestep": "1", "image": "a"},
        **{"psnr_y": "21.0", "detail": "3.0", "niqe": "5.0"},
        **{"model": "tiny", "version": "1", "num_images": "2"},
    }
    assert by_key["t=1", "sub/b"]["psnr_y"] == "inf"
    assert by_key["t=1", "mean"]["psnr_y"] == "21.0"
    assert by_key["HQ", "mean"]["psnr_y"] == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figures.csv"]


def test_json_is_strict_and_says_what_null_means(tmp_path):
    write_json(EVALUATION, tmp_path / "figures.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "figures.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=refuse)
    assert report["settings"] == dict(EVALUATION.settings)
    assert "null stands for an infinite PSNR" in report["note"]
    traits = {"is_higher_better": False, "needs_reference": False, "border_px": 0}
    assert report["metrics"]["niqe"] == traits
    found = {item["name"]: item for item in report["rows"]}
    assert found["t=1"]["images"]["sub/b"] == {"psnr_y": None, "detail": 3.0, "niqe": 5.0}
    assert found["t=1"]["means"]["psnr_y"] == 21.0
    assert found["t=1"]["wins_over_bicubic"] == {"psnr_y": 2, "niqe": 2}
    assert found["HQ"]["means"] == {"detail": 8.0, "niqe": 3.5}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "figures.json"
    target.write_text("old")
    broken = Evaluation(EVALUATION.metrics, EVALUATION.rows, {"bad": object()})
    with pytest.raises(TypeError):
        write_json(broken, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_plot_names_every_method_but_the_originals(tmp_path):
    plot(EVALUATION, tmp_path / "curve.svg")
    svg = (tmp_path / "curve.svg").read_text()
    ElementTree.fromstring(svg)
    texts = {line.strip() for line in svg.splitlines() if line.strip().startswith("<!--")}
    for label in ("bicubic", "t=1", "t=900", "theirs", "tiny", "originals"):
        assert f"<!-- {label} -->" in texts
    assert "<!-- HQ -->" not in texts
    # NIQE has a better direction, which detail has not.
    assert "<!-- niqe (down is better) -->" in texts
    plot(EVALUATION, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    assert len(list(tmp_path.iterdir())) == 2


def test_the_plots_realism_is_the_first_metric_that_has_a_direction():
    assert check_plot([PSNR, DETAIL, NIQE], "a.png") is NIQE
    assert check_plot([PSNR, DETAIL], "a.PDF") is DETAIL


@pytest.mark.parametrize(
    ("metrics", "path", "message"),
    [
        ([PSNR], "a.png", "a metric without reference such as detail, got psnr_y"),
        ([DETAIL], "a.png", "must have psnr_y, which needs originals"),
        ([PSNR, DETAIL], "a.jpg", r"must end in one of \.png \.svg \.pdf, got a\.jpg"),
    ],
)
def test_what_cannot_be_plotted_is_refused(metrics, path, message):
    with pytest.raises(ValueError, match=message):
        check_plot(metrics, path)


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TADSRError, match=r"pip install 'tadsr\[eval\]'"):
        check_plot([PSNR, DETAIL], "a.png")
