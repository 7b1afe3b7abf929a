"""The least time a forward pass can take on this machine: its matrix products and its state updates, and nothing else.

Matrix products run in the very shapes and type of the model at that length, as `vimamba.ops.linear` does them. State
updates run in floor.cpp, with everything in registers; where there is no compiler, as torch.exp and torch.addcmul over
a tensor in cache, which is slower than the floor. Not counted: memory traffic between the two, convolution,
normalisation, softplus, gate.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vimamba.benchmark.entries import DTYPES, Entry, build, step_of
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate, ratio
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.ops import linear

SOURCE = Path(__file__).with_name("floor.cpp")
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC", "-std=c++20")


@dataclasses.dataclass
class Floor:
    """The bare arithmetic of one forward pass, to be run in turns with the model itself.

    Args:
        products: shapes (rows, inner, columns) of the matrix products, and how often each occurs.
        updates: state updates.
        dtype: of the matrix products.
    """

    products: Counter[tuple[int, int, int]]
    updates: int
    dtype: torch.dtype
    seconds: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # products, updates; of each step

    def __post_init__(self) -> None:
        self._operands = [
            (torch.randn(m, k, dtype=self.dtype), torch.randn(n, k, dtype=self.dtype), count)
            for (m, k, n), count in self.products.items()
        ]
        self._update, self.source = update_function()

    @torch.inference_mode()
    def step(self) -> None:
        """Do it all once."""
        start = time.perf_counter()
        for x, weight, count in self._operands:
            for _ in range(count):
                linear(x, weight)
        middle = time.perf_counter()
        self._update(self.updates)
        self.seconds.append((middle - start, time.perf_counter() - middle))

    def __str__(self) -> str:
        products, updates = (min(times) for times in zip(*self.seconds, strict=True))
        flops = sum(2 * m * k * n * count for (m, k, n), count in self.products.items())
        return (
            f"{1000 * (products + updates):.0f} ms: matrix products {1000 * products:.0f} ms "
            f"({flops / products / 1e9:.0f} GFLOP/s), state updates {1000 * updates:.0f} ms "
            f"({self.updates / updates / 1e9 / torch.get_num_threads():.2f} G/s/core, {self.source})"
        )


def state_updates(model: Any, size: int) -> int:
    """State updates of a forward pass over one image; none in a model without a scan."""
    mixers = [module for module in model.modules() if isinstance(module, BidirectionalMixer)]
    if not mixers:
        return 0
    rows, columns = model.patch_embed.grid_size((size, size))
    return (rows * columns + 1) * sum(direction.A_log.numel() for mixer in mixers for direction in mixer.directions())


def floor_of(entry: Entry) -> Floor:
    """The floor of a forward pass of a Vision Mamba."""
    model: Any = build(entry)
    rows, columns = model.patch_embed.grid_size((entry.size, entry.size))
    tokens = entry.batch * (rows * columns + 1)
    patch = model.patch_embed.proj.weight
    products = Counter({(entry.batch * rows * columns, patch[0].numel(), patch.shape[0]): 1})
    for module in model.modules():
        if isinstance(module, BidirectionalMixer):
            directions = module.directions()
            weights = [module.in_proj.weight, module.out_proj.weight]
            weights += [weight for d in directions for weight in (d.x_proj_weight, d.dt_proj_weight)]
            products.update((tokens, weight.shape[1], weight.shape[0]) for weight in weights)
    return Floor(products, entry.batch * state_updates(model, entry.size), DTYPES[entry.dtype])


def update_function() -> tuple[Callable[[int], None], str]:
    """A function that does so many state updates on all of PyTorch's threads, and how it does them."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "floor.so"
            done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], capture_output=True, check=False)
            if done.returncode == 0:
                return _compiled(ctypes.CDLL(str(library))), "C++, in registers"
    return _with_torch, "torch.exp and torch.addcmul in cache, for want of a compiler"


def _compiled(library: ctypes.CDLL) -> Callable[[int], None]:
    function = library.vimamba_floor_updates
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_float)
    per_step = function(1, 0.01)
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)  # ctypes lets go of the interpreter lock

    def run(updates: int) -> None:
        list(pool.map(lambda _: function(updates // (per_step * threads), 0.01), range(threads)))

    return run


def _with_torch(updates: int) -> None:
    x = torch.rand(torch.get_num_threads() * 2**16)
    out, other = torch.empty_like(x), torch.rand_like(x)
    for _ in range(updates // x.numel()):
        torch.exp(x, out=out)
        torch.addcmul(other, out, x, out=out)


def multiple(entry: Entry, repeats: int, seconds: float, block: int = 1) -> tuple[float, Floor]:
    """How many times the floor the model takes (median over rounds that run both), and the floor."""
    floor = floor_of(entry)
    step = step_of(entry, build(entry))
    for warm_up in (step, floor.step):
        warm_up()
    ours, least = alternate([step, floor.step], repeats, seconds, block=block)
    return ratio(ours, least), floor


def main() -> None:
    """Print the floor and the multiple of it, in both types."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for dtype in ("float32", "bfloat16"):
        times, floor = multiple(Entry("vim_tiny_patch16_224", 1248, dtype=dtype), repeats=10, seconds=20)
        print(f"Vim-Ti, 1248 px, {dtype}: {times:.2f} times the floor of {floor}")


if __name__ == "__main__":
    script(main)
