"""What a study of designs found: its runs in a CSV file, and studies and costs in one JSON file beside the page."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from vimamba import files
from vimamba.errors import UserError, one_line
from vimamba.tasks.ablation import DESIGNS, Trial


@dataclasses.dataclass
class Row:
    """One design at its best learning rate: its accuracy's mean and deviation over runs, the quickest of its times."""

    design: str
    top1: float
    spread: float
    runs: int
    lr: float
    steps: int
    parameters: int
    gflops: float
    forward_ms: float
    step_ms: float
    skip_share: float | None = None
    skip_top1: float | None = None
    skip_forward_ms: float | None = None


@dataclasses.dataclass
class Study:
    """The designs on one data set, and the budget that they had in common."""

    model: str
    model_args: dict[str, Any]
    batch_size: int
    equal: str
    epochs: int
    lrs: list[float]
    rows: list[Row]

    def row(self, design: str) -> Row | None:
        return next((row for row in self.rows if row.design == design), None)


@dataclasses.dataclass
class Findings:
    """All studies by the name of their data, and what `design_costs` measured."""

    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    studies: dict[str, Study] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Findings:
        """From a file that `write` made; nothing where there is none.

        Raises:
            UserError: it is another's.
        """
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            studies = {
                name: Study(**{**study, "rows": [Row(**row) for row in study["rows"]]})
                for name, study in found["studies"].items()
            }
            return cls(dict(found["costs"]), studies)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: holds no studies of this version ({one_line(error)}); move it away or name another --page"
            ) from error

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        files.write_text(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")


def difference(row: Row, other: Row) -> tuple[float, bool]:
    """How many points of accuracy the first is above the other, and whether the seeds tell them apart."""
    points = 100 * (row.top1 - other.top1)
    return points, min(row.runs, other.runs) > 1 and abs(points) > 100 * (row.spread + other.spread)


def append_run(folder: Path, finished: Trial) -> None:
    """Add a row to runs.csv."""
    path = folder / "runs.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Trial)])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(dataclasses.asdict(finished))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_runs(folder: Path) -> dict[tuple[str, int, float], Trial]:
    """The finished runs of a folder; a row that was cut off is run again."""
    path = folder / "runs.csv"
    if not path.is_file():
        return {}
    kinds = get_type_hints(Trial)
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
            runs[values["design"], values["seed"], values["lr"]] = Trial(**values)
    return runs


def best_lr(runs: Iterable[Trial], design: str) -> float:
    """The learning rate with which the first seed of a design did best."""
    return max((run for run in runs if run.design == design and run.seed == 0), key=lambda run: run.top1).lr


def summarise(runs: Sequence[Trial]) -> list[Row]:
    """One row for each design that has a run of the first seed."""
    tried = {run.design for run in runs if run.seed == 0}
    return [_row([run for run in runs if run.design == design], design) for design in DESIGNS if design in tried]


def _row(runs: list[Trial], design: str) -> Row:
    lr = best_lr(runs, design)
    best = [run for run in runs if run.lr == lr]
    first, top1 = best[0], [run.top1 for run in best]
    row = Row(
        design, statistics.mean(top1), statistics.stdev(top1) if len(best) > 1 else 0.0, len(best), lr, first.steps,
        first.parameters, first.gflops, min(run.forward_ms for run in best), min(run.step_ms for run in best),
    )  # fmt: skip
    skipping = [(run.skip_share, run.skip_top1, run.skip_forward_ms) for run in best if run.skip_share is not None]
    if skipping:
        shares, skipped_top1, times = zip(*skipping, strict=True)
        row.skip_share, row.skip_top1 = statistics.mean(shares), statistics.mean(skipped_top1)
        row.skip_forward_ms = min(times)
    return row
