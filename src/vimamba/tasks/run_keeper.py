"""When a run is saved: as often as asked, after each epoch, at a signal; and never in a state that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from vimamba.errors import UserError
from vimamba.tasks.checkpoint_every import CheckpointEvery
from vimamba.tasks.figures import save_curves
from vimamba.tasks.record import Record
from vimamba.tasks.run_folder import CURVES, LAST, METRICS, PER_CLASS, WEIGHTS, RunFolder
from vimamba.tasks.signals import StoppedBySignal, StopSignals
from vimamba.tasks.task import Task
from vimamba.tasks.weights import save_model

LOOK_EVERY = 10  # steps; looking at a loss waits for the device


class RunKeeper(pl.Callback):
    """Keeps a run's record and its files."""

    def __init__(self, folder: RunFolder, every: CheckpointEvery, signals: StopSignals, trained_on: str):
        self.folder, self.every, self.signals, self.trained_on = folder, every, signals, trained_on
        self.record = Record()
        self.started = False  # whether everything that a checkpoint brings has been taken in
        self.saved_at = self._resumed_at = ""  # places in the run: of the last checkpoint, of the one resumed
        self._world = 0  # processes that the resumed run had
        self._last_seen = self._last_saved = 0.0

    @property
    def state_key(self) -> str:
        return "RunFolder"  # as in the checkpoints of version 0.1

    def state_dict(self) -> dict[str, Any]:
        return {**self.record.state_dict(), "world": self._world}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record.load_state_dict(state_dict)
        self._world = int(state_dict.get("world", 0))

    # -- the moments of a run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()  # Lightning has taken SIGTERM in the meantime
        self._last_seen = self._last_saved = time.monotonic()
        if self.folder.resumable and (self.record.rows or trainer.global_step):
            done = trainer.datamodule.batches_done  # type: ignore[attr-defined]
            self.saved_at = _place(trainer.current_epoch + 1, done) if done else _place(trainer.current_epoch)
            if done and self._world not in (0, trainer.world_size):
                raise UserError(
                    f"`resume` {self.folder.path}: it stopped within epoch {trainer.current_epoch + 1}, whose images "
                    f"are dealt out to {self._world} processes, not {trainer.world_size}; resume it on as many devices"
                )
        self._world, self._resumed_at, self.started = trainer.world_size, self.saved_at, True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count_time()
        task: Task = pl_module
        look = task.device.type == "cpu" or (batch_idx + 1) % LOOK_EVERY == 0
        diverged = look and task.diverged()
        asked, due = bool(self.signals.asked), self._due(trainer)
        if not _any(trainer, diverged or asked or due):  # the common case costs a single exchange
            return
        where = _place(trainer.current_epoch + 1, batch_idx + 1)
        if _any(trainer, diverged):
            raise self._diverged(task, f"the loss is no finite number at {where}")
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.is_last_batch:  # an epoch is saved after its validation
            return
        if _any(trainer, asked):
            self._save(trainer, task, where)
            raise StoppedBySignal(self.signals.asked or 2, where)
        self._save(trainer, task, where)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        task: Task = pl_module  # type: ignore[assignment]
        results = task.evaluated
        assert results is not None
        self._count_time()
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **{name: value for name, value in logged.items() if name.startswith(("train_", "val_"))},
            "seconds": round(self.record.seconds, 2),
        }
        where = _place(row["epoch"])
        for name, loss in {"loss": row["train_loss"], "held-out loss": row.get("val_loss", 0.0)}.items():
            if not math.isfinite(loss):
                raise self._diverged(task, f"the {name} is {loss} after {where}")
        better = self.record.add(row, results.per_class, f"val_{task.monitor}", task.mode)

        def write_files() -> None:
            self.folder.write(METRICS, self.record.to_csv())
            if better:
                decides = {task.monitor: round(results.numbers[task.monitor], 5)}
                trained = {"data": self.trained_on, "epoch": row["epoch"], **decides}
                card = dataclasses.replace(task.card, trained=trained)
                save_model(self.folder.path / WEIGHTS, task.evaluated_model, card)
                if results.per_class:
                    self.folder.write(PER_CLASS, results.to_csv())

        self._save(trainer, task, where, write_files)
        if better and trainer.is_global_zero:
            self.folder.keep_best()
        more = trainer.current_epoch + 1 < (trainer.max_epochs or 0)
        if more and _any(trainer, bool(self.signals.asked)):
            raise StoppedBySignal(self.signals.asked or 2, f"the end of {where}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.draw_curves(pl_module)

    def draw_curves(self, task: Task) -> None:
        """The picture of the epochs so far."""
        if self.record.rows:
            with contextlib.suppress(OSError):  # a picture is not worth failing a run for
                title = f"{task.card.model} on {self.trained_on}"
                heading = task.columns.get(task.monitor, task.monitor)
                save_curves(self.folder.path / CURVES, self.record, title, heading)

    # -- saving

    def kept(self) -> str:
        """What of the run is on the disk, as a clause."""
        return f"{self.folder.path} keeps its state of {self.saved_at}" if self.saved_at else "nothing was saved yet"

    def _due(self, trainer: pl.Trainer) -> bool:
        """Whether it is time for a checkpoint; by the first process's clock."""
        steps = self.every.steps
        by_steps = steps > 0 and trainer.global_step % steps == 0
        return by_steps or (trainer.is_global_zero and time.monotonic() - self._last_saved >= self.every.seconds)

    def _save(self, trainer: pl.Trainer, task: Task, where: str, write_files: Callable[[], None] | None = None) -> None:
        """Replace last.ckpt with the state of this moment, unless that is past saving."""
        if _any(trainer, task.diverged() or not is_finite(trainer)):
            raise self._diverged(task, f"the weights or their moments are no finite numbers at {where}")
        with self.signals.saving():
            if trainer.is_global_zero:
                with self.folder.saving(trainer.save_checkpoint):
                    if write_files is not None:
                        write_files()
            else:
                trainer.save_checkpoint(self.folder.path / LAST)
        self.saved_at, self._last_saved = where, time.monotonic()

    def _diverged(self, task: Task, problem: str) -> UserError:
        """What is wrong, what is kept, and how to go on from it."""
        rate, run = f"a lower `lr` (it was {task.optim.highest_lr:g})", self.folder.path
        if not self.saved_at:
            return UserError(f"{problem}; start again with {rate}; {self.kept()}")
        more = ""
        if self.saved_at == self._resumed_at:  # finite numbers, but perhaps no longer of a model that can learn
            start = f"`checkpoint` {run / WEIGHTS}" if self.record.best else f"`output` {run} `overwrite`"
            more = f", or, as that state may be past mending, start a new run with {start} and such an `lr`"
        return UserError(f"{problem}; {self.kept()}: continue from it with `resume` {run} and {rate}{more}")

    def _count_time(self) -> None:
        now = time.monotonic()
        self.record.seconds += now - self._last_seen
        self._last_seen = now


def is_finite(trainer: pl.Trainer) -> bool:
    """Whether weights, their moving average and the optimiser's moments are finite numbers."""
    module = trainer.lightning_module
    moments = (v for optimizer in trainer.optimizers for state in optimizer.state.values() for v in state.values())
    values = (v for v in (*module.parameters(), *module.buffers(), *moments) if isinstance(v, Tensor))
    return all(bool(value.isfinite().all()) for value in values)


def _any(trainer: pl.Trainer, mine: bool) -> bool:
    """Whether it is so in any of the processes; all of them must ask."""
    return trainer.strategy.reduce_boolean_decision(mine, all=False)


def _place(epoch: int, batch: int = 0) -> str:
    return f"epoch {epoch}, batch {batch}" if batch else f"epoch {epoch}"
