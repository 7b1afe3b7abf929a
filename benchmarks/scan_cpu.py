"""The CPU scan against its floor and against mambapy's, in one run.

    python benchmarks/scan_cpu.py [--rounds 9] [--threads 2] [--json scan.json]

Every round times each contestant once, in turns, so that a busy machine slows all alike; the table shows medians.
"steps" is the same scan on tensors whose steps, not channels, are contiguous. The floor of a scan is the larger of its
state updates at the rate of floor.cpp, with everything in registers, and its activations at the bandwidth of a copy:
both measured here, on all threads.
Rates are in state updates (one exp, two multiply-adds) a second and a thread.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from floor import update_function
from mambapy.pscan import pscan
from torch import Tensor

from vimamba.benchmark import report
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate
from vimamba.ops import backends
from vimamba.ops.cpu import library
from vimamba.ops.direction import Direction, flat

cpu = backends.load("cpu")
SHAPES = [(8, 384, 197), (1, 384, 6085)]  # Vim-Ti at 224 px, batch 8, and at 1248 px
STATE = 16


def rates() -> tuple[float, float]:
    """State updates, and bytes read and written by a large copy, that all threads do in a second."""
    updates, (update, _) = 1 << 30, update_function()
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    runs = [lambda: update(updates), lambda: target.copy_(source)]
    for warm_up in runs:
        warm_up()
    updating, copying = (min(times) for times in alternate(runs, 5, math.inf))
    return updates / updating, 2 * source.nbytes / copying


def problem(batch: int, dim: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def rows(width: int) -> Tensor:
        return torch.randn(batch, length, width).to(dtype).transpose(1, 2)

    return {
        "u": rows(dim),
        "delta": rows(dim),
        "A": -torch.arange(1, STATE + 1.0).repeat(dim, 1),
        "B": rows(STATE)[:, None],
        "C": rows(STATE)[:, None],
        "D": torch.ones(dim),
        "z": rows(dim),
        "bias": torch.full((dim,), -4.0),
    }


def mambapy_scan(x: dict[str, Tensor]) -> Tensor:
    """The scan as mambapy's MambaBlock computes it, with softplus and gate around its pscan."""
    u, delta, z = (x[name].transpose(1, 2) for name in ("u", "delta", "z"))
    B, C = (x[name][:, 0].transpose(1, 2) for name in "BC")
    delta = torch.nn.functional.softplus(delta + x["bias"])
    states = pscan(torch.exp(delta[..., None] * x["A"]), delta[..., None] * B[:, :, None] * u[..., None])
    y = (states @ C[..., None]).squeeze(3) + x["D"] * u
    return y * torch.nn.functional.silu(z)


def contestants(x: dict[str, Tensor], peer: bool) -> dict[str, Callable[[], object]]:
    arguments = tuple(x.values())
    out, _, states = cpu.scan_forward(*arguments, True, False, True)
    dout = torch.randn_like(out)
    # As mamba_ssm's callers pass them.
    steps_contiguous = tuple(t.contiguous() if t.dim() > 2 else t for t in arguments)
    dout_steps = dout.contiguous()
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: cpu.scan_forward(*arguments, True, False, False),
        "forward, steps": lambda: cpu.scan_forward(*steps_contiguous, True, False, False),
        "backward": lambda: cpu.scan_backward(dout, None, *arguments, states, True, False),
        "backward, steps": lambda: cpu.scan_backward(dout_steps, None, *steps_contiguous, states, True, False),
    }
    return runs | ({"mambapy forward": lambda: mambapy_scan(x)} if peer else {})


def mixer(x: dict[str, Tensor], rank: int = 12) -> Callable[[], object]:
    """The whole mixer of both directions, fused: convolution, projections, two scans, gate."""
    dim = x["u"].shape[1]
    xz = torch.cat([x["u"], x["z"]], dim=1).transpose(1, 2).contiguous()
    directions = []
    for reverse in (False, True):
        projections = (torch.randn(rank + 2 * STATE, dim) * dim**-0.5, torch.randn(dim, rank) * rank**-0.5)
        conv = (torch.randn(dim, 4), torch.zeros(dim))
        directions.append(Direction(*conv, *projections, x["bias"], (-x["A"]).log(), x["D"], reverse, reverse))
    return lambda: cpu.mixer_forward(xz, *flat(directions), 0.5, None, False)


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, rate: float, bytes_a_second: float
) -> list[dict]:
    x = problem(*shape, dtype)
    runs = contestants(x, peer=dtype == torch.float32) | {"mixer, 2 directions": mixer(x)}
    for warm_up in runs.values():
        warm_up()
    times = dict(zip(runs, alternate(list(runs.values()), rounds, math.inf), strict=True))
    updates = STATE * shape[0] * shape[1] * shape[2]
    floor = max(updates / rate, 4 * x["u"].nbytes / bytes_a_second)
    middle = {name: median(taken) for name, taken in times.items()}
    rows = []
    for name, taken in middle.items():
        passes = 2 if name.startswith("mixer") else 1
        row = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "what": name, "ms": taken * 1e3}
        row["min_ms"] = min(times[name]) * 1e3
        row["gupdates_per_thread"] = passes * updates / taken / 1e9 / torch.get_num_threads()
        row["times_floor"] = taken / floor / passes
        row["times_forward"] = taken / middle["forward"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reason = cpu.unavailable()
    if reason is not None:
        raise SystemExit(reason)
    if options.json:
        report.check_writable(options.json, "--json")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rate, bytes_a_second = rates()
    about = f"{platform.machine()}, {library.instruction_set()}, {options.threads} threads, torch {torch.__version__}"
    print(
        f"{about}\n"
        f"state updates {rate / 1e9 / options.threads:.2f} G updates/s/thread, copy {bytes_a_second / 1e9:.1f} GB/s"
    )
    print(
        f"{'shape':>10} {'type':>8} {'what':>19} {'ms':>8} {'least':>8} {'G/s/thread':>10} {'x floor':>7}"
        f" {'x forward':>9}"
    )
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for row in measure(shape, dtype, options.rounds, rate, bytes_a_second):
                rows.append(row)
                print(
                    f"{'x'.join(map(str, shape)):>10} {row['dtype']:>8} {row['what']:>19} {row['ms']:8.2f}"
                    f" {row['min_ms']:8.2f} {row['gupdates_per_thread']:10.2f} {row['times_floor']:7.2f}"
                    f" {row['times_forward']:9.2f}"
                )
    if options.json:
        options.json.write_text(
            json.dumps({"machine": about, "state_updates": rate, "copy": bytes_a_second, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    script(main)
