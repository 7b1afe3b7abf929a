"""vimamba ablate: train every bidirectional design under one budget and compare them."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from vimamba.cli import terminal
from vimamba.cli.ablate_page import save_plot, write_page
from vimamba.cli.parsing import add_options, take
from vimamba.errors import UserError, nearest, require
from vimamba.models import list_models
from vimamba.tasks.ablation import DESIGNS, Budget, Run, design_costs, open_study_data, run_design
from vimamba.tasks.optim import OptimOptions

COLUMNS = ("design", "top-1 %", "±", "runs", "lr", "steps", "parameters", "MFLOPs", "forward ms", "step ms")


@dataclasses.dataclass
class AblateOptions:
    """What to compare, on what, and where to keep the results.

    Args:
        data: mnist (built in), or digits of scikit-learn
        model: a vimamba model, whose other arguments are common to all designs
        model_args: keyword arguments of the model, such as --model_args.depth 4
        designs: which designs; all of them if not given
        seeds: runs of each design
        equal: "compute" gives every design the training FLOPs that the base design has in --epochs; "steps" the
            same number of steps
        epochs: passes over the training images, for the base design
        batch_size: images in a step
        lr: highest learning rates: the first seed tries each of them, the others take what was best for their design
        output: folder of runs.csv, table.md and designs.png; runs/ablate-DATA if not given
        page: write the documentation page, from the results of all studies beside the output folder, to this file
    """

    data: str = "mnist"
    model: str = "vim_nano"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    designs: list[str] | None = None
    seeds: int = 3
    equal: Literal["compute", "steps"] = "compute"
    epochs: int = 6
    batch_size: int = 64
    lr: list[float] = dataclasses.field(default_factory=lambda: [1.5e-3, 3e-3, 6e-3])
    output: str | None = None
    page: str | None = None

    def __post_init__(self) -> None:
        require(1 <= self.seeds <= 1000, f"--seeds is {self.seeds}; it must be from 1 to 1000")
        require(len(self.lr) > 0, "--lr: name at least one learning rate")
        require(all(0 < lr < math.inf for lr in self.lr), f"--lr is {self.lr}; learning rates are positive numbers")
        own = [name for name in list_models() if not name.startswith("vim_pyramid")]
        hint = nearest(self.model, own) or f"; they are {', '.join(own)}"
        require(self.model in own, f"--model {self.model}: the designs are those of vimamba's models{hint}")
        for name in self.designs or []:
            require(
                name in DESIGNS,
                f"--designs: there is no design '{name}'{nearest(name, DESIGNS) or '; they are ' + ', '.join(DESIGNS)}",
            )


def arguments(parser: ArgumentParser) -> None:
    add_options(parser, AblateOptions)


def run(parser: ArgumentParser, parsed: Namespace) -> int:
    options = take(AblateOptions, parsed)
    terminal.quiet_libraries()
    console = terminal.console()
    folder = Path(options.output or f"runs/ablate-{options.data}")
    optim = OptimOptions(epochs=options.epochs, batch_size=options.batch_size)
    budget = Budget(open_study_data(options.data), options.model, options.model_args, optim, options.equal)
    for line in budget.data.notes:
        terminal.warn(line)
    done = read_runs(folder)
    designs = buildable(options.designs or list(DESIGNS), budget)
    total, number = len(designs) * (len(options.lr) + options.seeds - 1), 0
    for seed in range(options.seeds):
        for design in designs:
            for lr in [best_lr(done.values(), design)] if seed else options.lr:
                number += 1
                if (design, seed, lr) in done:
                    continue
                finished = done[design, seed, lr] = run_design(design, seed, lr, budget)
                append_run(folder, finished)
                told = f"{number}/{total}  {design}, seed {seed}, learning rate {lr:g}"
                console.print(f"{told}: {terminal.percent(finished.top1)}%", markup=False)
    rows = summarise(list(done.values()))
    console.print(table(rows), width=max(console.width, 110))  # a pipe is taken for 80 columns wide
    skipping = [line for row in rows if (line := skip_line(row))]
    for line in skipping:
        console.print(line)
    common = " ".join(f"{name}={value}" for name, value in options.model_args.items())
    caption = (
        f"`{options.model}` {common}, batches of {options.batch_size}, the training {options.equal} of "
        f"{options.epochs} epochs of ssm_conv for every design, its learning rate the best of "
        f"{', '.join(f'{lr:g}' for lr in options.lr)} for the first seed."
    )
    lines = [caption, "", "| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (folder / "table.md").write_text("\n".join([*lines, "", *skipping]) + "\n", encoding="utf-8")
    save_plot(folder / "designs.png", rows, options.data)
    if options.page:
        write_page(Path(options.page), folder.parent, design_costs())
    return 0


def buildable(designs: list[str], budget: Budget) -> list[str]:
    """The designs that the common arguments leave possible; a warning says why another is not."""
    possible = []
    for design in designs:
        try:
            budget.build(design)
        except UserError as error:
            terminal.warn(f"{design} is left out: {error}")
        else:
            possible.append(design)
    require(bool(possible), "--model_args: no design can be built with them")
    return possible


def append_run(folder: Path, finished: Run) -> None:
    """Add a row to runs.csv."""
    path = folder / "runs.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Run)])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(dataclasses.asdict(finished))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def best_lr(runs: Iterable[Run], design: str) -> float:
    """The learning rate with which the first seed of a design did best."""
    return max((run for run in runs if run.design == design and run.seed == 0), key=lambda run: run.top1).lr


def read_runs(folder: Path) -> dict[tuple[str, int, float], Run]:
    """The finished runs of a folder; a row that was cut off is run again."""
    path = folder / "runs.csv"
    if not path.is_file():
        return {}
    kinds = get_type_hints(Run)
    runs = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(kinds):
            raise UserError(f"{path}: written by another version; delete it or choose another --output")
        for row in reader:
            if None in row.values():
                continue
            values: dict[str, Any] = {
                k: (float(v) if v else None) if k.startswith("skip_") else kinds[k](v) for k, v in row.items()
            }
            runs[values["design"], values["seed"], values["lr"]] = Run(**values)
    return runs


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """One row a design, at its best learning rate: mean and spread of its accuracies, the quickest of its times."""
    rows = []
    for design in DESIGNS:
        if not any(r.design == design and r.seed == 0 for r in runs):
            continue
        lr = best_lr(runs, design)
        own = [r for r in runs if r.design == design and r.lr == lr]
        top1 = [r.top1 for r in own]
        spread = statistics.stdev(top1) if len(own) > 1 else 0.0
        times = {name: min(getattr(r, name) for r in own) for name in ("forward_ms", "step_ms")}
        first = own[0]
        row = dict(design=design, lr=lr, top1=statistics.mean(top1), spread=spread, runs=len(own), steps=first.steps,
                   parameters=first.parameters, gflops=first.gflops, **times)  # fmt: skip
        if first.skip_share is not None:
            for name in ("skip_share", "skip_top1", "skip_forward_ms"):
                values = [getattr(r, name) for r in own]
                row[name] = min(values) if name.endswith("ms") else statistics.mean(values)
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as the table shows it."""
    return [
        row["design"], f"{100 * row['top1']:.2f}", f"{100 * row['spread']:.2f}", str(row["runs"]), f"{row['lr']:g}",
        str(row["steps"]), terminal.count(row["parameters"]), f"{1e3 * row['gflops']:.1f}", f"{row['forward_ms']:.1f}",
        f"{row['step_ms']:.1f}",
    ]  # fmt: skip


def skip_line(row: dict[str, Any]) -> str:
    """What skipping does to a gated design."""
    if "skip_share" not in row:
        return ""
    saved = 1 - row["skip_forward_ms"] / row["forward_ms"]
    return (
        f"{row['design']}: skipping {100 * row['skip_share']:.0f}% of the directions changes top-1 by "
        f"{100 * (row['skip_top1'] - row['top1']):+.2f} points and forward time by {-100 * saved:+.0f}%."
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """The study as a table in the terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(COLUMNS):
        shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*cells(row))
    return shown
