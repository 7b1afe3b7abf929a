"""The linear layers of Vim-Ti by our kernel against PyTorch's, in turns: `python benchmarks/linear.py [--rounds 21]`.

Every layer has weights of its own, as in a model: they come from memory, not from cache. float32, inference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate, quartiles, ratios
from vimamba.ops import linear

DIM, DEPTH = 192, 24
TOKENS = {"224 px": 197, "512 px": 1025, "224 px, batch 8": 1576, "1248 px": 6085}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    layers = [(torch.randn(4 * DIM, DIM), torch.randn(DIM, 2 * DIM)) for _ in range(DEPTH)]
    weights = sum(w.numel() for layer in layers for w in layer)
    for name, tokens in TOKENS.items():
        x, y = torch.randn(tokens, DIM), torch.randn(tokens, 2 * DIM)

        def run(product: Callable[[Tensor, Tensor], Tensor], x: Tensor = x, y: Tensor = y) -> None:
            with torch.inference_mode():
                for in_proj, out_proj in layers:
                    product(x, in_proj)
                    product(y, out_proj)

        ours, theirs = alternate([lambda: run(linear), lambda: run(F.linear)], options.rounds, 20)
        rates = [2e-9 * tokens * weights / quartiles(times)[1] for times in (ours, theirs)]
        gain = ratios(theirs, ours)
        print(
            f"{name}: {rates[0]:.0f} GFLOP/s, PyTorch {rates[1]:.0f}, {gain[1]:.2f}x ({gain[0]:.2f} to {gain[2]:.2f})"
        )


if __name__ == "__main__":
    script(main)
