"""vimamba ablate: train every bidirectional design under one budget and compare them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from vimamba.cli import terminal
from vimamba.cli.ablate_page import markdown_table, plot_of, save_plot, skipping_lines, terminal_table, write_page
from vimamba.cli.parsing import add_options, take
from vimamba.errors import UserError, nearest, require
from vimamba.files import write_text
from vimamba.models import list_models
from vimamba.quiet import quiet_libraries
from vimamba.tasks.ablation import DESIGNS, Budget, Trial, design_costs, open_study_data, run_design
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.study import Findings, Study, append_run, best_lr, read_runs, summarise


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
        page: write the documentation page to this file; it shows every study in the JSON file of the same name, which
            this one is added to
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
        models = [name for name in list_models() if not name.startswith("vim_pyramid")]
        hint = nearest(self.model, models) or f"; they are {', '.join(models)}"
        require(self.model in models, f"--model {self.model}: the designs are those of vimamba's models{hint}")
        for name in self.designs or []:
            require(
                name in DESIGNS,
                f"--designs: there is no design '{name}'{nearest(name, DESIGNS) or '; they are ' + ', '.join(DESIGNS)}",
            )


def arguments(parser: ArgumentParser) -> None:
    add_options(parser, AblateOptions)


def run(parser: ArgumentParser, parsed: Namespace) -> int:
    options = take(AblateOptions, parsed)
    quiet_libraries()
    console = terminal.console()
    folder = Path(options.output or f"runs/ablate-{options.data}")
    page = Path(options.page) if options.page else None
    findings = Findings.read(page.with_suffix(".json")) if page else Findings()
    done = train_designs(options, folder, console)
    study = Study(
        options.model, options.model_args, options.batch_size, options.equal, options.epochs, options.lr,
        summarise(list(done.values())),
    )  # fmt: skip
    console.print(terminal_table(study), width=max(console.width, 110))  # a pipe is taken for 80 columns wide
    for line in skipping_lines(study):
        console.print(line)
    write_text(folder / "table.md", markdown_table(study) + "\n")
    save_plot(folder / "designs.png", study, options.data)
    if page:
        findings.studies[options.data], findings.costs = study, design_costs()
        write_page(page, findings)
        save_plot(plot_of(page, options.data), study, options.data)
    return 0


def train_designs(options: AblateOptions, folder: Path, console: Console) -> dict[tuple[str, int, float], Trial]:
    """The runs of a study; those that the folder holds already are not trained again."""
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
                place = f"{number}/{total}  {design}, seed {seed}, learning rate {lr:g}"
                console.print(f"{place}: {terminal.percent(finished.top1)}%", markup=False)
    return done


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
