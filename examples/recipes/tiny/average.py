"""Write the mean of several states of `inherit.py`'s networks.

    python examples/recipes/tiny/average.py early/networks.safetensors late/networks.safetensors \
        --weights 1 2 --out mean/networks.safetensors

`inherit.py --out mean` goes on from there with new optimizers, and exports it where nothing is left
to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> None:
    """Read them, and write their mean with the last one's place in the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("states", type=Path, nargs="+")
    parser.add_argument("--weights", type=float, nargs="+", help="of the states; alike otherwise")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    weights = options.weights or [1.0] * len(options.states)
    if len(weights) != len(options.states):
        parser.error(f"--weights must be {len(options.states)} numbers, got {len(weights)}")
    total = sum(weights)
    if total <= 0:
        parser.error(f"--weights must have a sum above 0, got {total:g}")
    states = [load_file(path) for path in options.states]
    # The whitening is that of stages before the last; a run that starts with that one has none.
    names = [{name for name in state if "whitening" not in name} for state in states]
    if any(found != names[0] for found in names):
        parser.error("all must be states of the same networks")
    shared = set.intersection(*map(set, states))
    with safe_open(options.states[-1], "pt") as last:
        place = last.metadata()
    tensors = {
        name: sum(
            weight / total * state[name].double()
            for weight, state in zip(weights, states, strict=True)
        ).to(tensor.dtype)
        for name, tensor in states[0].items()
        if name in shared
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.out, metadata=place)


if __name__ == "__main__":
    main()
