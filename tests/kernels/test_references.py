"""The references are what the library and diffusers compute, and calls go where they should."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given
from hypothesis import strategies as st

from tadsr import color
from tadsr.kernels import (
    adain_color_fix_uint8,
    add_with_statistics,
    geglu,
    group_norm_silu,
    to_uint8_nhwc,
    wavelet_color_fix_uint8,
)
from tadsr.kernels.backends import unsupported_reasons
from tadsr.kernels.group_norm import merge_moments, reference_moments, reference_statistics


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("conditioning", ["default", "scale_shift"])
@torch.no_grad()
def test_a_resnet_block_is_made_of_these_operations(conditioning):
    block = ResnetBlock2D(
        in_channels=32, groups=8, temb_channels=16, time_embedding_norm=conditioning
    )
    x, temb = torch.randn(2, 32, 6, 5), torch.randn(2, 16)
    time = block.time_emb_proj(F.silu(temb))
    norm1, norm2 = block.norm1, block.norm2
    affine, bias1 = (norm2.weight, norm2.bias), block.conv1.bias
    if conditioning == "scale_shift":
        scale, shift = time.chunk(2, dim=1)
        affine = norm2.weight * (1 + scale), norm2.bias * (1 + scale) + shift
    else:
        bias1 = bias1 + time
    h = group_norm_silu(x, 8, norm1.weight, norm1.bias, norm1.eps)
    h = F.conv2d(h, block.conv1.weight, padding=1)
    h = group_norm_silu(h, 8, *affine, norm2.eps, channel_bias=bias1)
    h = F.conv2d(h, block.conv2.weight, padding=1)
    h, _ = add_with_statistics(h, x, channel_bias=block.conv2.bias, num_groups=8)
    torch.testing.assert_close(h, block(x, temb), atol=1e-5, rtol=1e-5)


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)
)
def test_statistics_of_the_residual_add_are_the_group_norms(batch, groups, size, height, width):
    x, residual = torch.randn(2, batch, groups * size, height, width).unbind()
    bias = torch.randn(groups * size)
    total, statistics = add_with_statistics(x, residual, channel_bias=bias, num_groups=groups)
    torch.testing.assert_close(total, x + bias[:, None, None] + residual)
    result = group_norm_silu(total, groups, None, None, 1e-3, statistics=statistics)
    values = total.reshape(batch, groups, -1)
    variance, mean = torch.var_mean(values, dim=-1, correction=0, keepdim=True)
    expected = F.silu(((values - mean) / (variance + 1e-3).sqrt()).reshape_as(total))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7))
def test_moments_of_chunks_merge_to_the_groups(batch, groups, height, num_chunks):
    x = 50 + torch.randn(batch, 2 * groups, height, 5)
    chunk = -(-5 * height // num_chunks)
    moments = reference_moments(x, -(-5 * height // chunk))
    bias = torch.randn(batch, 2 * groups)
    merged = merge_moments(moments, groups, 5 * height, bias)
    expected = reference_statistics(x + bias[..., None, None], groups)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_geglu_is_diffusers():
    layer, x = GEGLU(6, 10), torch.randn(2, 4, 6)
    torch.testing.assert_close(geglu(layer.proj(x)), layer(x))


@pytest.mark.parametrize(
    ("fix", "bytes_of"),
    [
        (color.no_color_fix, lambda image, _: to_uint8_nhwc(image)),
        (color.adain_color_fix, adain_color_fix_uint8),
        (color.wavelet_color_fix, wavelet_color_fix_uint8),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (40, 70)], ids=str)
def test_bytes_are_those_of_the_librarys_way_to_a_file(fix, bytes_of, size):
    image, reference = 2.4 * torch.rand(2, 3, *size) - 1.2, 2 * torch.rand(2, 3, *size) - 1
    fixed = fix(image.clamp(-1, 1) / 2 + 0.5, reference / 2 + 0.5).clamp(0, 1)
    expected = (255 * fixed + 0.5).floor().permute(0, 2, 3, 1)
    result = bytes_of(image, reference)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    torch.testing.assert_close(result.float(), expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("group_norm_silu", ("x", 2, "c", None, 1e-6, True, "c", None)),
        ("group_norm_silu", ("x", 2, "bc", "bc", 1e-6, False, None, "statistics")),
        ("group_norm_silu", ("x", 2, "bc", "bc", 1e-6, False, "c", "moments")),
        ("add_with_statistics", ("x", "x2", None, 2, 0)),
        ("add_with_statistics", ("x", "x2", "bc", 4, 3)),
        ("row_moments", ("x",)),
        ("geglu", ("x",)),
        ("to_uint8_nhwc", ("rgb",)),
        ("adain_color_fix_uint8", ("rgb", "rgb2")),
        ("wavelet_color_fix_uint8", ("rgb", "rgb2", 3)),
    ],
)
def test_registered_operations_keep_their_promises(name, arguments):
    tensors = {
        "x": torch.randn(2, 8, 3, 4),
        "x2": torch.randn(2, 8, 3, 4),
        "c": torch.randn(8),
        "bc": torch.randn(2, 8),
        "statistics": torch.rand(2, 2, 2),
        "moments": torch.rand(2, 2, 3, 8),
        "rgb": torch.rand(2, 3, 4, 5),
        "rgb2": torch.rand(2, 3, 4, 5),
    }
    arguments = tuple(tensors.get(a, a) if isinstance(a, str) else a for a in arguments)
    torch.library.opcheck(getattr(torch.ops.tadsr, name).default, arguments)


def test_gradients_pass_through_the_references():
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, weight: group_norm_silu(x, 2, weight, None, 1e-3), (x, weight)
    )


def test_a_chosen_kernel_says_why_it_cannot_run():
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="must be able to run") as caught:
        group_norm_silu(x, 2, None, None, 1e-5, backend="triton")
    for reason in ("float64", "gradients"):
        assert reason in str(caught.value)


def test_a_tensor_on_the_cpu_takes_the_reference():
    reasons = unsupported_reasons([torch.zeros(1)])
    assert len(reasons) == 1
    assert "cpu" in reasons[0] or "not installed" in reasons[0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: group_norm_silu(x.int(), 2, None, None, 1e-5), TypeError, "floating-point"),
        (lambda x: group_norm_silu(x[0], 2, None, None, 1e-5), ValueError, "B, C, H, W"),
        (lambda x: group_norm_silu(x, 3, None, None, 1e-5), ValueError, "divide the 8"),
        (lambda x: group_norm_silu(x, 2, x[0], None, 1e-5), ValueError, "weight"),
        (
            lambda x: group_norm_silu(x, 2, None, None, 1e-5, statistics=x),
            ValueError,
            "statistics",
        ),
        (lambda x: add_with_statistics(x, x.half(), num_groups=2), ValueError, "residual"),
        (lambda x: geglu(x[..., :3]), ValueError, "even"),
        (lambda x: geglu(x, backend="cuda"), ValueError, "backend"),
        (lambda x: to_uint8_nhwc(x[0]), ValueError, "image"),
        (lambda x: adain_color_fix_uint8(x, x), ValueError, "B, 3, H, W"),
        (lambda x: wavelet_color_fix_uint8(x[:, :3], x[:, :3], 0), ValueError, "levels"),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(2, 8, 3, 4))


def test_the_code_in_the_guide_runs():
    guide = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/kernels.md", "exec"), {})
