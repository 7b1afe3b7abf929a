"""Whole models beside timm's DeiT, and what is to be reached: `python benchmarks/models.py` (see --help).

Each comparison runs its models in turns, in blocks of seven runs of which the first two do not count (models that
alternate run by run push each other's weights out of the cache), and takes the median over rounds of the quotient
within a round, so that it holds on a machine that others use too. Other inference libraries run in processes of their
own, and memory is measured in a fresh process for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from floor import multiple
from rich.console import Console
from rich.table import Table
from runtimes import Elsewhere, missing

import vimamba
from vimamba.benchmark import Entry, Result, machine, measure, memory, report
from vimamba.benchmark.entries import build, step_of
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import BLOCK, alternate, quartiles, ratios

VIM_TI, DEIT_TI = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
VIM_S, DEIT_S = "vim_small_patch16_224", "deit_small_patch16_224"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row: what is measured, the bound that must be met, the one hoped for, and the measurement."""

    what: str
    at_least: float
    aim: float
    unit: str
    measure: Callable[[Effort], Measured]
    lower_is_better: bool = False
    slow: bool = False

    def met(self, value: float, bound: float) -> bool:
        return value <= bound if self.lower_is_better else value >= bound


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long each comparison may take."""

    repeats: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """The value of a row, a remark, and the results behind it."""

    value: float
    remark: str
    results: list[Result] = dataclasses.field(default_factory=list)


def speed(ours: str, peer: str, size: int, **options: Any) -> Callable[[Effort], Measured]:
    """How many times as fast as the peer with fused attention."""
    pair = [Entry(name, size, **options) for name in (ours, peer)]
    return lambda effort: _compared(effort, pair, lambda quotient: quotient)


def small_step() -> Callable[[Effort], Measured]:
    """The train step of vim_nano against a ViT with as many tokens (81) and parameters (a quarter of a million)."""
    small = {"size": 36, "batch": 32, "passes": "train"}
    vit = {"patch_size": 4, "embed_dim": 64, "depth": 5, "num_heads": 4, "num_classes": 10}
    pair = [
        Entry("vim_nano", model_args={"stride": 4}, **small),
        Entry("vit_tiny_patch16_224", model_args=vit, **small),
    ]
    return lambda effort: _compared(effort, pair, lambda quotient: quotient)


def second_direction(size: int) -> Callable[[Effort], Measured]:
    """Per cent that the second direction adds to the time."""
    one = Entry(VIM_TI, size, model_args={"bidirectional": "none"}, label="Vim-Ti one direction")
    return lambda effort: _compared(effort, [one, Entry(VIM_TI, size)], lambda quotient: 100 * (quotient - 1))


def _compared(effort: Effort, pair: Sequence[Entry], scale: Callable[[float], float]) -> Measured:
    """The time of the second entry as a multiple of the first's, scaled."""
    results = measure(pair, effort.repeats, effort.seconds, with_memory=False, block=BLOCK)
    first, second = results
    if first.median is None or second.median is None or second.relative is None:
        return Measured(math.nan, f"{first.error or second.error}", results)
    quotients = [scale(b / a) for a, b in zip(first.seconds, second.seconds, strict=True)]
    low, _, high = quartiles(quotients)
    remark = f"{1000 * first.median:.0f} and {1000 * second.median:.0f} ms, quartiles {low:.2f} and {high:.2f}"
    return Measured(scale(second.relative), remark, results)


def less_memory(passes: str, attention: str) -> Callable[[Effort], Measured]:
    """Per cent by which the peak beyond the loaded model changes from DeiT-Ti to Vim-Ti."""

    def run(effort: Effort) -> Measured:
        try:
            ours = _peak(Entry(VIM_TI, 1248, passes=passes))
            theirs = _peak(Entry(DEIT_TI, 1248, passes=passes, attention=attention))
        except memory.StepError as error:
            return Measured(math.nan, str(error))
        return Measured(100 * (ours / theirs - 1), f"{ours / 1e6:.0f} against {theirs / 1e6:.0f} MB")

    return run


@functools.cache
def _peak(entry: Entry) -> float:
    return memory.peak(entry) or math.nan


def above_floor(size: int, **options: Any) -> Callable[[Effort], Measured]:
    """Time as a multiple of the least possible."""

    def run(effort: Effort) -> Measured:
        times, floor = multiple(Entry(VIM_TI, size, **options), effort.repeats, effort.seconds, BLOCK)
        return Measured(times, f"floor {floor}")

    return run


def than_elsewhere(runtime: str, size: int, batch: int = 1, dtype: str = "float32") -> Callable[[Effort], Measured]:
    """How many times as fast Vim-Ti is as DeiT-Ti in another inference library."""

    def run(effort: Effort) -> Measured:
        if sentence := missing(runtime):
            return Measured(math.nan, sentence)
        entry = Entry(VIM_TI, size, batch, dtype)
        with Elsewhere(runtime, DEIT_TI, size, batch, dtype) as theirs:
            return _quotient(effort, step_of(entry, build(entry)), theirs)

    return run


def than_itself(first: Entry, second: Entry, quantized: bool = False) -> Callable[[Effort], Measured]:
    """How many times as fast the first is as the second, which is the same model in another type."""

    def run(effort: Effort) -> Measured:
        model = build(first)
        return _quotient(
            effort,
            step_of(first, vimamba.quantize(model) if quantized else model),
            step_of(second, build(second)),
        )

    return run


def _quotient(effort: Effort, ours: Callable[[], None], theirs: Callable[[], None]) -> Measured:
    for warm_up in (ours, theirs):
        warm_up()
    times = alternate([ours, theirs], effort.repeats, effort.seconds, block=BLOCK)
    low, middle, high = ratios(times[1], times[0])
    of_ours, of_theirs = (1000 * quartiles(seconds)[1] for seconds in times)
    remark = f"{of_ours:.0f} and {of_theirs:.0f} ms, quartiles {low:.2f} and {high:.2f}"
    return Measured(middle, remark)


def _entry(size: int, dtype: str = "float32") -> Entry:
    return Entry(VIM_TI, size, dtype=dtype)


GOALS = [
    Goal("Vim-Ti against DeiT-Ti fused, 1248 px, float32", 2.8, 4, "x", speed(VIM_TI, DEIT_TI, 1248)),
    Goal("Vim-Ti against DeiT-Ti fused, 1248 px, bfloat16", 2, 3, "x", speed(VIM_TI, DEIT_TI, 1248, dtype="bfloat16")),
    Goal("bfloat16 against float32, 224 px", 1.4, 1.7, "x", than_itself(_entry(224, "bfloat16"), _entry(224))),
    Goal("bfloat16 against float32, 1248 px", 1.4, 1.7, "x", than_itself(_entry(1248, "bfloat16"), _entry(1248))),
    Goal("8-bit integers against float32, 224 px", 1.3, 1.7, "x", than_itself(_entry(224), _entry(224), True)),
    Goal("DeiT-Ti in OpenVINO, 224 px, float32", 0, 1, "x", than_elsewhere("openvino", 224)),
    Goal("DeiT-Ti in OpenVINO, 224 px, bfloat16", 0, 1, "x", than_elsewhere("openvino", 224, dtype="bfloat16")),
    Goal("DeiT-Ti in OpenVINO, 512 px, bfloat16", 0.85, 1, "x", than_elsewhere("openvino", 512, dtype="bfloat16")),
    Goal("DeiT-Ti in OpenVINO, 1248 px, bfloat16", 3, 3.6, "x", than_elsewhere("openvino", 1248, dtype="bfloat16")),
    Goal("DeiT-Ti in ONNX Runtime, 224 px, float32", 0, 1, "x", than_elsewhere("onnxruntime", 224)),
    Goal("DeiT-Ti in ONNX Runtime, 1248 px, float32", 0, 3, "x", than_elsewhere("onnxruntime", 1248)),
    Goal("Vim-Ti against DeiT-Ti fused, 512 px", 1, 1.3, "x", speed(VIM_TI, DEIT_TI, 512)),
    Goal("Vim-Ti against DeiT-Ti fused, 224 px, batch 1", 0.95, 1.1, "x", speed(VIM_TI, DEIT_TI, 224)),
    Goal("Vim-Ti against DeiT-Ti fused, 224 px, batch 8", 0.95, 1.1, "x", speed(VIM_TI, DEIT_TI, 224, batch=8)),
    Goal("the same in bfloat16, batch 1", 0.9, 1.1, "x", speed(VIM_TI, DEIT_TI, 224, dtype="bfloat16")),
    Goal("the same in bfloat16, batch 8", 1, 1.2, "x", speed(VIM_TI, DEIT_TI, 224, batch=8, dtype="bfloat16")),
    Goal("Vim-S against DeiT-S fused, 1248 px, float32", 2, 2.8, "x", speed(VIM_S, DEIT_S, 1248), slow=True),
    Goal("train step, 224 px, batch 8", 0.75, 1, "x", speed(VIM_TI, DEIT_TI, 224, batch=8, passes="train")),
    Goal("train step, 512 px, batch 2", 1.1, 1.5, "x", speed(VIM_TI, DEIT_TI, 512, batch=2, passes="train")),
    Goal("train step, vim_nano against a ViT, batch 32", 1, 1.5, "x", small_step()),
    Goal("train step, 1248 px, batch 1", 2, 3, "x", speed(VIM_TI, DEIT_TI, 1248, passes="train"), slow=True),
    Goal("peak memory, forward, 1248 px, DeiT eager", -86.8, -86.8, "%", less_memory("forward", "eager"), True),
    Goal("peak memory, forward, 1248 px, DeiT fused", math.inf, 0, "%", less_memory("forward", "fused"), True),
    Goal("peak memory, train step, 1248 px, DeiT fused", 0, -50, "%", less_memory("train", "fused"), True, slow=True),
    Goal("second direction, 224 px", 45, 30, "%", second_direction(224), True),
    Goal("second direction, 1248 px", 45, 30, "%", second_direction(1248), True),
    *(
        Goal(f"multiple of the floor, {size} px, {dtype}", 1.5, 1.25, "x", above_floor(size, dtype=dtype), True)
        for size in (224, 512, 1248)
        for dtype in ("float32", "bfloat16")
    ),
]


def main() -> None:
    """Measure the rows, print each beside its goal, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds a row, and without the slowest rows")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=20, help="time for the rounds of a row; at least three rounds")
    parser.add_argument("--repeats", type=int, default=30, help="rounds at most")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark-models.json"), help="file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's own choice by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    effort = Effort(3, 0.0) if options.quick else Effort(options.repeats, options.seconds)
    report.check_writable(options.json, "--json", parents=True)

    console = Console(highlight=False, width=200)
    facts = machine.describe("cpu")
    console.print(machine.heading(facts) + "\n", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("what", "at least", "aim", "measured", ""):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("what", "") else "right")
    rows = []
    for goal in GOALS:
        if options.only not in goal.what or (options.quick and goal.slow):
            continue
        with console.status(goal.what):
            measured = goal.measure(effort)
        rows.append(_row(goal, measured))
        table.add_row(*_cells(goal, measured))
        options.json.write_text(json.dumps({"schema": 1, "machine": facts, "rows": rows}, indent=1) + "\n")
        console.print(f"{goal.what}: {measured.value:.2f}{goal.unit}, {measured.remark}", markup=False)
    console.print()
    console.print(table)
    console.print(f"\nmeasurements: {options.json}", markup=False)


def _row(goal: Goal, measured: Measured) -> dict[str, Any]:
    return {
        "what": goal.what,
        "at_least": None if goal.at_least in (0, math.inf) else goal.at_least,
        "aim": goal.aim,
        "unit": goal.unit,
        "measured": None if math.isnan(measured.value) else measured.value,
        "remark": measured.remark,
        "results": [report.as_row(result) for result in measured.results],
    }


def _cells(goal: Goal, measured: Measured) -> list[str]:
    sign = "≤ " if goal.lower_is_better else ""
    bounds = ["-" if bound in (0, math.inf) else f"{sign}{bound:g}{goal.unit}" for bound in (goal.at_least, goal.aim)]
    met = goal.met(measured.value, goal.at_least)
    colour = "green" if goal.met(measured.value, goal.aim) else "yellow" if met else "red"
    return [goal.what, *bounds, f"[{colour}]{measured.value:.2f}{goal.unit}[/]", measured.remark]


if __name__ == "__main__":
    script(main)
