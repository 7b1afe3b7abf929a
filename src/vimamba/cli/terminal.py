"""What people see: consoles, warnings, bars and tables."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vimamba.cli.spelling import dashed

WORST_SHOWN = 20
SECONDS_BETWEEN_LINES = 30.0


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
    err.print(dashed(line), markup=False)


def progress_bar(to: Console, *extra: Any) -> Progress:
    """A bar with counts, time spent and time left, gone when done; lines now and then where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *extra,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=to, transient=True) if to.is_terminal else Lines(console=to)


class Lines(Progress):
    """Progress in a file or a pipe: a line every half minute."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self.said = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if now - self.said < SECONDS_BETWEEN_LINES or not task.total:
            return
        self.said = now
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        gone, part = duration(task.elapsed or 0.0), f"{task.percentage:.0f} %"
        self.console.print(
            f"{task.description}: {task.completed:.0f} of {task.total:.0f} ({part}), {gone} gone{left}",
            markup=False,
        )


def duration(seconds: float) -> str:
    """12 s, 3:05 or 2:03:04."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def percent(share: float | None) -> str:
    """A share as the terminal shows it; COCO's numbers are -1 where there is nothing to find."""
    return "-" if share is None or share < 0 else f"{100 * share:.2f}"


def cell(heading: str, value: float) -> str:
    """A number under its heading, which ends in % for shares."""
    return percent(value) if heading.endswith("%") else f"{value:.4g}"


def said(heading: str, value: float) -> str:
    """A number in a sentence: 98.20% top-1."""
    return f"{percent(value)}% {heading.removesuffix(' %')}" if heading.endswith("%") else f"{heading} {value:.4g}"


# The columns of a table of classes: whole numbers, then shares.
HEADINGS = {
    "correct": "found", "recall": "recall %", "precision": "precision %", "f1": "F1 %", "iou": "IoU %", "ap": "AP %",
    "ap_50": "AP50 %", "mask_ap": "mask AP %", "mask_ap_50": "mask AP50 %",
}  # fmt: skip


def print_classes(to: Console, classes: list[dict[str, Any]]) -> None:
    """The table of classes, the worst of them (by their first share) where they are many."""
    rows, title = classes, None
    if len(rows) > WORST_SHOWN:
        share = next(name for name in rows[0] if HEADINGS.get(name, "").endswith("%"))
        rows = sorted(rows, key=lambda row: (row[share] is None, row[share] or 0.0))[:WORST_SHOWN]
        title = f"the {WORST_SHOWN} classes with the lowest {share}, of {len(classes)}"
    if rows:
        to.print(class_table(rows, title))


def class_table(rows: list[dict[str, Any]], title: str | None) -> Table:
    """Classes in rows."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    table.add_column("class", overflow="fold")
    names = [name for name in rows[0] if name != "name"]
    for name in names:
        table.add_column(HEADINGS.get(name, name), justify="right")
    for row in rows:
        cells = [percent(row.get(name)) if HEADINGS.get(name, "").endswith("%") else str(row[name]) for name in names]
        table.add_row(row["name"].replace("[", r"\["), *cells)
    return table


def count(number: int) -> str:
    """A number of parameters, such as 7.1 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
