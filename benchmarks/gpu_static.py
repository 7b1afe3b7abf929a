"""What the GPU kernels will cost, read from their machine code; no GPU is needed.

    PYTHONPATH=src python benchmarks/gpu_static.py [--arch sm_80 sm_90 gfx942] [--json FILE]

Runs the launchers on meta tensors of the sizes below, compiles exactly the kernels they would launch ahead of time,
and reads registers, spills and instructions with the tools inside Triton's package. For sm_80 and sm_90 the
instructions of the innermost loops, by the unit that executes them, give a predicted time at the rates below and name
the limiting unit. A prediction is not a measurement: it assumes that units overlap and latencies are hidden.
Exits with status 1 if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from cards import CARDS, Card
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from vimamba.benchmark.report import check_writable
from vimamba.benchmark.script import script
from vimamba.ops.direction import Direction, flat
from vimamba.ops.triton import mixer, norm, scan

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


CARD_OF = {"sm_75": CARDS["T4"], "sm_80": CARDS["A100"], "sm_90": CARDS["H100"]}

UNITS = [
    ("mufu", r"MUFU|I2F|F2I|F2F\b"),
    ("fma", r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|IMAD|IDP"),
    ("lsu", r"LD|ST|RED|ATOM|SHFL|LDSM|STSM"),
    ("none", r"U[A-Z]|NOP|BRA|EXIT|BAR|CALL|RET|BSYNC|BSSY|WARPSYNC|S2|R2UR|DEPBAR|MEMBAR|CCTL"),
    ("alu", r""),
]
"""The unit of an instruction: the first pattern that its name starts with. "none" only takes an issue slot."""


@dataclass
class Launch:
    """One kernel launch that was recorded, and what its machine code says."""

    kernel: str
    programs: int
    warps: int
    shape: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    cycles: dict[str, float] = field(default_factory=dict)  # of a scheduler, for one warp and one trip of its loops
    mix: dict[str, int] = field(default_factory=dict)  # instructions of the innermost loops, by name
    trips: float = 0.0


@contextmanager
def recorded() -> Iterator[list[tuple[JITFunction, tuple[int, ...], tuple, dict]]]:
    """Collect the launches made inside instead of running them."""
    launches: list[tuple[JITFunction, tuple[int, ...], tuple, dict]] = []

    def run(self: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object) -> None:
        launches.append((self, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def compiled(kernel: JITFunction, args: tuple, kwargs: dict, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """The kernel as this launch would compile it on `target`, by the launcher's own rules of specialisation."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def machine_code(cubin: bytes) -> tuple[list[tuple[int, str, str]], int, int, int]:
    """The instructions (address, name, operands), registers, spilled bytes and shared bytes of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);"
    code = [(int(a, 16), name, rest) for a, name, rest in re.findall(pattern, sass.stdout)]
    text = usage.stdout + usage.stderr
    number = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    local = [name for _, name, _ in code if name.startswith(("LDL", "STL"))]
    return code, number["REG"], max(number["STACK"], number["LOCAL"], 4 * len(local)), number["SHARED"]


def innermost(code: list[tuple[int, str, str]]) -> list[str]:
    """The names of the instructions in loops that hold no other loop."""
    spans = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [name for address, name, _ in code if any(low <= address <= high for low, high in inner)]


def unit_of(name: str) -> str:
    return next(unit for unit, pattern in UNITS if re.match(pattern, name))


def scheduler_cycles(names: list[str], card: Card) -> dict[str, float]:
    """Cycles that one warp's instructions keep each unit of a scheduler busy."""
    lanes = {unit: count / 4 for unit, count in card.lanes.items()}
    cycles = Counter({"issue": 32 / lanes["issue"] * len(names)})
    for name in names:
        unit = unit_of(name)
        if unit != "none":
            words = 4 if ".128" in name else 2 if ".64" in name and unit == "lsu" else 1
            half = 2 if name.startswith("IMAD") else 1
            cycles[unit] += 32 / lanes[unit] * words * half
    return dict(cycles)


def analyse(kernel: JITFunction, grid: tuple[int, ...], args: tuple, kwargs: dict, arch: str) -> Launch:
    """Compile one recorded launch and read its machine code."""
    names = (
        "BLOCK_N",
        "CHANNELS",
        "LANES",
        "SETS",
        "UNROLL",
        "ROWS",
        "BLOCK",
        "DIRECTIONS",
        "HAS_Z",
        "SAVE_STATES",
        "SUMMARY",
    )
    shape = " ".join(f"{k.lower()}={int(kwargs[k])}" for k in names if k in kwargs)
    result = Launch(kernel.fn.__name__, grid[0], kwargs.get("num_warps", 4), shape)
    binary = compiled(kernel, args, kwargs, TARGETS[arch])
    if arch not in CARD_OF:
        asm = binary.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", asm)
        result.registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", asm)), default=0)
        result.spilled_bytes = 4 * sum(map(int, spills))
        return result
    code, result.registers, result.spilled_bytes, result.shared_bytes = machine_code(binary.asm["cubin"])
    inner = innermost(code)
    body = inner or [name for _, name, _ in code]
    result.cycles = scheduler_cycles(body, CARD_OF[arch])
    result.mix = dict(Counter(name.split(".")[0] for name in body).most_common(12))
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    if "UNROLL" in kwargs:
        steps = min(bound.get("segment_length", bound["length"]), bound["length"])
        result.trips = math.ceil(steps / kwargs["UNROLL"])
    elif inner and "WIDTH" in kwargs:
        result.trips = kwargs["ROWS"] + kwargs["WIDTH"] - 1
    elif inner and "count" in bound:
        result.trips = math.ceil(bound["count"] / (kwargs["ROWS"] * grid[0]))
    else:
        result.trips = bound.get("n_segments", 1)
    return result


def predicted(launch: Launch, card: Card) -> tuple[float, str]:
    """Seconds that the busiest scheduler needs, and the unit that takes them."""
    unit, cycles = max(launch.cycles.items(), key=lambda item: item[1])
    at_once = card.processors * max(1, 4 // launch.warps)
    busiest = math.ceil(launch.programs / at_once) * max(1.0, launch.warps / 4)
    return cycles * launch.trips * busiest / card.clock, unit


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_scan(
    batch: int, dim: int, length: int, gate: bool = False, train: bool = False, state: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """selective_scan of one direction, in the fast layout."""
    wide = torch.float32
    u, delta, z = (meta(batch, length, dim, dtype=dtype).transpose(1, 2) for _ in range(3))
    x_dbl = meta(batch, length, 12 + 2 * state, dtype=dtype)
    B, C = (part.transpose(1, 2)[:, None] for part in x_dbl[..., 12:].split(state, -1))
    A, D, bias = meta(dim, state, dtype=wide), meta(dim, dtype=wide), meta(dim, dtype=wide)
    z_or_none = z if gate else None
    _, _, states = scan.scan_forward(u, delta, A, B, C, D, z_or_none, bias, True, False, train)
    if train:
        scan.scan_backward(u, None, u, delta, A, B, C, D, z_or_none, bias, states, True, False)


def run_mixer(batch: int, dim: int, length: int, train: bool = False, count: int = 2) -> None:
    """The mixer of one Vim block."""
    wide, rank = torch.float32, dim // 32
    weights, reverse = flat([
        Direction(
            meta(dim, 4, dtype=wide), meta(dim, dtype=wide), meta(rank + 32, dim, dtype=wide),
            meta(dim, rank, dtype=wide), meta(dim, dtype=wide), meta(dim, 16, dtype=wide), meta(dim, dtype=wide),
            bool(i), bool(i),
        )
        for i in range(count)
    ])  # fmt: skip
    xz = meta(batch, length, 2 * dim)
    out, states = mixer.mixer_forward(xz, weights, reverse, 0.5, train)
    if train:
        mixer.mixer_backward(out, xz, weights, reverse, states, 0.5)


def run_norm(rows: int, width: int) -> None:
    x, weight = meta(rows, width), meta(width, dtype=torch.float32)
    _, total, rstd = norm.norm_forward(x, meta(rows, width, dtype=torch.float32), weight, 1e-5, torch.bfloat16)
    norm.norm_backward(x, total, total, weight, rstd)


CASES: dict[str, Callable[[], None]] = {
    "scan (16, 384, 6085)": lambda: run_scan(16, 384, 6085),
    "scan (16, 384, 6085) gated, training": lambda: run_scan(16, 384, 6085, gate=True, train=True),
    "Vim-Ti 1248 px, batch 1": lambda: run_mixer(1, 384, 6085),
    "Vim-Ti 1248 px, batch 32": lambda: run_mixer(32, 384, 6085),
    "Vim-Ti 1248 px, batch 32, one direction": lambda: run_mixer(32, 384, 6085, count=1),
    "Vim-Ti 1248 px, batch 32, training": lambda: run_mixer(32, 384, 6085, train=True),
    "Vim-S 224 px, batch 64, training": lambda: run_mixer(64, 768, 197, train=True),
    "Vim-Ti 1248 px, batch 1, training": lambda: run_mixer(1, 384, 6085, train=True),
    "odd sizes, float32, training": lambda: run_scan(3, 41, 199, True, True, 5, torch.float32),
    "scan (64, 384, 197), float32, training": lambda: run_scan(64, 384, 197, True, True, dtype=torch.float32),
    "state 64, training": lambda: run_scan(8, 96, 1000, True, True, 64),
    "norm, Vim-Ti 1248 px, batch 32": lambda: run_norm(32 * 6085, 192),
}


UPDATES = {"scan (16, 384, 6085)": 16 * 384 * 6085 * 16}
"""State updates, each with one exponential, of the cases that are nothing but a forward scan."""


def report(arch: str, cases: list[str]) -> tuple[list[dict], int]:
    """Print the table of one architecture; its rows, and how many kernels spill."""
    card, rows, spilling = CARD_OF.get(arch), [], 0
    processors, warp = card.processors if card else 304, TARGETS[arch].warp_size
    hardware = {"processors": lambda _: processors, "threads_of_warp": lambda _: warp}
    print(f"\n{arch}" + (f", {card.name}: {card.processors} SMs at {card.clock / 1e9:.3f} GHz" if card else ""))
    for case in cases:
        print(f"  {case}")
        with mock.patch.multiple(scan, **hardware), recorded() as launches:
            CASES[case]()
        for kernel, grid, args, kwargs in launches:
            launch = analyse(kernel, grid, args, kwargs, arch)
            spilling += launch.spilled_bytes > 0
            row = {"arch": arch, "case": case, **asdict(launch)}
            line = f"    {launch.kernel:22} {launch.programs:7} x {launch.warps} warps, {launch.registers:3} registers"
            line += f", {launch.spilled_bytes} B spilled"
            if card:
                seconds, unit = predicted(launch, card)
                row |= {"predicted_seconds": seconds, "limit": unit}
                load = " ".join(f"{k} {v:.0f}" for k, v in sorted(launch.cycles.items(), key=lambda i: -i[1]))
                line += f", {1e6 * seconds:8.1f} us by {unit} ({load} x {launch.trips:.0f}) {launch.shape}"
            print(line)
            rows.append(row)
        if card:
            total = sum(row["predicted_seconds"] for row in rows if row["case"] == case)
            exponentials = UPDATES.get(case, 0) / (card.lanes["mufu"] * card.processors * card.clock)
            share = f", {exponentials / total:.0%} of the speed at which exponentials can be taken" * (case in UPDATES)
            print(f"    together {1e6 * total:.1f} us{share}")
    return rows, spilling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="what to compile for")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES), help="which sizes")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.json:
        check_writable(options.json, "--json")
    results = [report(arch, options.case) for arch in options.arch]
    rows = [row for part, _ in results for row in part]
    spilling = sum(count for _, count in results)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(f"\n{len(rows)} kernels compiled, {spilling} with spilled registers. Predictions, not measurements.")
    return 1 if spilling else 0


if __name__ == "__main__":
    script(main)
