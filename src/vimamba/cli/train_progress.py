"""The terminal during training: one bar for the whole run, one line for each epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import TextColumn

from vimamba.cli.terminal import cell, duration, progress_bar
from vimamba.tasks.run_keeper import RunKeeper

HEADER = f"{'epoch':>7}  {'rate':>8}  {'loss':>7}"


class TrainProgress(pl.Callback):
    """Shows where a run is and when it will be done."""

    def __init__(self, console: Console, keeper: RunKeeper):
        self.console, self.keeper = console, keeper
        self.bar = progress_bar(console, TextColumn("loss {task.fields[loss]}"))
        self.task: Any = None
        self.pick: Callable[..., float] = max
        self.headings: dict[str, str] = {}
        self.columns: dict[str, str] = {}
        self.loss: float | None = None
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.pick = max if pl_module.mode == "max" else min
        self.headings = {"loss": "held-out loss", **pl_module.columns}
        for row in self.keeper.record.rows:
            self._print_row(row, trainer)
        val_batches = sum(int(n) for n in trainer.num_val_batches)
        train_batches = int(trainer.num_training_batches)
        done = trainer.datamodule.batches_done  # type: ignore[attr-defined]
        each = train_batches + val_batches
        self.task = self.bar.add_task(
            "", total=(trainer.max_epochs or 0) * each, completed=len(self.keeper.record.rows) * each + done, loss="-"
        )
        self.bar.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._describe(trainer, "")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.task is None:
            return
        # Reading the loss waits for the device, so not at every step.
        if batch_idx % 10 == 0 and self.console.is_terminal:
            value = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self.loss = value if self.loss is None else 0.7 * self.loss + 0.3 * value
            self.bar.update(self.task, loss=f"{self.loss:.3f}")
        self.bar.advance(self.task)
        if self.keeper.signals.asked:
            self._describe(trainer, " (stopping)")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._describe(trainer, " (held-out images)")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.advance(self.task)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.task is not None and self.keeper.record.rows:
            self._print_row(self.keeper.record.rows[-1], trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._stop_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop_bar()

    def _stop_bar(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.stop()

    def _describe(self, trainer: pl.Trainer, what: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{what}")

    def _print_row(self, row: dict[str, Any], trainer: pl.Trainer) -> None:
        if not self.columns:  # which depend on the model too: not every detector has masks
            self.columns = {f"val_{name}": text for name, text in self.headings.items() if f"val_{name}" in row}
            self.console.print(f"[bold]{HEADER}{''.join(f'  {h:>7}' for h in self.columns.values())}  {'time':>7}[/]")
        seconds, self.seconds = row["seconds"] - self.seconds, row["seconds"]
        rows, monitor = self.keeper.record.rows[: row["epoch"]], self.keeper.record.monitor
        best = row[monitor] == self.pick(r[monitor] for r in rows)
        epoch = f"{row['epoch']}/{trainer.max_epochs}"
        cells = {name: f"{cell(heading, row[name]):>{max(7, len(heading))}}" for name, heading in self.columns.items()}
        if best and monitor in cells:
            cells[monitor] = f"[bold green]{cells[monitor]}[/]"
        self.console.print(
            f"{epoch:>7}  {row['lr']:>8.2g}  {row['train_loss']:>7.4f}  {'  '.join(cells.values())}  "
            f"{duration(seconds):>7}"
        )
