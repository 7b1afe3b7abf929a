"""8-bit projections: speed, and what they cost in accuracy.

`python benchmarks/quantize.py` takes Vim-Ti's time at 224 px in turns with float32; `--run RUN [--data D]` evaluates a
trained run in float32, bfloat16 and with 8-bit projections, of `vimamba.quantize`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import vimamba
from vimamba.benchmark import Entry, machine
from vimamba.benchmark.entries import build, step_of
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import BLOCK, alternate, quartiles, ratio

PRECISIONS = ("32-true", "bf16-mixed", "int8")


def speed(batch: int, seconds: float) -> None:
    """Print the time of float32, of 8-bit projections, and of these among bfloat16 activations."""
    kinds = [("float32", False), ("float32", True), ("bfloat16", True)]
    steps = []
    for dtype, quantized in kinds:
        entry = Entry("vim_tiny_patch16_224", 224, batch, dtype)
        model = build(entry)
        steps.append(step_of(entry, vimamba.quantize(model) if quantized else model))
        steps[-1]()
    times = alternate(steps, 30, seconds, block=BLOCK)
    for (dtype, quantized), of_one in zip(kinds, times, strict=True):
        name = f"8-bit projections, {dtype}" if quantized else dtype
        gain = ratio(times[0], of_one)
        print(f"224 px, batch {batch}, {name}: {1000 * quartiles(of_one)[1]:.1f} ms, {gain:.2f}x", flush=True)


def accuracy(run: str, data: Any) -> None:
    """Print what a run reaches in each precision."""
    for precision in PRECISIONS:
        results = vimamba.load_run(run, precision=precision).evaluate(data)
        reached = ", ".join(f"{name} {number:.4f}" for name, number in results.numbers.items())
        print(f"{run}, {results.images} images, {precision}: {reached}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a trained run, to evaluate")
    parser.add_argument("--data", help="what to evaluate it on; its own held-out images by default")
    parser.add_argument("--seconds", type=float, default=20, help="time for a comparison; at least three rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's own choice by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine.heading(machine.describe("cpu")) + "\n")
    if options.run:
        accuracy(options.run, options.data)
    else:
        speed(1, options.seconds)
        speed(8, options.seconds)


if __name__ == "__main__":
    script(main)
