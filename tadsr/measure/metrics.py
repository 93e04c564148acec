"""Image quality in figures: fidelity to an original, and how real a picture looks by itself.

The pixel metrics take uint8 arrays (H, W, 3) and are computed by scikit-image (extra `eval`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np

from tadsr.errors import TADSRError, import_extra

Channel = Literal["y", "rgb"]
"""BT.601 luma in [16, 235], as super-resolution papers measure it, or all three colours."""

OWN_METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "detail")
"""What is measured without any network."""

_LUMA_BT601 = np.array([65.481, 128.553, 24.966])
_LUMA_OFFSET = 16.0
_PEAK = 255
_SSIM_WINDOW_PX = 11
_PYIQA_EXAMPLES = "lpips, dists, musiq, clipiqa, maniqa, topiq_nr, niqe, qalign"


@dataclass(frozen=True)
class Metric:
    """A figure of an image: how it is computed and read."""

    name: str
    """What tables, files and the command line call it."""
    measure: Callable[[np.ndarray, np.ndarray | None], float]
    """Measures uint8 (H, W, 3) against an original of that shape, or None without one."""
    needs_reference: bool
    """Whether it compares with an original."""
    is_higher_better: bool | None
    """Which direction is better; None for a figure that is best near the original's own."""
    border_px: int = 0
    """Width of the rim that it leaves out."""

    def is_better(self, value: float, other: float) -> bool:
        """Tell whether `value` is strictly better than `other`; False if there is no better."""
        if self.is_higher_better is None:
            return False
        return value > other if self.is_higher_better else value < other


def luma(image: np.ndarray) -> np.ndarray:
    """Return the BT.601 luma of an image.

    Args:
        image: uint8, (H, W, 3).

    Returns:
        float64, (H, W), in [16, 235].

    Source: ITU-R BT.601, studio range.
    """
    return image.astype(np.float64) / _PEAK @ _LUMA_BT601 + _LUMA_OFFSET


def psnr(
    image: np.ndarray, reference: np.ndarray, *, channel: Channel = "y", border_px: int = 0
) -> float:
    """Return the peak signal-to-noise ratio.

    Args:
        image: uint8, (H, W, 3).
        reference: The original, uint8, shaped as `image`.
        channel: What is compared.
        border_px: Width of the rim that is left out.

    Returns:
        In dB, with a peak of 255; infinity for equal images.

    Raises:
        TypeError: An image is not a uint8 array.
        ValueError: Shapes differ, nothing is left inside the border, or the channel is unknown.
        TADSRError: scikit-image is not installed.
    """
    a, b = _prepare_pair(image, reference, channel, border_px, min_side_px=1)
    with np.errstate(divide="ignore"):
        return float(_skimage().peak_signal_noise_ratio(b, a, data_range=_PEAK))


def ssim(
    image: np.ndarray, reference: np.ndarray, *, channel: Channel = "y", border_px: int = 0
) -> float:
    """Return the structural similarity, with the paper's Gaussian window.

    Args:
        image: uint8, (H, W, 3).
        reference: The original, uint8, shaped as `image`.
        channel: What is compared; "rgb" is the mean over the colours.
        border_px: Width of the rim that is left out.

    Returns:
        At most 1, which equal images have.

    Raises:
        TypeError: An image is not a uint8 array.
        ValueError: Shapes differ, less than 11 px are left inside the border, or the channel is
            unknown.
        TADSRError: scikit-image is not installed.

    Source: Wang et al., Image quality assessment (IEEE TIP 2004), σ = 1.5.
    """
    a, b = _prepare_pair(image, reference, channel, border_px, min_side_px=_SSIM_WINDOW_PX)
    return float(
        _skimage().structural_similarity(
            a,
            b,
            data_range=_PEAK,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=None if channel == "y" else 2,
        )
    )


def detail(image: np.ndarray, *, border_px: int = 0) -> float:
    """Return how much fine structure there is, be it texture or noise.

    Args:
        image: uint8, (H, W, 3).
        border_px: Width of the rim that is left out.

    Returns:
        Mean magnitude of the luma's 4-neighbour Laplacian, on the 8-bit scale; 0 if flat.

    Raises:
        TypeError: The image is not a uint8 array.
        ValueError: The shape is wrong, or less than 3 px are left inside the border.
    """
    y = luma(_crop(image, border_px, min_side_px=3))
    inner = y[1:-1, 1:-1]
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * inner
    return float(np.abs(laplacian).mean())


def default_metrics(has_reference: bool) -> tuple[str, ...]:
    """Return the names of the metrics that need no network."""
    return OWN_METRICS if has_reference else ("detail",)


def make_metric(name: str, *, border_px: int = 4, device: Any = "cpu") -> Metric:
    """Build a metric by name.

    Args:
        name: "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "detail", or any name that
            `pyiqa.list_models()` gives, such as "lpips" or "musiq".
        border_px: Rim left out by our own metrics; those of pyiqa see the whole image.
        device: Where pyiqa's networks run.

    Returns:
        The metric.

    Raises:
        TypeError: `border_px` is not an int.
        ValueError: The name is not known, or `border_px` is below 0.
        TADSRError: It is a name for pyiqa, which is not installed or fails to build it.

    Source: pyiqa (github.com/chaofengc/IQA-PyTorch).
    """
    _check_border(border_px)
    if name == "detail":
        return Metric(
            name, lambda image, _: detail(image, border_px=border_px), False, None, border_px
        )
    if name in OWN_METRICS:
        function, channel = name.split("_")
        measure = {"psnr": psnr, "ssim": ssim}[function]
        _skimage()  # says what is missing before long computations
        measure = partial(measure, channel=channel, border_px=border_px)
        return Metric(name, measure, True, True, border_px)
    return _make_pyiqa_metric(name, device)


def _make_pyiqa_metric(name: str, device: Any) -> Metric:
    import torch

    from tadsr.measure.pictures import to_unit

    try:
        pyiqa = importlib.import_module("pyiqa")
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        close = get_close_matches(name, OWN_METRICS, n=1)
        hint = f"did you mean {close[0]!r}? Otherwise " if close else ""
        raise TADSRError(
            f"a metric must be one of {', '.join(OWN_METRICS)} or of the library pyiqa "
            f"({_PYIQA_EXAMPLES}), got {name!r}, and pyiqa does not import ({error}); "
            f"{hint}install it with pip install pyiqa"
        ) from error
    known = pyiqa.list_models()
    if name not in known:
        close = get_close_matches(name, (*OWN_METRICS, *known), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"try {_PYIQA_EXAMPLES}"
        raise ValueError(
            f"a metric must be one of {', '.join(OWN_METRICS)} or of pyiqa.list_models(), "
            f"got {name!r}; {hint}"
        )
    try:
        network = pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:  # networks are downloaded, and fail in as many ways
        raise TADSRError(f"pyiqa cannot build the metric {name!r}: {error}") from error
    needs_reference = network.metric_mode == "FR"

    def measure(image: np.ndarray, reference: np.ndarray | None) -> float:
        images = (image, reference) if needs_reference else (image,)
        with torch.no_grad():
            return float(network(*(to_unit(x).to(device) for x in images)).mean())

    return Metric(name, measure, needs_reference, not network.lower_better)


def _skimage() -> ModuleType:
    return import_extra("skimage.metrics", "PSNR and SSIM need scikit-image", "eval")


def _prepare_pair(
    image: np.ndarray, reference: np.ndarray, channel: Channel, border_px: int, min_side_px: int
) -> tuple[np.ndarray, np.ndarray]:
    if channel not in get_args(Channel):
        raise ValueError(f"channel must be 'y' or 'rgb', got {channel!r}")
    pair = [_crop(x, border_px, min_side_px) for x in (image, reference)]
    if image.shape != reference.shape:
        raise ValueError(
            "image and reference must have one size, got "
            f"{describe_size(image)} and {describe_size(reference)}"
        )
    return tuple(map(luma, pair)) if channel == "y" else tuple(pair)


def _crop(image: np.ndarray, border_px: int, min_side_px: int) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image to measure must be a uint8 array, got {found}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image to measure must have the shape (H, W, 3), got {image.shape}")
    _check_border(border_px)
    if min(image.shape[:2]) < min_side_px + 2 * border_px:
        raise ValueError(
            f"an image to measure must have {min_side_px} px a side inside a border of "
            f"{border_px} px, got {describe_size(image)}; use a smaller border or larger images"
        )
    height, width = image.shape[:2]
    return image[border_px : height - border_px, border_px : width - border_px]


def _check_border(border_px: int) -> None:
    if isinstance(border_px, bool) or not isinstance(border_px, int):
        raise TypeError(f"border_px must be a whole number of px, got {border_px!r}")
    if border_px < 0:
        raise ValueError(f"border_px must be at least 0 px, got {border_px}")


def describe_size(image: np.ndarray) -> str:
    """Return the size of an array (H, W, ...) as people read it: width × height in px."""
    return f"{image.shape[1]}×{image.shape[0]} px"
