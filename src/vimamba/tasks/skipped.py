"""Files that could not be decoded: named, counted, and too many of them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from vimamba.errors import require


class SkippedFiles(pl.Callback):
    """Names each file that could not be decoded, once; stops the run when they are too many."""

    def __init__(self, warn: Any, most: float = 0.01):
        self.warn, self.most = warn, most
        self.seen: set[str] = set()
        self.counts: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(batch.skipped, "training", len(trainer.datamodule.data.train))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.note(batch.skipped, "held-out", len(trainer.datamodule.data.val))

    def note(self, skipped: list[str], which: str, count: int) -> None:
        """Take in a batch's lines on files that could not be decoded."""
        for line in skipped:
            if line not in self.seen:
                self.seen.add(line)
                self.counts[which] = self.counts.get(which, 0) + 1
                self.warn(f"{line}; skipped")
        bad = self.counts.get(which, 0)
        none_left = f"stopped: none of the {count} {which} images can be decoded; the warnings say why"
        require(bad < max(count, 1), none_left)
        require(
            bad <= self.most * count,
            f"stopped: {bad} of the {count} {which} images cannot be decoded, more than {self.most:.0%}; "
            "the warnings name them: repair or remove them",
        )
