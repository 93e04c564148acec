"""Measure folders of results, or a model at several timesteps, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tadsr.config import ColorFix, UpscaleSettings
from tadsr.errors import TADSRError
from tadsr.images import resize_bicubic, to_uint8, write_image
from tadsr.measure.metrics import Metric, default_metrics, describe_size, make_metric
from tadsr.measure.pairing import match_images
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.measure.pictures import read_rgb8, to_unit
from tadsr.restorer import Restorer
from tadsr.version import __version__

BASELINE = "bicubic"
HQ, LQ = "HQ", "LQ"
RESERVED_NAMES = (BASELINE, HQ, LQ)
"""Names that outputs may not have, for rows and folders have them already."""


@dataclass(frozen=True)
class Row:
    """The figures of one method."""

    name: str
    """"bicubic", "t=500", "HQ" for the originals, or what the caller named the outputs."""
    timestep: int | None
    """Of the model's own rows."""
    values: Mapping[str, Mapping[str, float]]
    """Picture → metric → value; the originals have no metrics that compare with themselves."""

    def mean(self, metric: str) -> float:
        """Return a metric's mean over the finite values; infinity if all are, NaN if none is."""
        found = [values[metric] for values in self.values.values() if metric in values]
        finite = [value for value in found if math.isfinite(value)]
        if finite or not found:
            return float(np.mean(finite)) if finite else math.nan
        return math.inf if math.inf in found else math.nan

    def num_left_out(self, metric: str) -> int:
        """Count the values that are infinite (equal images) or NaN and so not in the mean."""
        found = (values.get(metric, 0.0) for values in self.values.values())
        return sum(not math.isfinite(value) for value in found)


@dataclass(frozen=True)
class Evaluation:
    """Figures of several methods on the same pictures."""

    metrics: tuple[Metric, ...]
    """What was measured, in the order of the columns."""
    rows: tuple[Row, ...]
    """The methods: originals and bicubic where there are such, timesteps, other outputs."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was made, as plain values; folders by their names only."""

    def row(self, name: str) -> Row | None:
        """Return the row of a name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def wins(self, row: Row, metric: Metric) -> int | None:
        """Count the pictures on which a row is better than bicubic; None if that says nothing."""
        baseline = self.row(BASELINE)
        is_comparable = baseline is not None and row.name not in (BASELINE, HQ)
        if not is_comparable or metric.is_higher_better is None:
            return None
        name = metric.name
        return sum(
            metric.is_better(values[name], baseline.values[picture][name])
            for picture, values in row.values.items()
        )


def make_perceptual_metric(weights: str | Path, *, device: Any = "cpu") -> Metric:
    """Build the metric "squeezenet" from a network's file.

    Args:
        weights: As for `tadsr.measure.perceptual.SqueezeNetDistance`.
        device: Where the network runs.

    Returns:
        A metric that compares whole images; small is better.

    Raises:
        CheckpointError: The file is missing or is not such a network.
    """
    distance = SqueezeNetDistance(weights).to(device)

    def measure(image: np.ndarray, reference: np.ndarray | None) -> float:
        pair = (to_unit(x).to(device) * 2 - 1 for x in (image, reference))
        return float(distance(*pair))

    return Metric("squeezenet", measure, needs_reference=True, is_higher_better=False)


def evaluate_pairs(
    outputs: Mapping[str, str | Path],
    hq: str | Path | None = None,
    *,
    metrics: Sequence[Metric] | None = None,
    allow_missing: bool = False,
    strip_suffix: str = "",
    show_progress: bool = False,
) -> Evaluation:
    """Measure folders of results.

    Args:
        outputs: Method → folder of its results, matched by `match_images`.
        hq: Folder of the originals; None to measure without.
        metrics: From `make_metric` and `make_perceptual_metric`; None for PSNR and SSIM (with
            `hq`) and detail, inside a border of 4 px.
        allow_missing: Whether pictures that a folder lacks are left out of all rows.
        strip_suffix: What names end with in some folders; see `match_images`.
        show_progress: Whether a bar is shown on a terminal.

    Returns:
        A row of the originals, if a metric measures them by themselves, and one per method.

    Raises:
        ValueError: No outputs, a reserved name, or a metric that needs the originals without them.
        TADSRError: Folders do not match, or sizes differ.
    """
    if not outputs:
        raise ValueError("outputs must name at least one folder of results, got none")
    metrics = _check_metrics(metrics, hq is not None)
    folders = _name_folders(hq, None, outputs)
    methods = [_Method(name, partial(_read_output, name)) for name in outputs]
    pictures = match_images(folders, allow_missing=allow_missing, strip_suffix=strip_suffix)
    settings = _describe_settings(folders, metrics)
    return _evaluate(pictures, methods, metrics, settings, show_progress=show_progress)


def evaluate_model(
    pipe: Restorer,
    lq: str | Path,
    hq: str | Path | None = None,
    *,
    timesteps: Sequence[int] = (1, 500, 900),
    outputs: Mapping[str, str | Path] | None = None,
    metrics: Sequence[Metric] | None = None,
    scale: float = 4,
    prompt: str = "",
    color_fix: ColorFix = "adain",
    process_size: int | None = None,
    save: str | Path | None = None,
    model_name: str = "",
    allow_missing: bool = False,
    strip_suffix: str = "",
    show_progress: bool = False,
) -> Evaluation:
    """Run a model on a folder at several timesteps and measure what comes out.

    What is not listed here is as for `evaluate_pairs` and `TADSRPipeline`.

    Args:
        pipe: The model, on its device.
        lq: Folder of LQ images.
        hq: Folder of the originals, matched by `match_images`; None to measure without.
        timesteps: 0..999 each.
        outputs: Other methods' results for the same pictures: method → folder.
        scale: Output size over input size where there is no `hq`, whose sizes say it otherwise.
        save: Folder for the results, one folder inside it per row; existing files are replaced.
        model_name: What the settings call the model.

    Returns:
        A row of the originals, if a metric measures them by themselves, one of bicubic, one per
        timestep and one per method of `outputs`.

    Raises:
        ValueError: No or twice the same timestep, an argument out of range, a reserved name, or a
            metric that needs the originals without them.
        TADSRError: Folders do not match, or sizes differ.
    """
    timesteps = pipe.check_timesteps(timesteps, len(timesteps)).tolist()
    if not timesteps or len(set(timesteps)) < len(timesteps):
        raise ValueError(f"timesteps must be different numbers, at least one, got {timesteps}")
    upscaling = UpscaleSettings(scale, color_fix, process_size).of_model(pipe.default_process_size)
    pipe.encode_prompt([prompt])
    metrics = _check_metrics(metrics, hq is not None)
    outputs = dict(outputs or {})
    names = {t: f"t={t}" for t in timesteps}
    if clash := outputs.keys() & set(names.values()):
        raise ValueError(f"outputs must not be named like a timestep, got {min(clash)!r}")
    folders = _name_folders(hq, lq, outputs)
    place = None if save is None else Path(save)

    def restore(timestep: int, sample: _Sample) -> np.ndarray:
        fitting = replace(upscaling, scale=sample.scale)
        return to_uint8(pipe(sample.lq, timestep, settings=fitting, prompt=prompt)[0])

    own = [_Method(BASELINE, _enlarge)]
    own += [_Method(names[t], partial(restore, t), t) for t in timesteps]
    methods = [_Method(m.name, _saving(m, place), m.timestep) for m in own] if place else own
    methods += [_Method(name, partial(_read_output, name)) for name in outputs]
    settings = {
        "model": model_name,
        "timesteps": timesteps,
        "prompt": prompt,
        "color_fix": color_fix,
        "process_size_px": upscaling.process_size,
        "device": pipe.device.type,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        **_describe_settings(folders, metrics),
    }
    pictures = match_images(folders, allow_missing=allow_missing, strip_suffix=strip_suffix)
    return _evaluate(pictures, methods, metrics, settings, scale=scale, show_progress=show_progress)


@dataclass(frozen=True)
class _Sample:
    """One picture in all its versions, each read when it is first asked for."""

    key: str
    paths: Mapping[str, Path]
    default_scale: float

    @cached_property
    def hq(self) -> np.ndarray | None:
        return read_rgb8(self.paths[HQ]) if HQ in self.paths else None

    @cached_property
    def lq(self) -> Tensor:
        return to_unit(read_rgb8(self.paths[LQ]))

    @cached_property
    def scale(self) -> float:
        """The scale that turns the LQ's size into exactly the HQ's."""
        if self.hq is None:
            return self.default_scale
        height, width = self.lq.shape[-2:]
        ratios = self.hq.shape[0] / height, self.hq.shape[1] / width
        for scale in (round(ratios[0]), *ratios):
            if (
                scale >= 1
                and UpscaleSettings(scale).output_size(height, width) == (self.hq.shape[:2])
            ):
                return scale
        raise TADSRError(
            f"the original must be larger than its LQ by one scale on both sides, got "
            f"{width}×{height} px ({self.paths[LQ]}) and {describe_size(self.hq)} "
            f"({self.paths[HQ]}); crop one of them"
        )


@dataclass(frozen=True)
class _Method:
    name: str
    produce: Callable[[_Sample], np.ndarray]
    timestep: int | None = None


def _evaluate(
    pictures: Mapping[str, Mapping[str, Path]],
    methods: Sequence[_Method],
    metrics: tuple[Metric, ...],
    settings: Mapping[str, Any],
    *,
    scale: float = 1.0,
    show_progress: bool,
) -> Evaluation:
    if HQ in next(iter(pictures.values())) and not all(
        metric.needs_reference for metric in metrics
    ):
        methods = [_Method(HQ, lambda sample: sample.hq), *methods]
    values: dict[str, dict[str, dict[str, float]]] = {method.name: {} for method in methods}
    # None: a bar on a terminal only.
    with tqdm(pictures.items(), unit="image", disable=None if show_progress else True) as bar:
        for key, paths in bar:
            sample = _Sample(key, paths, scale)
            for method in methods:
                bar.set_postfix_str(f"{key} {method.name}")
                image = method.produce(sample)
                values[method.name][key] = {
                    metric.name: _measure(metric, image, sample)
                    for metric in metrics
                    if method.name != HQ or not metric.needs_reference
                }
    rows = tuple(Row(m.name, m.timestep, values[m.name]) for m in methods)
    return Evaluation(metrics, rows, {**settings, "num_images": len(pictures)})


def _measure(metric: Metric, image: np.ndarray, sample: _Sample) -> float:
    try:
        return metric.measure(image, sample.hq)
    except (ValueError, RuntimeError) as error:
        raise TADSRError(f"{sample.key}: {metric.name} cannot be measured: {error}") from error


def _check_metrics(metrics: Sequence[Metric] | None, has_hq: bool) -> tuple[Metric, ...]:
    if metrics is None:
        return tuple(map(make_metric, default_metrics(has_hq)))
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics must be different ones, at least one, got {names}")
    lacking = [metric.name for metric in metrics if metric.needs_reference and not has_hq]
    if lacking:
        raise ValueError(
            f"a folder of originals (hq) must be given for {', '.join(lacking)}, got none; "
            "without it choose metrics that need no reference, such as detail"
        )
    return tuple(metrics)


def _name_folders(
    hq: str | Path | None, lq: str | Path | None, outputs: Mapping[str, str | Path]
) -> dict[str, Path]:
    for name in outputs:
        if name in RESERVED_NAMES:
            raise ValueError(
                f"outputs must not be named {', '.join(RESERVED_NAMES)}, got {name!r}; choose "
                "another name"
            )
    named = {HQ: hq, LQ: lq, **outputs}
    return {name: Path(folder) for name, folder in named.items() if folder is not None}


def _describe_settings(folders: Mapping[str, Path], metrics: Sequence[Metric]) -> dict[str, Any]:
    # Where the folders lie is of no use to a reader.
    names = {name: folder.resolve().name for name, folder in folders.items()}
    border_px = max(metric.border_px for metric in metrics)
    return {"folders": names, "border_px": border_px, "version": __version__}


def _read_output(name: str, sample: _Sample) -> np.ndarray:
    path = sample.paths[name]
    image = read_rgb8(path)
    if sample.hq is not None and image.shape != sample.hq.shape:
        raise TADSRError(
            f"an output must have its original's size, got {describe_size(image)} ({path}) and "
            f"{describe_size(sample.hq)} ({sample.paths[HQ]}); crop or resize one of them"
        )
    return image


def _enlarge(sample: _Sample) -> np.ndarray:
    size = UpscaleSettings(sample.scale).output_size(*sample.lq.shape[-2:])
    return to_uint8(resize_bicubic(sample.lq, size)[0])


def _saving(method: _Method, folder: Path) -> Callable[[_Sample], np.ndarray]:
    def produce(sample: _Sample) -> np.ndarray:
        image = method.produce(sample)
        path = folder / method.name / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(Image.fromarray(image), path)
        return image

    return produce
