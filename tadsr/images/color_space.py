"""Colour spaces that files tell without ICC, as ICC profiles, and sRGB of any profile."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_D50, _D65, _C = (0.3457, 0.3585), (0.3127, 0.3290), (0.310, 0.316)
_SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
# Chromaticities of red, green, blue and white by code point (ITU-T H.273, table 2).
_PRIMARIES = {
    1: _SRGB_PRIMARIES,
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), _C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), _D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), _C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), _D65),
}
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_VIDEO_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
# ICC's parametric curves by code point (table 3): (ax + b)^g from d on, cx below.
_CURVES = {
    **dict.fromkeys((1, 6, 11, 14, 15), _VIDEO_CURVE),
    4: (2.2, 1, 0, 0, 0),
    5: (2.8, 1, 0, 0, 0),
    7: (1 / 0.45, 1 / 1.1115, 0.1115 / 1.1115, 1 / 4, 0.0912),
    8: (1, 1, 0, 0, 0),
    13: _SRGB_CURVE,
}
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions whose white no profile can tell, by code point."""
_UNSPECIFIED = 2
_SEEN_AS_SRGB = (1, 6, 13, 14, 15)
_GAMMA_SLACK, _PRIMARY_SLACK = 0.02, 0.005
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_LEVEL_SLACK = 2


def profile_of_code_points(primaries: int, transfer: int, icc_space: bytes) -> bytes | None:
    """Return the ICC profile of code points; None for sRGB, HDR, and what is not known."""
    primaries = 1 if primaries == _UNSPECIFIED else primaries
    transfer = 13 if transfer == _UNSPECIFIED else transfer
    if primaries not in _PRIMARIES or transfer not in _CURVES:
        return None
    if primaries == 1 and transfer in _SEEN_AS_SRGB:
        return None
    name = f"H.273 primaries {primaries}, transfer {transfer}"
    return _make_profile(name, _PRIMARIES[primaries], _CURVES[transfer], icc_space)


def profile_of_gamma(gamma: Any, chromaticity: Any, icc_space: bytes) -> bytes | None:
    """Return the ICC profile of a PNG's gamma and chromaticities; None for about sRGB's.

    Args:
        gamma: Of the file, such as 0.45455; None if it tells none.
        chromaticity: x and y of white, red, green and blue; None if it tells none.
    """
    primaries, curve = _SRGB_PRIMARIES, _SRGB_CURVE
    try:
        if gamma and abs(1 / gamma - 2.2) > _GAMMA_SLACK:
            curve = (1 / gamma, 1, 0, 0, 0)
        if chromaticity:
            pairs = np.reshape(np.asarray(chromaticity, float), (4, 2))
            if np.abs(pairs - [_D65, *_SRGB_PRIMARIES[:3]]).max() > _PRIMARY_SLACK:
                primaries = (*pairs[1:], pairs[0])
        if primaries is _SRGB_PRIMARIES and curve is _SRGB_CURVE:
            return None
        return _make_profile("PNG gamma and chromaticities", primaries, curve, icc_space)
    except (ValueError, TypeError, ZeroDivisionError, np.linalg.LinAlgError, struct.error):
        return None  # damaged


def to_srgb(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """Turn colours of an ICC profile into sRGB.

    Args:
        pixels: uint8, (H, W, 3).
    """
    is_gray = profile[16:20] == b"GRAY"
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            "L" if is_gray else "RGB",
            "RGB",
        )
    except (ImageCms.PyCMSError, OSError):
        return pixels

    def turned(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values[..., 0].copy() if is_gray else values)
        return np.array(ImageCms.applyTransform(image, transform))

    levels = np.linspace(0, 255, 9).astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = probe[..., :1].repeat(3, -1) if is_gray else probe
    # Of sRGB itself only rounding would change.
    is_srgb = np.abs(turned(probe).astype(int) - probe).max() <= _LEVEL_SLACK
    return pixels if is_srgb else turned(pixels)


def _make_profile(name: str, primaries: Any, curve: tuple[float, ...], icc_space: bytes) -> bytes:
    """Return a matrix profile of ICC version 4, or a grey one."""
    *colors, white = (_xyz(pair) for pair in primaries)
    curves = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(curve)
    text = name.encode("utf-16-be")
    told = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    tags = {b"desc": told, b"cprt": told, b"wtpt": b"XYZ \0\0\0\0" + _fixed(_xyz(_D50))}
    if icc_space == b"GRAY":
        tags[b"kTRC"] = curves
    else:
        base = np.stack(colors, axis=1)
        matrix = _adapted(white) @ (base * np.linalg.solve(base, white))
        for letter, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
            tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(column)
            tags[letter + b"TRC"] = curves
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x04300000, b"mntr", icc_space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(_xyz(_D50))
    return head.ljust(128, b"\0") + table + body


def _xyz(pair: Any) -> np.ndarray:
    x, y = (float(value) for value in pair)
    return np.array([x / y, 1, (1 - x - y) / y])


def _adapted(white: np.ndarray) -> np.ndarray:
    """Return the matrix of Bradford's adaptation to D50."""
    gains = (_BRADFORD @ _xyz(_D50)) / (_BRADFORD @ white)
    return np.linalg.solve(_BRADFORD, gains[:, None] * _BRADFORD)


def _fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)
