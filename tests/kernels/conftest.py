"""Where the kernels run in tests: interpreted on the CPU, or on a GPU."""

import os
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _language_is_patched_once() -> Iterator[None]:
    """Leave out the interpreter's patches of what is patched: half the time of a small program."""
    if not IS_INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable) -> Any:
        seen = {m for m in (tl, tl.core) if any(x is m for x in function.__globals__.values())}
        new = seen - patched
        if not new:
            return interpreter._LangPatchScope()
        scope = patch_language(function)
        undo = scope.restore
        scope.restore = lambda: (patched.difference_update(new), undo())
        patched.update(new)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
