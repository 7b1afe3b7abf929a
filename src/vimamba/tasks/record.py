"""What a run has reached so far, epoch by epoch."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

from vimamba.tasks.results import ClassResult


@dataclasses.dataclass
class Record:
    """A row for each epoch, the best of them with its classes, and the seconds spent training."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    best_classes: list[ClassResult] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = list(state_dict["rows"]), dict(state_dict["best"])
        self.best_classes = [ClassResult(**row) for row in state_dict["best_classes"]]
        self.seconds = state_dict["seconds"]

    def add(self, row: dict[str, Any], per_class: list[ClassResult]) -> bool:
        """Take in an epoch; whether it is the best so far."""
        self.rows.append(row)
        better = not self.best or row["val_top1"] > self.best["val_top1"]
        if better:
            self.best, self.best_classes = row, per_class
        return better

    def to_csv(self) -> str:
        """The epochs as a table."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        return text.getvalue()
