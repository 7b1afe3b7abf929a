"""What a run has reached so far, epoch by epoch."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any


@dataclasses.dataclass
class Record:
    """A row for each epoch, the best of them with its classes, and the seconds spent training."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    best_classes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    monitor: str = "val_top1"  # the column that decides

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = list(state_dict["rows"]), dict(state_dict["best"])
        self.best_classes, self.seconds = list(state_dict["best_classes"]), state_dict["seconds"]
        self.monitor = state_dict.get("monitor", self.monitor)

    def add(self, row: dict[str, Any], per_class: list[dict[str, Any]], monitor: str, mode: str) -> bool:
        """Take in an epoch; whether it is the best so far: `monitor` names the column that decides, mode max or min."""
        self.rows.append(row)
        self.monitor, sign = monitor, {"max": 1, "min": -1}[mode]
        better = not self.best or sign * row[monitor] > sign * self.best[monitor]
        if better:
            self.best, self.best_classes = row, per_class
        return better

    def to_csv(self) -> str:
        """The epochs as a table."""
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        return text.getvalue()
