"""What people see: consoles, warnings, bars and tables."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vimamba.tasks.results import ClassResult

WORST_SHOWN = 20


def console(stderr: bool = False) -> Console:
    """A console on today's stdout or stderr (tests replace them); never wraps in a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):  # a notebook's takes anything
        stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    return Console(file=stream, highlight=False, soft_wrap=True, markup=True, emoji=False)


def warn(line: str) -> None:
    """One line on stderr."""
    err = console(stderr=True)
    err.print("[yellow]warning:[/] ", end="")
    err.print(line, markup=False)


def quiet_libraries() -> None:
    """Leave the terminal to our own lines: no tips, hints or advice of the libraries."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero",
                 "lightning.fabric.utilities.rank_zero", "timm", "torch.distributed"):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics|timm)(\.|$)")


def progress_bar(to: Console, *extra: Any) -> Progress:
    """A bar with counts, time spent and time left, gone when done; nothing where no one watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *extra,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=to,
        transient=True,
        disable=not to.is_terminal,
    )


def percent(share: float | None) -> str:
    """A share as the terminal shows it."""
    return "-" if share is None else f"{100 * share:.2f}"


def print_classes(to: Console, classes: list[ClassResult]) -> None:
    """The table of classes, the worst of them where they are many."""
    rows, title = classes, None
    if len(rows) > WORST_SHOWN:
        rows = sorted(rows, key=lambda row: (row.recall is None, row.recall or 0.0))[:WORST_SHOWN]
        title = f"the {WORST_SHOWN} classes found least often, of {len(classes)}"
    to.print(class_table(rows, title))


def class_table(rows: list[ClassResult], title: str | None) -> Table:
    """Classes in rows."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    table.add_column("class", overflow="fold")
    for heading in ("images", "found", "recall %", "precision %", "F1 %"):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = [percent(share) for share in (row.recall, row.precision, row.f1)]
        table.add_row(row.name.replace("[", r"\["), str(row.images), str(row.correct), *shares)
    return table


def count(number: int) -> str:
    """A number of parameters, such as 7.1 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
