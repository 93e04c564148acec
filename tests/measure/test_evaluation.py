import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr.errors import TADSRError
from tadsr.images import resize_bicubic
from tadsr.measure.evaluation import evaluate_model, evaluate_pairs, make_perceptual_metric
from tadsr.measure.metrics import make_metric, psnr
from tadsr.measure.perceptual import SqueezeNetDistance

SIZE = (64, 48)  # width, height


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    noise = rng.integers(-8, 9, (size[1], size[0], 3))
    return (np.asarray(small.resize(size)) + noise).clip(0, 255).astype(np.uint8)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folders(tmp_path) -> Path:
    """Two originals, their LQ and outputs that are off by 3 and, in one picture, by nothing."""
    for seed, name in enumerate(("a", "sub/b")):
        hq = picture(seed)
        write(tmp_path / f"hq/{name}.png", hq)
        lq = np.asarray(Image.fromarray(hq).resize((16, 12), Image.Resampling.BICUBIC))
        write(tmp_path / f"lq/{name}.png", lq)
        write(tmp_path / f"out/{name}_x4.png", np.where(hq > 252, hq, hq + 3 * (1 - seed)))
    return tmp_path


@pytest.fixture(scope="module")
def metrics():
    return [make_metric(name, border_px=2) for name in ("psnr_y", "detail")]


def test_pairs_are_measured_one_by_one(folders):
    found = evaluate_pairs({"ours": folders / "out"}, folders / "hq")
    assert [metric.name for metric in found.metrics] == [
        *("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "detail")
    ]
    assert [row.name for row in found.rows] == ["HQ", "ours"]
    row = found.row("ours")
    assert list(row.values) == ["a", "sub/b"]
    assert row.values["a"]["psnr_rgb"] == pytest.approx(20 * math.log10(255 / 3), abs=0.1)
    assert found.row("HQ").values["a"].keys() == {"detail"}
    assert found.row("HQ").values["a"]["detail"] == pytest.approx(
        row.values["a"]["detail"], rel=0.01
    )
    assert found.settings["folders"] == {"HQ": "hq", "ours": "out"}


def test_infinite_values_are_left_out_of_the_mean(folders):
    row = evaluate_pairs({"ours": folders / "out"}, folders / "hq").row("ours")
    assert row.values["sub/b"]["psnr_y"] == math.inf
    assert row.num_left_out("psnr_y") == 1
    assert row.mean("psnr_y") == row.values["a"]["psnr_y"]
    same = evaluate_pairs({"same": folders / "hq"}, folders / "hq").row("same")
    assert same.mean("psnr_y") == math.inf
    assert same.mean("ssim_y") == pytest.approx(1)
    assert math.isnan(same.mean("unmeasured"))


def test_without_originals_only_free_metrics_are_measured(folders):
    found = evaluate_pairs({"ours": folders / "out"})
    assert [row.name for row in found.rows] == ["ours"]
    assert found.row("ours").values["a_x4"].keys() == {"detail"}
    with pytest.raises(ValueError, match="must be given for psnr_y, got none"):
        evaluate_pairs({"ours": folders / "out"}, metrics=[make_metric("psnr_y")])


def test_sizes_that_differ_are_both_named(folders):
    write(folders / "out/a_x4.png", picture(0, (60, 48)))
    with pytest.raises(TADSRError, match=r"60×48 px \(.*a_x4\.png\) and 64×48 px"):
        evaluate_pairs({"ours": folders / "out"}, folders / "hq")


def test_images_too_small_to_measure_are_named(folders):
    metrics = [make_metric("psnr_y", border_px=24)]
    with pytest.raises(TADSRError, match=r"a: psnr_y cannot be measured: .*smaller border"):
        evaluate_pairs({"ours": folders / "out"}, folders / "hq", metrics=metrics)


def test_wrong_outputs_and_metrics_are_refused(folders, metrics):
    for names, chosen, message in (
        ((), None, "at least one folder"),
        (("HQ",), None, "must not be named bicubic, HQ, LQ, got 'HQ'"),
        (("ours",), [], r"different ones, at least one, got \[\]"),
        (("ours",), [metrics[0]] * 2, "different ones"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_pairs(dict.fromkeys(names, folders / "out"), folders / "hq", metrics=chosen)


def test_a_model_is_measured_beside_bicubic_and_others(folders, metrics, small_pipeline):
    found = evaluate_model(
        small_pipeline,
        folders / "lq",
        folders / "hq",
        timesteps=[900, 1],
        outputs={"theirs": folders / "out"},
        metrics=metrics,
        process_size=0,
        save=folders / "kept",
    )
    assert [(row.name, row.timestep) for row in found.rows] == [
        ("HQ", None),
        ("bicubic", None),
        ("t=900", 900),
        ("t=1", 1),
        ("theirs", None),
    ]
    hq = np.asarray(Image.open(folders / "hq/sub/b.png"))
    lq = torch.from_numpy(np.array(Image.open(folders / "lq/sub/b.png")))
    lq = lq.permute(2, 0, 1)[None].float() / 255
    results = {
        "bicubic": resize_bicubic(lq, (48, 64)).clamp(0, 1),
        "t=900": small_pipeline(lq, 900, process_size=0),
    }
    for name, tensor in results.items():
        image = (tensor[0] * 255).round().byte().permute(1, 2, 0).numpy()
        kept = np.asarray(Image.open(folders / f"kept/{name}/sub/b.png"))
        np.testing.assert_array_equal(kept, image)
        expected = psnr(image, hq, border_px=2)
        assert found.row(name).values["sub/b"]["psnr_y"] == pytest.approx(expected)
    assert not (folders / "kept/theirs").exists()
    assert found.settings["timesteps"] == [900, 1]
    # The outputs are all but the originals, and so better than bicubic on both pictures.
    assert found.wins(found.row("theirs"), metrics[0]) == 2
    assert found.wins(found.row("theirs"), metrics[1]) is None
    assert found.wins(found.row("bicubic"), metrics[0]) is None


@pytest.mark.parametrize(("lq_size", "size"), [((16, 12), (48, 36)), ((16, 12), (41, 31))])
def test_the_scale_is_that_of_the_sizes(tmp_path, metrics, small_pipeline, lq_size, size):
    write(tmp_path / "hq/a.png", picture(0, size))
    write(tmp_path / "lq/a.png", picture(0, lq_size))
    options = {"timesteps": [5], "metrics": metrics, "process_size": 0, "save": tmp_path / "kept"}
    evaluate_model(small_pipeline, tmp_path / "lq", tmp_path / "hq", **options)
    assert Image.open(tmp_path / "kept/t=5/a.png").size == size


@pytest.mark.parametrize("size", [(48, 48), (15, 12)])
def test_originals_that_are_no_enlargement_are_an_error(tmp_path, metrics, small_pipeline, size):
    write(tmp_path / "hq/a.png", picture(0, size))
    write(tmp_path / "lq/a.png", picture(0, (16, 12)))
    with pytest.raises(TADSRError, match=rf"got 16×12 px .* and {size[0]}×{size[1]} px"):
        evaluate_model(small_pipeline, tmp_path / "lq", tmp_path / "hq", metrics=metrics)


def test_a_model_without_originals_takes_the_given_scale(folders, small_pipeline):
    options = {"timesteps": [1], "scale": 2, "process_size": 0, "save": folders / "kept"}
    found = evaluate_model(small_pipeline, folders / "lq", **options)
    assert [metric.name for metric in found.metrics] == ["detail"]
    assert [row.name for row in found.rows] == ["bicubic", "t=1"]
    assert Image.open(folders / "kept/bicubic/a.png").size == (32, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [1, 1]}, "different numbers"),
        ({"timesteps": [1000]}, "0..999, got 1000"),
        ({"scale": 0.5}, "scale must be"),
        ({"outputs": {"t=1": "x"}}, "like a timestep, got 't=1'"),
    ],
)
def test_wrong_arguments_of_a_model_run(folders, small_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(small_pipeline, folders / "lq", **options)


def test_the_perceptual_metric_is_the_networks_distance(squeezenet):
    metric = make_perceptual_metric(squeezenet)
    found = (metric.name, metric.needs_reference, metric.is_higher_better)
    assert found == ("squeezenet", True, False)
    a, b = picture(0), picture(1)
    pair = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (a, b)]
    expected = SqueezeNetDistance(squeezenet)(*pair)
    assert metric.measure(a, b) == pytest.approx(expected.item(), rel=1e-4)
    assert metric.measure(a, a) == 0
