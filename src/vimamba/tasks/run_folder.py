"""What a training run leaves on disk, when, and how it is stopped and resumed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from vimamba.data.split import HELD_OUT
from vimamba.errors import UserError, naming, require, shown
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.figures import save_curves
from vimamba.tasks.results import ClassResult
from vimamba.tasks.weights import ModelCard, read_weights, save_model

CONFIG, METRICS, WEIGHTS, CURVES, PER_CLASS = (
    "config.yaml",
    "metrics.csv",
    "model.safetensors",
    "curves.png",
    "per_class.csv",
)
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"
OWN_FILES = (CONFIG, HELD_OUT, METRICS, WEIGHTS, CURVES, PER_CLASS, "confusion.png", LAST, BEST)


class StoppedBySignal(Exception):  # noqa: N818 - not an error
    """Ctrl-C or SIGTERM: the run's state is saved, and training can be resumed."""

    def __init__(self, signum: int, where: str):
        super().__init__(where)
        self.signum, self.where = signum, where


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder of a new run; refuses one with anything in it unless told to overwrite.

    Overwriting removes the files of the earlier run and nothing else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder}: is a file; give a folder")
        if folder.is_dir() and any(folder.iterdir()):
            resume = f", continue that run with --resume {folder}" if (folder / LAST).is_file() else ""
            require(
                overwrite,
                f"--output {folder}: exists and is not empty; choose another folder{resume}, "
                "or replace the run in it with --overwrite",
            )
            for name in OWN_FILES:
                (folder / name).unlink(missing_ok=True)
        (folder / LAST).parent.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error


def check_space(folder: Path, model: torch.nn.Module) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, before hours are spent on it."""
    weights = sum(p.numel() * 4 for p in model.parameters())
    needed = 10 * weights  # two checkpoints of weights and two moments, one being replaced, and the weights
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"--output {folder}: the run needs about {needed / 1e6:.0f} MB for its checkpoints and {free / 1e6:.0f} MB "
        "are free; free some space or choose another folder",
    )


def check_resumable(folder: Path, card: ModelCard) -> None:
    """Refuse a run whose last checkpoint is not one of the model that its config describes."""
    require((folder / LAST).is_file(), f"--resume {folder}: holds no {LAST}; there is nothing to resume")
    tensors, described = read_weights(folder / LAST)
    require(described is not None, f"--resume {folder}: {LAST} is not a checkpoint of vimamba train")
    with naming(f"--resume {folder}: {LAST}"):
        saved = ModelCard.from_dict(described, tensors)
    for what, then, now in (
        ("model", saved.model, card.model),
        ("--model_args", saved.model_args, card.model_args),
        ("number of classes", len(saved.class_names), len(card.class_names)),
        ("list of classes", saved.class_names, card.class_names),
    ):
        require(then == now, f"--resume {folder}: the checkpoint's {what} is {shown(then)}, not {shown(now)}")


class RunFolder(pl.Callback):
    """Writes the run's files after each epoch, and at once when a signal asks to stop.

    A file is replaced only by a whole one, so a full disk or a lost machine costs an epoch at most.
    """

    def __init__(self, folder: Path, trained_on: str):
        self.folder, self.trained_on = folder, trained_on
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_classes: list[ClassResult] = []
        self.seconds = 0.0
        self.started = False  # whether everything that a checkpoint brings has been taken in
        self.signum = 0
        self._handlers: dict[int, Any] = {}
        self._last_seen = 0.0

    # -- state and signals

    def state_dict(self) -> dict[str, Any]:
        classes = [dataclasses.asdict(row) for row in self.best_classes]
        return {"rows": self.rows, "best": self.best, "best_classes": classes, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.best = list(state_dict["rows"]), dict(state_dict["best"])
        self.best_classes = [ClassResult(**row) for row in state_dict["best_classes"]]
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_seen, self.started = time.monotonic(), True
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._on_signal)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.signum:  # asked twice: at once, without saving
            raise KeyboardInterrupt
        self.signum = signum

    # -- the moments of a run

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count_time()
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # After an epoch's last batch comes its validation; the run stops behind that.
        if whole_step and not trainer.is_last_batch and self._asked_to_stop(trainer):
            self._stop(trainer, f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        task: ClassificationTask = pl_module
        results = task.results
        assert results is not None
        self._count_time()
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": float(task.train_loss.compute()),
            "val_loss": results.loss,
            "val_top1": results.top1,
            "val_top5": results.top5,
            "seconds": round(self.seconds, 2),
        }
        if not math.isfinite(row["train_loss"]) or not math.isfinite(results.loss):
            kept = f"; the state after epoch {len(self.rows)} is kept" if self.rows else ""
            raise UserError(f"the loss is {row['train_loss']} after epoch {row['epoch']}; lower --lr{kept}")
        self.rows.append(row)
        better = not self.best or results.top1 > self.best["val_top1"]
        if better:
            self.best, self.best_classes = row, results.per_class
        if trainer.is_global_zero:
            self._write(METRICS, self._metrics_csv())
            if better:
                trained = {"data": self.trained_on, "epoch": row["epoch"], "top1": round(results.top1, 5)}
                card = dataclasses.replace(task.card, trained=trained)
                save_model(self.folder / WEIGHTS, task.evaluated_model, card)
                self._write(PER_CLASS, results.to_csv())
        self.save_checkpoint(trainer)
        if better and trainer.is_global_zero:
            self._keep_best()
        if trainer.current_epoch + 1 < (trainer.max_epochs or 0) and self._asked_to_stop(trainer):
            self._stop(trainer, f"the end of epoch {trainer.current_epoch + 1}", save=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and self.rows:
            self.draw_curves(pl_module.card)

    # -- files

    def draw_curves(self, card: ModelCard) -> None:
        """The picture of the epochs so far."""
        with contextlib.suppress(OSError):  # a picture is not worth failing a run for
            save_curves(self.folder / CURVES, self.rows, f"{card.model} on {self.trained_on}")

    def save_checkpoint(self, trainer: pl.Trainer) -> None:
        """Replace last.ckpt with the state of this moment."""
        last = self.folder / LAST
        partial = last.with_name(".last.partial")
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                os.replace(partial, last)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise self._cannot_write(last, error) from error

    def _keep_best(self) -> None:
        """best.ckpt: a second name of last.ckpt, which takes no space until last.ckpt is replaced."""
        best = self.folder / BEST
        partial = best.with_name(".best.partial")
        try:
            partial.unlink(missing_ok=True)
            try:
                os.link(self.folder / LAST, partial)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.folder / LAST, partial)
            os.replace(partial, best)
        except OSError as error:
            raise self._cannot_write(best, error) from error

    def _write(self, name: str, text: str) -> None:
        partial = self.folder / f".{name}.partial"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.folder / name)
        except OSError as error:
            raise self._cannot_write(self.folder / name, error) from error

    def _cannot_write(self, path: Path, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or "is the disk full?"
        kept = f"; the run up to its last checkpoint is kept, continue it with --resume {self.folder}"
        return UserError(f"{path}: cannot be written ({reason}){kept if (self.folder / LAST).is_file() else ''}")

    def _metrics_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        return text.getvalue()

    # -- stopping

    def _asked_to_stop(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self.signum), all=False)

    def _stop(self, trainer: pl.Trainer, where: str, save: bool = True) -> None:
        if save:
            self.save_checkpoint(trainer)
        raise StoppedBySignal(self.signum or signal.SIGINT, where)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._last_seen
        self._last_seen = now


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
        require(
            bad < max(count, 1), f"stopped: none of the {count} {which} images can be decoded; the warnings say why"
        )
        require(
            bad <= self.most * count,
            f"stopped: {bad} of the {count} {which} images cannot be decoded, more than {self.most:.0%}; "
            "the warnings name them: repair or remove them",
        )
