"""Triton kernels against the references in float64, judged by the error of torch's own dtype.

Run interpreted by test_interpreted.py; `pytest -m gpu` runs the same on a GPU.
"""

import pytest
import torch

from tadsr.kernels import (
    adain_color_fix_uint8,
    add_with_statistics,
    geglu,
    group_norm_silu,
    row_moments,
    to_uint8_nhwc,
    wavelet_color_fix_uint8,
)
from tadsr.kernels.group_norm import merge_moments
from tests.crossings import crossed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IN_EVERY_TYPE = ("odd_channels", (3, 7, 84), (7, 11))
"""Cases of which no type is left to the slow run."""
SLOW_CASES = (
    *("one_group", "groups_of_10", "groups_of_20", "groups_of_40", "groups_of_60"),
    *("groups_of_80", "blocked_channels"),
)
"""Cases between those of the quick run."""
# |kernel − truth| ≤ 2·|torch in the same dtype − truth| + margin
MARGIN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
FACTOR = 2
INTERPRETED_BFLOAT16_FACTOR = 4  # the interpreter truncates to bfloat16 where GPUs round

# name: batch, channels, groups, height, width, mean over spread
SHAPES = {
    "minimal": (1, 2, 1, 1, 1, 0),
    "one_position": (2, 16, 4, 1, 1, 0),
    "group_eq_channels": (2, 8, 8, 5, 7, 0),
    "one_group": (1, 24, 1, 9, 5, 0),
    "odd_channels": (2, 21, 7, 13, 11, 0),
    "groups_of_10": (1, 40, 4, 17, 9, 0),
    "groups_of_20": (2, 40, 2, 11, 7, 0),
    "groups_of_30": (1, 60, 2, 13, 9, 0),
    "groups_of_40": (1, 80, 2, 9, 7, 0),
    "groups_of_60": (1, 120, 2, 9, 5, 0),
    "groups_of_80": (1, 160, 2, 9, 5, 0),
    "large_mean": (2, 32, 4, 12, 11, 200),
}
# Groups above 16384 padded elements are split over positions.
SPLIT_SHAPES = {
    "odd_hw": (1, 128, 1, 13, 11, 0),
    "odd_channels": (1, 99, 1, 13, 11, 0),
    "blocked_channels": (1, 192, 2, 13, 11, 0),
    "batch": (2, 40, 1, 19, 15, 0),
    "large_mean": (1, 128, 1, 13, 11, 200),
    # Blocks of channels that hold parts of groups.
    "groups_over_blocks": (1, 192, 1, 11, 9, 3),
}
OPTIONS = {
    "plain": {},
    "no_silu": {"silu": False},
    "biased": {"channel_bias": "shared"},
    "folded": {"weight": "per_sample", "bias": "per_sample", "channel_bias": "per_sample"},
    "no_affine": {"weight": None, "bias": None},
}


def in_types(cases):
    """Cases by types; in others than float16 most of them are slow."""

    def is_slow(case, dtype):
        is_other = dtype != torch.float16 and case not in IN_EVERY_TYPE
        return is_other or case in SLOW_CASES

    return [
        pytest.param(
            *(case, dtype),
            marks=[pytest.mark.slow] * is_slow(case, dtype),
            id=f"{case}-{dtype}",
        )
        for case in cases
        for dtype in DTYPES
    ]


def assert_parity(kernel, torch_result, truth):
    """Hold the kernel to a multiple of the error that torch makes in the same dtype."""
    assert kernel.dtype == torch_result.dtype
    assert kernel.shape == truth.shape
    assert kernel.isfinite().all()
    error = (kernel.double() - truth.double()).abs().max().item()
    allowed = (torch_result.double() - truth.double()).abs().max().item()
    is_truncated = kernel.dtype == torch.bfloat16 and kernel.device.type == "cpu"
    factor = INTERPRETED_BFLOAT16_FACTOR if is_truncated else FACTOR
    assert error <= factor * allowed + MARGIN[kernel.dtype]


def random_activations(shape, dtype, device):
    batch, channels, _, height, width, mean = shape
    x = torch.randn(batch, channels, height, width, device=device) + mean
    return x.to(dtype, memory_format=torch.channels_last)


def random_arguments(shape, options, device):
    """Draw the values per channel that a case asks for."""
    arguments = {"weight": "shared", "bias": "shared"} | options
    rows = {"shared": (shape[1],), "per_sample": (shape[0], shape[1])}
    return {
        name: torch.randn(rows[value], device=device) if value in rows else value
        for name, value in arguments.items()
    }


def widened(arguments):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def check_group_norm(x, num_groups, arguments):
    keywords = {"num_groups": num_groups, "eps": 1e-6} | arguments
    kernel = group_norm_silu(x, backend="triton", **keywords)
    in_dtype = group_norm_silu(x.contiguous(), backend="reference", **keywords)
    truth = group_norm_silu(x.double().contiguous(), backend="reference", **widened(keywords))
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert_parity(kernel, in_dtype, truth)


@pytest.mark.parametrize(("name", "dtype"), in_types(SHAPES))
def test_group_norm_of_small_groups(name, dtype, device):
    shape = SHAPES[name]
    x = random_activations(shape, dtype, device)
    check_group_norm(x, shape[2], random_arguments(shape, {}, device))


@pytest.mark.parametrize(("name", "dtype"), in_types(SPLIT_SHAPES))
def test_group_norm_split_over_positions(name, dtype, device, monkeypatch):
    shape = SPLIT_SHAPES[name]
    if name == "batch":  # as larger activations are, by three launches
        monkeypatch.setattr("tadsr.kernels.gpu.launch.MAX_POSITIONS_ON_USE", 0)
    x = random_activations(shape, dtype, device)
    check_group_norm(x, shape[2], random_arguments(shape, {}, device))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 20, 2, 7, 5, 3), (2, 80, 1, 17, 9, 3)], ids=str)
def test_group_norm_with_its_surroundings(shape, options, device):
    x = random_activations(shape, torch.float16, device)
    check_group_norm(x, shape[2], random_arguments(shape, OPTIONS[options], device))


def test_group_norm_takes_half_precision_affines(device):
    shape = (1, 40, 2, 11, 7, 0)
    arguments = random_arguments(shape, OPTIONS["biased"], device)
    arguments = {k: v.half() for k, v in arguments.items()}
    check_group_norm(random_activations(shape, torch.float16, device), 2, arguments)


def test_group_norm_takes_any_layout(device):
    shape = (2, 20, 2, 7, 5, 0)
    x = random_activations(shape, torch.float16, device).contiguous()
    arguments = random_arguments(shape, {}, device)
    check_group_norm(x, 2, arguments)
    check_group_norm(x[:, :, 1:, ::2], 2, arguments)


@pytest.mark.parametrize(
    ("name", "dtype"), in_types(["minimal", "odd_channels", "groups_of_30", "large_mean"])
)
@pytest.mark.parametrize("is_biased", [False, True])
def test_residual_add_measures_its_sum(name, dtype, is_biased, device):
    shape = SHAPES[name]
    x, residual = (random_activations(shape, dtype, device) for _ in range(2))
    bias = torch.randn(shape[1], device=device) if is_biased else None
    keywords = {"channel_bias": bias, "num_groups": shape[2]}
    total, statistics = add_with_statistics(x, residual, backend="triton", **keywords)
    in_dtype, _ = add_with_statistics(x, residual, backend="reference", **keywords)
    wide = x.double() + residual.double()
    wide = wide if bias is None else wide + bias.double()[:, None, None]
    assert_parity(total, in_dtype, wide)
    assert total.is_contiguous(memory_format=torch.channels_last)
    if statistics.ndim == 4:
        positions = shape[3] * shape[4]
        assert statistics.shape[:2] == (2, shape[0])
        statistics = merge_moments(statistics, shape[2], positions)
    # The statistics are those of what was stored, not of the sum before rounding.
    stored = total.double().contiguous().reshape(shape[0], shape[2], -1)
    variance, mean = torch.var_mean(stored, dim=-1, correction=0)
    torch.testing.assert_close(statistics[..., 0].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics[..., 1].double(), variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["odd_channels", "large_mean"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_moments_of_rows(name, backend, device):
    x = random_activations(SHAPES[name], torch.float16, device)
    found = row_moments(x, backend=backend).double()
    variance, mean = torch.var_mean(x.double(), dim=3, correction=0)
    expected = torch.stack([mean, variance * x.shape[3]]).transpose(2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 20, 2, 7, 5, 3), (2, 80, 1, 17, 9, 3)], ids=str)
@pytest.mark.parametrize("is_merged_on_use", [True, False])
def test_group_norm_from_the_statistics_of_the_residual_add(
    is_merged_on_use, shape, device, monkeypatch
):
    if not is_merged_on_use:  # as of larger activations
        monkeypatch.setattr("tadsr.kernels.gpu.launch.MAX_POSITIONS_ON_USE", 0)
    x, residual = (random_activations(shape, torch.float16, device) for _ in range(2))
    total, statistics = add_with_statistics(x, residual, num_groups=shape[2], backend="triton")
    assert statistics.ndim == (4 if is_merged_on_use else 3)
    arguments = random_arguments(shape, OPTIONS["folded"] | {"channel_bias": None}, device)
    keywords = {"num_groups": shape[2], "eps": 1e-6} | arguments
    kernel = group_norm_silu(total, statistics=statistics, backend="triton", **keywords)
    in_dtype = group_norm_silu(total.contiguous(), backend="reference", **keywords)
    wide = total.double().contiguous()
    truth = group_norm_silu(wide, backend="reference", **widened(keywords))
    assert_parity(kernel, in_dtype, truth)


@pytest.mark.parametrize(
    ("shape", "dtype"), in_types([(1, 2), (3, 7, 84), (2, 5, 640), (1, 33, 258)])
)
def test_geglu(shape, dtype, device):
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    truth = geglu(x.double(), backend="reference")
    assert_parity(geglu(x, backend="triton"), geglu(x, backend="reference"), truth)


def images(height, width, device, batch=2, dtype=torch.float32):
    """Draw two images in about [-1, 1], one beyond it as a decoder's result can be."""
    image = 2.4 * torch.rand(batch, 3, height, width, device=device) - 1.2
    return image.to(dtype), 2 * torch.rand_like(image) - 1


SIZES = [(1, 1), (1, 5), (6, 1), (7, 11)]
COLOR_SIZES = [(1, 1), (1, 5), (2, 1), (3, 7), (1, 520)]


@pytest.mark.parametrize(("size", "dtype"), in_types(SIZES))
def test_bytes_are_the_references_in_every_layout(size, dtype, device):
    image, _ = images(*size, device, dtype=dtype)
    cropped = torch.nn.functional.pad(image, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    for layout in (image, image.contiguous(memory_format=torch.channels_last), cropped):
        result = to_uint8_nhwc(layout, backend="triton")
        torch.testing.assert_close(result, to_uint8_nhwc(image, backend="reference"))


def test_bytes_round_half_up(device):
    steps = (torch.arange(256, device=device) + 0.5) / 127.5 - 1
    image = steps.reshape(1, 1, 16, 16)
    result = to_uint8_nhwc(image, backend="triton")
    torch.testing.assert_close(result, to_uint8_nhwc(image, backend="reference"))


# The last is wider than a block of either kernel. The wavelet's five levels take long to interpret,
# and are shown in both directions below.
@pytest.mark.parametrize(
    ("fix", "size"),
    crossed(
        [
            *((adain_color_fix_uint8, size) for size in COLOR_SIZES),
            *((wavelet_color_fix_uint8, size) for size in ((1, 1), (2, 1), (1, 520))),
        ],
        (adain_color_fix_uint8, wavelet_color_fix_uint8),
        COLOR_SIZES,
    ),
)
def test_color_fixes(fix, size, device):
    batch = 2 if size == (2, 1) else 1
    image, reference = images(*size, device, batch)
    expected = fix(image, reference, backend="reference").int()
    padded = torch.nn.functional.pad(image, (0, 3, 0, 2)).contiguous(
        memory_format=torch.channels_last
    )
    cropped = padded[:, :, : size[0], : size[1]]
    difference = (fix(cropped, reference, backend="triton").int() - expected).abs()
    # Rounding in another order can move a value over the edge between two bytes.
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("levels", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_wavelet_levels(levels, device):
    image, reference = images(3, 5, device, batch=1, dtype=torch.float16)
    expected = wavelet_color_fix_uint8(image, reference, levels, backend="reference").int()
    result = wavelet_color_fix_uint8(image, reference, levels, backend="triton").int()
    assert (result - expected).abs().max() <= 1


def test_registered_operations_keep_their_promises(device):
    x = random_activations((2, 4, 2, 3, 2, 0), torch.float16, device)
    channels = torch.randn(4, device=device)
    image, reference = images(1, 3, device, batch=1)
    calls = {
        "group_norm_silu": (x, 2, channels, None, 1e-6, True, channels, None),
        "add_with_statistics": (x, x.clone(), channels, 2, 1),
        "row_moments": (x,),
        "geglu": (x.contiguous().reshape(-1, 12),),
        "to_uint8_nhwc": (image,),
        "adain_color_fix_uint8": (image, reference),
        "wavelet_color_fix_uint8": (image, reference, 1),
    }
    # The rest concerns the registration, as test_references.py shows it.
    promises = ("test_schema", "test_faketensor")
    for name, arguments in calls.items():
        operation = getattr(torch.ops.tadsr, name).default
        torch.library.opcheck(operation, arguments, test_utils=promises)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    positions, channels = 4096 * 2049, 256  # 2^31 elements and some, 4.3 GB in half precision
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.randn(1, channels, 2049, 4096, dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    assert positions * channels > 2**31
    result = group_norm_silu(x, 32, None, None, 1e-6, silu=False, backend="triton")
    for group in (0, 31):
        part = slice(8 * group, 8 * group + 8)
        values = x[:, part, ::8].double()
        expected = (values - values.mean()) / values.std()
        torch.testing.assert_close(result[:, part, ::8].double(), expected, atol=5e-3, rtol=0)
