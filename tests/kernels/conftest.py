"""Where the kernels run in tests: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# One process either interprets kernels or compiles them: see test_interpreted.py.
collect_ignore = ["test_compile.py", "test_interpreted.py"] if IS_INTERPRETED else []


@pytest.fixture(params=["cpu" if IS_INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device that kernels run on; what they leave unwritten is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    torch.manual_seed(0)
    yield request.param
    torch.use_deterministic_algorithms(deterministic)
