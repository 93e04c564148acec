"""Cases of several parameters crossed, of which the quick run takes some."""

import itertools

import pytest


def crossed(quick, *axes):
    """Return every combination of the axes for `parametrize`; those not in `quick` are slow."""
    return [
        pytest.param(*case, marks=[] if case in quick else pytest.mark.slow)
        for case in itertools.product(*axes)
    ]
