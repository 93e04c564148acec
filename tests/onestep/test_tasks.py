"""The memory that a task is computed in."""

import platform

import pytest
import torch

from tadsr.onestep.tasks import reused_memory, used_bytes

CPU = torch.device("cpu")
BLOCK = 2**26
"""Bytes that malloc takes from the system each time, left to itself."""


def fill():
    torch.ones(BLOCK // 4)


def faults():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has it")
def test_memory_of_layers_that_are_done_is_taken_again_and_given_back():
    fill()
    before = used_bytes(CPU)
    with reused_memory(CPU):
        fill()
        started = faults()
        for _ in range(4):
            fill()
        assert faults() - started < 100
        assert used_bytes(CPU) - before > BLOCK // 2
    assert used_bytes(CPU) - before < BLOCK // 2
    started = faults()
    fill()
    assert faults() - started > 1
