"""vimamba bench: time and memory of models side by side."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from vimamba.benchmark import Entry, machine, measure, report
from vimamba.benchmark.entries import ATTENTIONS, DTYPES, MODES, PASSES, check_name
from vimamba.cli import terminal
from vimamba.errors import UserError, nearest, require
from vimamba.processes import cores
from vimamba.quiet import quiet_libraries


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    add = parser.add_argument
    add("--models", type=str, nargs="+", default=["vim_tiny_patch16_224"], help="models to measure, of vimamba or timm")
    add("--against", type=str, nargs="*", default=["deit_tiny_patch16_224"], help="peers to measure beside them")
    add("--sizes", type=int, nargs="+", default=[224, 512], help="image heights and widths, pixels")
    add("--batch", type=int, nargs="+", default=[1], help="images in one step")
    add(
        "--dtype",
        type=str,
        nargs="+",
        default=["float32"],
        help="float32, bfloat16 or float16; autocast for the last two",
    )
    add("--passes", type=str, nargs="+", default=["forward"], help="forward, train (with backward and AdamW step)")
    add("--attention", type=str, nargs="+", default=["fused"], help="how peers attend: fused, eager")
    add("--device", type=str, default="cpu", help="cpu or cuda")
    add("--mode", type=str, nargs="+", default=["eager"], help="eager, compile (torch.compile), graph (CUDA graph)")
    add("--threads", type=int | None, default=None, help="threads on a CPU; PyTorch's own choice if not given")
    add("--repeats", type=int, default=20, help="times that each model runs at most")
    add("--seconds", type=float, default=10.0, help="time for the runs of one size; each model runs at least 3 times")
    add("--memory", type=bool, default=True, help="measure peak memory too, each model in a process of its own")
    add("--json", type=str | None, default=None, help="also write everything measured to this file")
    add("--plot", type=str | None, default=None, help="also draw time and memory against resolution (.png, .svg, .pdf)")


def run(parser: ArgumentParser, options: Namespace) -> int:
    """Measure, print the table, write the files; the exit status is 1 if a model could not run."""
    quiet_libraries()
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine.describe(options.device)
    console = terminal.console()
    console.width = max(console.width, 100)  # rather wrapped than cut
    console.print(machine.heading(facts) + "\n", markup=False)
    with terminal.console(stderr=True).status("counting operations") as status:
        results = measure(
            entries(options), options.repeats, options.seconds, options.memory, lambda line: status.update(line)
        )
    for table in report.tables(results):
        console.print(table)
        console.print()
    console.print(
        "[dim]ms: median time of a step; spread: half the interquartile range; relative: time beside the first model "
        "of that size; extra MB: peak memory beyond the loaded model[/]"
    )
    if options.json:
        report.write_json(options.json, facts, results)
    if options.plot:
        report.plot(options.plot, machine.heading(facts), results)
    for kind, path in (("measurements", options.json), ("plot", options.plot)):
        if path:
            console.print(f"{kind}: {path}", markup=False)
    return 1 if any(result.error for result in results) else 0


def entries(options: Namespace) -> list[Entry]:
    """Every combination asked for."""
    kinds = itertools.product(
        options.passes,
        options.dtype,
        options.batch,
        options.sizes,
        options.models + options.against,
        options.attention,
        options.mode,
    )
    return [
        Entry(model, size, batch, dtype, passes, attention, options.device, mode)
        for passes, dtype, batch, size, model, attention, mode in kinds
    ]


def check(options: Namespace) -> None:
    """Raise UserError for what cannot be measured, before anything is."""
    for key in ("models", "sizes", "batch", "dtype", "passes", "attention", "mode"):
        require(bool(options[key]), f"--{key}: give at least one")
    for key, known in (("dtype", tuple(DTYPES)), ("passes", PASSES), ("attention", ATTENTIONS), ("mode", MODES)):
        for value in options[key]:
            require(value in known, f"--{key} {value}: it is {' or '.join(known)}{nearest(value, known)}")
    most = {"sizes": 16384, "batch": 65536, "threads": 16 * cores(), "repeats": 10**6}
    for key, bound in most.items():
        for value in options[key] if isinstance(options[key], list) else [options[key]]:
            require(
                value is None or 1 <= value <= bound, f"--{key} {value}: it must be at least 1, and at most {bound}"
            )
    require(0 <= options.seconds < math.inf, f"--seconds {options.seconds}: it must be a time of 0 or more")
    for name in (*options.models, *options.against):
        check_name(name)
    check_device(options.device)
    graphs = options.device.startswith("cuda") and "train" not in options.passes
    require("graph" not in options.mode or graphs, "--mode graph: it is for --device cuda and --passes forward")
    for key in ("json", "plot"):
        if options[key]:
            report.check_writable(options[key], f"--{key}")
    suffix = Path(options.plot or "plot.png").suffix
    require(suffix in report.PLOTS, f"--plot {options.plot}: the name must end in {', '.join(report.PLOTS)}")


def check_device(name: str) -> None:
    """Raise UserError unless PyTorch can compute there."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UserError(f"--device {name}: it is cpu or cuda") from None
    require(kind in ("cpu", "cuda"), f"--device {name}: it is cpu or cuda")
    require(kind == "cpu" or torch.cuda.is_available(), f"--device {name}: PyTorch finds no such device here")
