"""How many cases the tests of this folder try."""

from collections.abc import Callable

import pytest

QUICK, LONG = 200, 10_000


@pytest.fixture(params=[QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def num_cases(request) -> Callable[[float], int]:
    """Return a share of all cases: 200 as a rule, 10,000 in a slow run."""
    return lambda share: round(share * request.param)
