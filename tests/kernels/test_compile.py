"""Every kernel compiles for every generation of GPUs, without one: to machine code that fits."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from tadsr.kernels.gpu.geglu import plan_geglu  # noqa: E402
from tadsr.kernels.gpu.group_norm import plan_group_norm_silu  # noqa: E402
from tadsr.kernels.gpu.images import plan_adain, plan_to_uint8_nhwc, plan_wavelet  # noqa: E402
from tadsr.kernels.gpu.launch import choose_chunks  # noqa: E402
from tadsr.kernels.gpu.statistics import plan_add_with_statistics  # noqa: E402

TARGETS = [75, 80, 86, 89, 90, 100, 120]
OLDEST = [pytest.param(target, marks=[pytest.mark.slow] * (target != 75)) for target in TARGETS]
"""The others compile the same in the slow run; for the commonest, 90, extreme shapes do it here."""
DTYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
}
SHARED_BYTES = 48 * 1024  # what every GPU gives a program without asking
STACK_BYTES = 64  # a few spilled registers are harmless
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Channels, groups and side of activations for 512 px of output, first and last of each network.
ENCODER_DECODER = [(128, 512), (256, 256), (512, 64)]
UNET = [(320, 64), (640, 32), (960, 64), (1280, 16), (1920, 32), (2560, 8)]
GROUPS = 32


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory):
    # Compiled anew, or the test would show that some earlier version compiled.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def tensor(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def activations(channels, side, dtype=torch.float16, batch=1):
    x = tensor(batch, channels, side, side, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def group_norm_launches(channels, side, dtype=torch.float16, batch=1, is_modulated=True):
    x = activations(channels, side, dtype, batch)
    shared, sample = tensor(channels, dtype=dtype), tensor(batch, channels, dtype=dtype)
    affine = sample if is_modulated else shared
    bias = sample if is_modulated else None
    arguments = (x, GROUPS, affine, affine, 1e-6, True, bias, None)
    return plan_group_norm_silu(*arguments)[1]


def add_launches(channels, side, dtype=torch.float16, batch=1, is_biased=True):
    x = activations(channels, side, dtype, batch)
    bias = tensor(channels, dtype=dtype) if is_biased else None
    chunks, is_merged_on_use = choose_chunks(x)
    return plan_add_with_statistics(x, x, bias, GROUPS, chunks if is_merged_on_use else 0)[2]


def image_launches(side, dtype=torch.float16, batch=1):
    image, reference = activations(3, side, dtype, batch), tensor(batch, 3, side, side)
    return [
        *plan_to_uint8_nhwc(image)[1],
        *plan_to_uint8_nhwc(image[..., 1:])[1],
        *plan_adain(image, reference)[1],
        *plan_wavelet(image[:, :, 1:], reference[:, :, 1:], 3)[1],
    ]


def geglu_launches(width, dtype=torch.float16):
    return plan_geglu(tensor(4096, 2 * width, dtype=dtype))[1]


def one_of_each_kernel():
    launches = [
        *add_launches(320, 64),
        *group_norm_launches(128, 512),
        *group_norm_launches(320, 64),
        *group_norm_launches(1280, 16),
        *geglu_launches(1280),
        *image_launches(512),
    ]
    return {launch.kernel.__name__: launch for launch in launches}


def every_signature():
    launches = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for channels, side in ENCODER_DECODER + UNET:
            for is_full in (False, True):
                launches += group_norm_launches(channels, side, dtype, 2, is_full)
                launches += add_launches(channels, side, dtype, 2, is_full)
        for width in (1280, 2560, 5120):
            launches += geglu_launches(width, dtype)
        launches += image_launches(512, dtype, 2)
    return {signature(launch): launch for launch in launches}.values()


def signature(launch):
    """Return what Triton makes of a launch: types, constants and multiples of 16."""
    types, constants, multiples = {}, {}, set()
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_free = parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and not is_free
        if parameter.is_constexpr or value is None or is_one:
            types[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + DTYPE_NAMES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                multiples.add((index,))
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not is_free:
                multiples.add((index,))
    options = (launch.num_warps, launch.fuses_multiply_add)
    return (
        launch.kernel.__name__,
        *(tuple(sorted(part.items())) for part in (types, constants)),
        tuple(sorted(multiples)),
        options,
    )


def compile_for(launch, capability):
    _, types, constants, multiples, (num_warps, fuses) = signature(launch)
    types = dict(types)
    order = {p.name: types[p.name] for p in launch.kernel.params}
    attributes = {index: [["tt.divisibility", 16]] for index in multiples}
    source = ASTSource(launch.kernel, order, dict(constants), attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": fuses}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin, folder):
    """Return the bytes that a program keeps in memory for want of registers."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [CUOBJDUMP, "--dump-resource-usage", path]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(word.split(":", 1) for word in report.split() if word.count(":") == 1)
    assert int(fields["REG"]) > 0
    return int(fields["STACK"]) + int(fields["LOCAL"])


def check_compiles(launch, capability, folder):
    kernel = compile_for(launch, capability)
    assert kernel.metadata.shared <= SHARED_BYTES
    assert stack_bytes(kernel.asm["cubin"], folder) <= STACK_BYTES


def test_there_is_a_launch_of_each_kernel():
    assert set(one_of_each_kernel()) == {
        "measure_kernel",
        "merge_kernel",
        "apply_kernel",
        "whole_group_kernel",
        "geglu_kernel",
        "to_uint8_kernel",
        "color_moments_kernel",
        "adain_kernel",
        "wavelet_level_kernel",
    }


@pytest.mark.parametrize("capability", OLDEST)
def test_each_kernel_compiles(capability, tmp_path):
    for launch in one_of_each_kernel().values():
        check_compiles(launch, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_every_signature_compiles(capability, tmp_path):
    for launch in every_signature():
        check_compiles(launch, capability, tmp_path)


def test_extreme_shapes_compile(tmp_path):
    # Arguments that are 1 become constants, those beyond 2^31 are 64-bit.
    x = activations(2, 1)
    arguments = (x, 2, None, None, 1e-6, True, None, None)
    launches = [
        *plan_group_norm_silu(*arguments, whole_group_elements=0)[1],
        *plan_group_norm_silu(*arguments)[1],
        *plan_add_with_statistics(x, x, None, 1, 0)[2],
        *plan_geglu(tensor(1, 2))[1],
        *group_norm_launches(6400, 8),
    ]
    for height, width in ((1, 1), (1, 7), (7, 1), (40000, 40000)):
        image = tensor(1, 3, height, width)
        launches += plan_to_uint8_nhwc(image)[1]
        launches += plan_adain(image, image)[1]
        launches += plan_wavelet(image, image, 2)[1]
    for launch in {signature(launch): launch for launch in launches}.values():
        check_compiles(launch, 90, tmp_path)


def test_activations_are_read_in_whole_vectors():
    for launch in group_norm_launches(320, 64, is_modulated=False):
        if "x" in launch.arguments:
            assert "ld.global.v4" in compile_for(launch, 90).asm["ptx"]


def test_offsets_are_64_bit():
    # 4096² positions of 256 channels are 2^32 elements.
    for launch in group_norm_launches(256, 4096) + add_launches(256, 4096):
        source = compile_for(launch, 90).asm["ttir"]
        offsets = re.findall(
            r"tt.addptr .*tensor<(?:\d+x){2,}!tt.ptr<.*>>, tensor<.*x(i\d+)>", source
        )
        assert offsets
        assert set(offsets) == {"i64"}
        assert launch.grid[0] < 2**31
        assert all(side < 2**16 for side in launch.grid[1:])


def test_small_and_large_groups_take_their_own_way():
    names = [launch.kernel.__name__ for launch in group_norm_launches(1280, 8)]
    assert names == ["whole_group_kernel"]
    names = [launch.kernel.__name__ for launch in group_norm_launches(128, 512)]
    assert names == ["measure_kernel", "merge_kernel", "apply_kernel"]
    names = [launch.kernel.__name__ for launch in group_norm_launches(320, 64)]
    assert names == ["measure_kernel", "apply_kernel"]
    # One image must fill the chip.
    assert group_norm_launches(128, 512)[0].grid[0] >= 400
