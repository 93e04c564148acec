"""Write the mean of two states of `inherit.py`'s networks.

    python examples/recipes/tiny/average.py early/networks.safetensors late/networks.safetensors \
        mean/networks.safetensors

`inherit.py --out mean` goes on from there with new optimizers, and exports it where nothing is left
to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    """Read both, and write their mean with the second one's place in the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("early", "late", "mean"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    with safe_open(options.early, "pt") as early, safe_open(options.late, "pt") as late:
        if early.keys() != late.keys():
            parser.error("both must be states of the same networks")
        pairs = {name: (early.get_tensor(name), late.get_tensor(name)) for name in late.keys()}  # noqa: SIM118
        place = late.metadata()
    tensors = {n: torch.lerp(a.float(), b.float(), 0.5).to(b.dtype) for n, (a, b) in pairs.items()}
    options.mean.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.mean, metadata=place)


if __name__ == "__main__":
    main()
