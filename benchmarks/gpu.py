"""Vim against DeiT on this machine's GPU, in one command.

    PYTHONPATH=src python benchmarks/gpu.py [--sizes 224 1248] [--models tiny] [--modes eager graph] [--out FOLDER]

Needs torch, triton and timm. Checks the kernels against the plain loop in float64; times the scan against its floor and
the first call of a model in a fresh process; then a forward pass and a training step in bfloat16 of Vim-Ti and Vim-S at
each size, at batch 1 and at the largest that fits, against timm's DeiT with fused and with written-out attention. Every
model runs in every mode (eager, torch.compile, CUDA graph), and the fastest counts. Writes results.json after every
case and, where matplotlib is installed, the plot of `vimamba bench`; a later run with the same --out adds its cases to
those of earlier ones, so that the whole can be done in parts. Ends with what was reached beside what was asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cards import card_of
from floor import state_updates
from torch import Tensor

import vimamba
from vimamba.benchmark import Entry, Result, machine, measure, memory, report
from vimamba.benchmark.entries import MODES, PASSES, build, images
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate, quartiles
from vimamba.files import write_text
from vimamba.ops import backends, reference
from vimamba.ops.sizes import FLOPS_OF_UPDATE

SIZES = (224, 512, 1024, 1248, 2048)
MODELS = {
    "tiny": ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
    "small": ("vim_small_patch16_224", "deit_small_patch16_224"),
    "nano": ("vim_nano", "deit_tiny_patch16_224"),  # to try this script out
}
MAX_BATCH = 256
MEMORY_SHARE = 0.8
"""The largest batch is the power of two whose pass is expected to fit in this share of the memory."""
FIRST_CALL_SECONDS = 20
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
SCAN = (16, 384, 6085)


FIRST_CALL = """
import time, torch, vimamba
model = vimamba.create_model("vim_tiny_patch16_224", img_size=224).to(DEVICE)
x = torch.randn(2, 3, 224, 224, device=DEVICE)
start = time.perf_counter()
with torch.autocast(DEVICE, torch.bfloat16):
    with torch.no_grad():
        model(x).sum().item()
    forward = time.perf_counter() - start
    model(x).float().sum().backward()
next(model.parameters()).grad.sum().item()
print(forward, time.perf_counter() - start)
"""


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.detach().double() - truth.detach()).norm() / truth.detach().norm())


def scan_inputs(batch: int, dim: int, length: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D, z and the bias of delta, in the fast layout."""

    def sequence(width: int) -> Tensor:
        return torch.randn(batch, length, width, device=device).to(dtype).transpose(1, 2)

    A = -torch.arange(1, 17, device=device).float().expand(dim, -1).contiguous()
    return [
        sequence(dim), sequence(dim), A, sequence(16), sequence(16),
        torch.ones(dim, device=device), sequence(dim), torch.full((dim,), -4.0, device=device),
    ]  # fmt: skip


def worst_error(run: Callable, truth: Callable, inputs: list[Tensor]) -> float:
    """The largest relative error of the output and the gradients of `run`, against `truth` on float64."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    out, want = run(*leaves), truth(*doubles)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, weight)
    wants = torch.autograd.grad(want, doubles, weight.double())
    return float(torch.tensor(list(map(error, (out, *found), (want, *wants)))).max())  # NaN if there is one


def check_kernels(device: str) -> dict[str, float]:
    """The worst error of every op, by type; ends the program if one is wrong rather than inexact."""
    errors = {}
    # One sequence has threads along time, many have a thread for each channel (see ops/triton/plan.py).
    dim, lengths = (384, {1: 1001, 64: 197}) if device == "cuda" else (24, {1: 101, 4: 21})
    for dtype, limit in LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        x, weight = torch.randn(2, 1001, dim, device=device).to(dtype), torch.randn(dim, device=device)
        taps = torch.randn(dim, 4, device=device)
        for (batch, length), reverse in itertools.product(lengths.items(), (False, True)):
            case = f"scan ({batch}, {dim}, {length}){' reversed' if reverse else ''}"
            errors[f"{name}: {case}"] = worst_error(
                lambda *a, reverse=reverse: vimamba.selective_scan(*a, True, reverse=reverse),
                lambda *a, reverse=reverse: reference.selective_scan(*a, True, reverse=reverse),
                scan_inputs(batch, dim, length, dtype, device),
            )
        errors[f"{name}: convolution"] = worst_error(
            lambda x, w: vimamba.causal_conv1d(x.transpose(1, 2), w, activation="silu"),
            lambda x, w: reference.causal_conv1d(x.transpose(1, 2), w, None, "silu"),
            [x, taps],
        )
        errors[f"{name}: RMSNorm"] = worst_error(
            lambda x, w: vimamba.rms_norm(x, w)[0], lambda x, w: reference.rms_norm(x, w)[0], [x, weight]
        )
        for what in [what for what in errors if what.startswith(name)]:
            print(f"{what}: relative error {errors[what]:.1e} (at most {limit:.0e})")
            if not errors[what] <= 10 * limit:
                sys.exit(f"{what}: relative error {errors[what]:.1e} on this device: the kernel is wrong")
    return errors


def kernel_seconds(run: Callable[[], object], device: str) -> float:
    """Median time of `run`, on a GPU without what the processor does around it."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1e3
    return quartiles(alternate([run], 5, 1.0)[0])[1]


def units_a_second(unit: str) -> float:
    """Operations of a unit that this device's multiprocessors do in a second."""
    card = card_of(torch.cuda.get_device_name(0))
    return torch.cuda.get_device_properties(0).multi_processor_count * card.clock * card.lanes[unit]


def scan_floor(batch: int, dim: int, length: int) -> dict[str, float]:
    """The least seconds that each unit needs for the forward scan in bfloat16."""
    updates = batch * dim * length * 16
    return {
        "memory": scan_bytes(batch, dim, length) / card_of(torch.cuda.get_device_name(0)).bandwidth,
        "exponentials": updates / units_a_second("mufu"),
        "multiply-adds": updates * 4 / units_a_second("fma"),
    }


def forward_floor(entry: Entry, flops: int) -> float:
    """The least seconds of a forward pass: its matrix products at the tensor cores' rate, then the exponentials of its
    state updates; nothing else.
    """
    updates = state_updates(build(Entry(entry.model, entry.size, model_args=entry.model_args)), entry.size)
    products = (flops - FLOPS_OF_UPDATE * updates) / card_of(torch.cuda.get_device_name(0)).products
    return entry.batch * (products + updates / units_a_second("mufu"))


def scan_bytes(batch: int, dim: int, length: int) -> int:
    return 2 * (3 * batch * dim * length + 32 * batch * length)


def time_scan(device: str) -> dict[str, Any]:
    """One scan forward, and backward, against the floor."""
    shape = SCAN if device == "cuda" else (1, 64, 200)
    u, delta, A, B, C, D, _, bias = scan_inputs(*shape, torch.bfloat16, device)
    with torch.no_grad():
        forward = kernel_seconds(lambda: vimamba.selective_scan(u, delta, A, B, C, D, None, bias, True), device)
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C, D, bias)]
    out = vimamba.selective_scan(*leaves[:6], None, leaves[6], True)
    weight = torch.ones_like(out)
    backward = kernel_seconds(lambda: torch.autograd.grad(out, leaves, weight, retain_graph=True), device)
    row = {"shape": shape, "forward": forward, "backward": backward, "bytes_a_second": scan_bytes(*shape) / forward}
    print(f"scan {shape}: {1e3 * forward:.3f} ms forward, {1e3 * backward:.3f} ms backward", end="")
    if device == "cuda":
        row["floor"] = floor = scan_floor(*shape)
        unit = max(floor, key=lambda name: floor[name])
        row["share_of_floor"] = floor[unit] / forward
        print(f"; floor {1e3 * floor[unit]:.3f} ms by {unit}, {row['share_of_floor']:.0%} reached", end="")
    print(f"; {row['bytes_a_second'] / 1e9:.0f} GB/s")
    return row


def time_first_call(device: str) -> list[float]:
    """Seconds until the first forward pass, and the first training step, are done, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL.replace("DEVICE", repr(device))],
            env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"the first call failed: {done.stderr.strip().splitlines()[-1]}")
    times = [float(word) for word in done.stdout.split()[-2:]]
    print(f"first call: forward after {times[0]:.1f} s, training step after {times[1]:.1f} s")
    return times


def largest_batch(entry: Entry) -> int:
    """The largest power of two that is expected to fit, from the memory of batches 1 and 2; 0 if nothing fits."""
    if entry.device != "cuda":
        return 2
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        one, two = (memory.peak(Entry(**{**vars(entry), "batch": batch})) for batch in (1, 2))
    except memory.StepError:
        return 0
    assert one is not None
    assert two is not None
    fitting = int((MEMORY_SHARE * total - one) / (two - one + images(entry).nbytes)) + 1
    return max(1, min(MAX_BATCH, 1 << (fitting.bit_length() - 1)))


def contenders(which: str, size: int, passes: str, device: str) -> list[Entry]:
    vim, deit = MODELS[which]
    common: dict[str, Any] = {"dtype": "bfloat16", "passes": passes, "device": device}
    return [
        Entry(deit, size, **common),
        Entry(vim, size, **common),
        Entry(vim, size, model_args={"bidirectional": "none"}, label=f"{vim} one direction", **common),
        Entry(deit, size, attention="eager", **common),
    ]


def run_case(
    which: str, size: int, passes: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Result]]:
    """Every contender at batch 1 and at the largest batch that all fit in but the written-out attention, which has
    its own."""
    entries = contenders(which, size, passes, options.device)
    largest = [largest_batch(entry) for entry in entries]
    shared = min(largest[:3])
    by_batch: dict[int, list[Entry]] = {}
    for entry, most in zip(entries, largest, strict=True):
        for batch in {1, min(most, shared)} - {0}:
            for mode in options.modes:
                if mode != "graph" or (passes == "forward" and options.device == "cuda"):
                    by_batch.setdefault(batch, []).append(Entry(**{**vars(entry), "batch": batch, "mode": mode}))
    rows, results = [], []
    for batch, entry in [(batch, entry) for batch, group in sorted(by_batch.items()) for entry in group]:
        torch._dynamo.reset()  # or it would give up compiling after so many models of one class
        # One at a time: the inputs and graphs of all together would not fit.
        measured = measure([entry], options.repeats, options.seconds, with_memory=options.device == "cuda")
        results += measured
        for result in measured:
            row = {"which": which, **report.as_row(result)}
            rows.append(row)
            outcome = row["error"] or f"{row['images_per_s']:9.1f} images/s"
            if passes == "forward" and options.device == "cuda" and row["median_s"]:
                row["floor_s"] = forward_floor(result.entry, result.cost.flops)
                outcome += f", {row['floor_s'] / row['median_s']:.0%} of the floor's speed"
            peak = f", peak {row['peak_extra_bytes'] / 2**20:.0f} MB" if row["peak_extra_bytes"] else ""
            print(f"{passes:7} {size:4} px batch {batch:3} {result.name:44} {outcome}{peak}", flush=True)
    return rows, results


def key(row: dict[str, Any]) -> tuple:
    """What a row is of; a later run of the same takes its place, whatever its largest batch."""
    return tuple(str(row[k]) for k in ("which", "name", "pass", "size", "mode"))


class Reached:
    """What the rows say of the models `which`: the best of the modes, at the largest batch or at batch 1."""

    def __init__(self, rows: list[dict[str, Any]], which: str) -> None:
        self.rows = [row for row in rows if row["which"] == which]
        vim, deit = MODELS[which]
        self.names = {"vim": vim, "one": f"{vim} one direction", "fused": f"{deit} fused", "eager": f"{deit} eager"}

    def _of(self, model: str, passes: str, size: int) -> list[dict[str, Any]]:
        def plain(row: dict[str, Any]) -> str:
            return row["name"].removesuffix(f" {row['mode']}") if row["mode"] != "eager" else row["name"]

        wanted = (self.names[model], passes, size)
        found = [r for r in self.rows if (plain(r), r["pass"], r["size"]) == wanted]
        return [] if any(r["error"] for r in found) else found

    def speed(self, model: str, passes: str, size: int, batch: int | None = None) -> float:
        """Images a second, by default at the best batch."""
        found = [r["images_per_s"] for r in self._of(model, passes, size) if batch in (None, r["batch"])]
        return max(found, default=math.nan)

    def peak(self, model: str, passes: str, size: int) -> float:
        """Bytes at batch 1."""
        found = [r["peak_extra_bytes"] for r in self._of(model, passes, size) if r["batch"] == 1]
        return min((bytes_ for bytes_ in found if bytes_), default=math.nan)

    def against(self, peer: str, passes: str, size: int) -> float:
        return self.speed("vim", passes, size) / self.speed(peer, passes, size)


def goals(content: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """What was asked for of Vim-Ti and the scan: the row, the bound, the aim, and what was reached."""
    tiny = Reached(content["rows"], "tiny")
    less = 100 * (tiny.peak("vim", "forward", 1248) / tiny.peak("eager", "forward", 1248) - 1)
    second = 100 * (tiny.against("one", "forward", 1248) ** -1 - 1)
    errors = [
        max(e for name, e in content["errors"].items() if name.startswith(kind)) for kind in ("float32", "bfloat")
    ]
    return [
        ("error against float64, float32, 1e-6", "<= 1", "", 1e6 * errors[0]),
        ("error against float64, bfloat16, 1e-3", "<= 5", "", 1e3 * errors[1]),
        ("forward, 1248 px, against DeiT-Ti eager", ">= 2.8x", ">= 5x", tiny.against("eager", "forward", 1248)),
        ("memory, 1248 px, batch 1, against DeiT-Ti eager, %", "<= -86.8", "<= -86.8", less),
        ("forward, 1248 px, against DeiT-Ti fused", ">= 1x", ">= 1.5x", tiny.against("fused", "forward", 1248)),
        ("forward, 2048 px, against DeiT-Ti fused", ">= 2x", ">= 3x", tiny.against("fused", "forward", 2048)),
        ("images/s, 1248 px", ">= 500", ">= 1000", tiny.speed("vim", "forward", 1248)),
        ("train step, 1248 px, against DeiT-Ti fused", ">= 1x", ">= 1.5x", tiny.against("fused", "train", 1248)),
        ("scan forward, % of the floor", ">= 50", ">= 75", 100 * content["scan"].get("share_of_floor", math.nan)),
        ("second direction, 1248 px, % more time", "<= 45", "<= 30", second),
        ("seconds until the first training step", f"<= {FIRST_CALL_SECONDS}", "", content["first_call"][1]),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="folder for results.json and the plot")
    add("--sizes", type=int, nargs="+", default=list(SIZES), help="pixels")
    add("--models", nargs="+", default=["tiny", "small"], choices=list(MODELS), help="which models")
    add("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="of which the fastest counts")
    add("--repeats", type=int, default=20, help="times that each model runs at most")
    add("--seconds", type=float, default=5.0, help="time for the runs of one case; each model runs at least 3 times")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only to try the script out, with small models")
    options = parser.parse_args()
    if min(options.sizes) < 16 or options.repeats < 1 or options.seconds < 0:
        parser.error("--sizes are at least 16, --repeats at least 1, --seconds not negative")
    return options


def main() -> None:
    options = arguments()
    if options.device == "cuda":
        reason = backends.load("triton").unavailable(torch.device("cuda"))
        if reason is not None:
            sys.exit(f"benchmarks/gpu.py needs a GPU: {reason}")
    torch.manual_seed(0)
    path = options.out / "results.json"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text()) if path.exists() else {"rows": []}
    except (OSError, ValueError, KeyError) as problem:
        sys.exit(f"{path}: cannot be continued ({problem})")
    facts = machine.describe(options.device)
    if (before := earlier.get("machine", facts)).get("gpu") != facts.get("gpu"):
        sys.exit(f"{path}: was measured on {before.get('gpu')}, not on {facts.get('gpu')}; give another --out")
    print(machine.heading(facts))
    content: dict[str, Any] = {"schema": report.SCHEMA, "machine": facts, "errors": check_kernels(options.device)}
    content |= {
        "scan": time_scan(options.device),
        "first_call": time_first_call(options.device),
        "rows": earlier["rows"],
    }
    results: list[Result] = []
    began = time.perf_counter()
    for which, passes, size in itertools.product(options.models, options.passes, options.sizes):
        rows, measured = run_case(which, size, passes, options)
        results += measured
        fresh = {key(row) for row in rows}
        content["rows"] = [row for row in content["rows"] if key(row) not in fresh] + rows
        write_text(path, json.dumps(content, indent=1) + "\n")  # whole, so that an interrupted run loses nothing
    if results and importlib.util.find_spec("matplotlib") is not None:
        report.plot(options.out / "results.png", machine.heading(facts), results)
    print(f"\nreached, by {time.perf_counter() - began:.0f} s of measurements and those of earlier runs:")
    for what, bound, aim, value in goals(content):
        shown = "not measured" if math.isnan(value) else f"{value:.2f}"
        print(f"  {what:52} {shown:>12}   (asked {bound}{f', hoped for {aim}' if aim else ''})")
    print(f"measurements: {path}")


if __name__ == "__main__":
    script(main)
