"""The scan in pure PyTorch against mambapy's, in one run: time in turns, peak memory in a fresh process each.

    python benchmarks/scan_torch.py [--rounds 7] [--json scan.json]

This is what runs where nothing compiled does: the backend "torch", one direction of one block of Vim-Ti at 1248 px,
(1, 384, 6085) with 16 states, float32, forward. mambapy's part begins, as ours does, at u, delta, A, B and C.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from mambapy.pscan import pscan

import vimamba
from vimamba.benchmark import report
from vimamba.benchmark.memory import growth
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate

SHAPE, STATE = (1, 384, 6085), 16


def contestants() -> dict[str, Callable[[], None]]:
    """A forward pass of each, on the same inputs; channels contiguous, as a model has them."""
    torch.manual_seed(0)
    batch, dim, length = SHAPE
    u_BLD, delta_BLD = torch.randn(batch, length, dim), torch.rand(batch, length, dim)
    B_BLN, C_BLN = torch.randn(2, batch, length, STATE).unbind(0)
    A_DN = -torch.rand(dim, STATE)

    def ours() -> None:
        sequences = (t.transpose(1, 2) for t in (u_BLD, delta_BLD))
        vimamba.selective_scan(*sequences, A_DN, B_BLN.transpose(1, 2), C_BLN.transpose(1, 2), backend="torch")

    def mambapy() -> None:
        decay_BLDN = torch.exp(delta_BLD[..., None] * A_DN)
        input_BLDN = delta_BLD[..., None] * B_BLN[:, :, None] * u_BLD[..., None]
        (pscan(decay_BLDN, input_BLDN) @ C_BLN[..., None]).squeeze(3)

    return {"vimamba": ours, "mambapy": mambapy}


def peak_megabytes(name: str) -> float:
    """Peak memory of one contestant beyond its inputs, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory", name], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json:
        report.check_writable(options.json, "--json")
    runs = contestants()
    with torch.inference_mode():
        if options.memory:
            print((growth(runs[options.memory]) or 0) / 1e6)
            return
        for warm_up in runs.values():
            warm_up()
        times = dict(zip(runs, alternate(list(runs.values()), options.rounds, math.inf), strict=True))
    rows = {n: {"ms": 1e3 * median(t), "peak_MB": peak_megabytes(n)} for n, t in times.items()}
    for name, row in rows.items():
        print(f"{name:8} {row['ms']:8.1f} ms {row['peak_MB']:8.1f} MB")
    ratio = rows["mambapy"]["ms"] / rows["vimamba"]["ms"]
    print(f"vimamba is {ratio:.1f} times as fast, {torch.get_num_threads()} threads")
    if options.json:
        options.json.write_text(
            json.dumps({"shape": SHAPE, "state": STATE, "threads": torch.get_num_threads(), **rows})
        )


if __name__ == "__main__":
    script(main)
