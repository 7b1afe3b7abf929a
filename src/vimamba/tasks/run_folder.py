"""The folder of a run: which files it holds, who may write to it, and what of it a crash leaves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vimamba.data.split import HELD_OUT
from vimamba.errors import UserError, one_line, require
from vimamba.files import PARTIAL, sync, whole, write_text
from vimamba.models.checkpoints import read_checkpoint, state_dict_of

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, WEIGHTS, CURVES, PER_CLASS = (
    "config.yaml",
    "metrics.csv",
    "model.safetensors",
    "curves.png",
    "per_class.csv",
)
LAST, PREVIOUS, BEST = (f"checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
OWN_FILES = (CONFIG, HELD_OUT, METRICS, WEIGHTS, CURVES, PER_CLASS, "confusion.png", LAST, PREVIOUS, BEST)
LOCK = ".lock"
LOGS = "logs"
LOGGED = ("tensorboard", "csv")  # below it
BEGAN = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?"  # below those, by when a run began: what is ours to remove


class RunFolder:
    """The folder of a run, new or resumed.

    A new run puts nothing into it before its first checkpoint: until then an earlier run in the same folder is as it
    was, and a run that fails leaves nothing. A file is replaced only by a whole one.
    """

    def __init__(self, path: Path, resumed_from: Path | None = None):
        self.path = path
        self.texts: Mapping[str, str] = {}  # what a run begins with, by the names of the files
        self.option = f"`{'resume' if resumed_from else 'output'}` {path}"
        self._replaces = resumed_from is None  # whether the first checkpoint takes the place of another run
        self._last_is_good = resumed_from == path / LAST
        self._begun = False
        self._old_logs: set[Path] = set()

    # -- who may write

    @contextlib.contextmanager
    def held(self, overwrite: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder, making it if need be; what was made and stayed empty goes again.

        Raises:
            UserError: another run is in it, it cannot be written to, or it holds something and may not be replaced.
        """
        checkpoints = (self.path / LAST).parent
        made = [folder for folder in (checkpoints, self.path, *self.path.parents) if not folder.exists()]
        self._old_logs = self._logs()
        lock: int | None = None
        try:
            try:
                require(not self.path.exists() or self.path.is_dir(), f"{self.option}: is a file; give a folder")
                self.path.mkdir(parents=True, exist_ok=True)
                lock = self._lock()
                if self._replaces:
                    self._check_empty(overwrite)
                for leftover in (*self.path.glob(PARTIAL), *checkpoints.glob(PARTIAL)):
                    leftover.unlink(missing_ok=True)
                checkpoints.mkdir(exist_ok=True)
                with whole(checkpoints / "probe") as partial:
                    partial.write_bytes(b"x" * 4096)
                (checkpoints / "probe").unlink()
            except OSError as error:
                raise UserError(f"{self.option}: cannot be written to ({error.strerror or error})") from error
            yield
        finally:
            with contextlib.suppress(OSError):
                if lock is not None:
                    (self.path / LOCK).unlink(missing_ok=True)
                    os.close(lock)
                if not self._begun:
                    self._remove_logs(self._logs() - self._old_logs)
                for folder in made:
                    folder.rmdir()

    def _lock(self) -> int:
        """A lock that the system releases when this process ends, however it ends; forked workers do not hold it."""
        path = self.path / LOCK
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                raise UserError(
                    f"{self.option}: another run is writing to it; wait for its end or give another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # its holder has removed it since it was opened

    def _check_empty(self, overwrite: bool) -> None:
        inside = {entry.name for entry in self.path.iterdir()} - {LOCK, *(p.name for p in self.path.glob(PARTIAL))}
        if not any((self.path / LAST).parent.glob("[!.]*")):  # of a run that was killed before it had saved anything
            inside -= {"checkpoints", *([LOGS] if self._only_our_logs() else [])}
        if not inside or overwrite:
            return
        resume = f", continue that run with `resume` {self.path}" if self.resumable else ""
        raise UserError(
            f"{self.option}: exists and is not empty; choose another folder{resume}, "
            "or replace the run in it with `overwrite`"
        )

    def _logs(self) -> set[Path]:
        """A folder for each logger and each beginning of a run."""
        found = (folder for name in LOGGED for folder in (self.path / LOGS / name).glob("*"))
        return {folder for folder in found if re.fullmatch(BEGAN, folder.name)}

    def _only_our_logs(self) -> bool:
        return {path for path in (self.path / LOGS).glob("*/*")} <= self._logs()

    def _remove_logs(self, folders: set[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (*{folder.parent for folder in folders}, self.path / LOGS):
            with contextlib.suppress(OSError):  # another's are in it
                folder.rmdir()

    def check_space(self, model: torch.nn.Module, averaged: bool) -> None:
        """Refuse a run whose files will not fit on the disk, before hours are spent on it."""
        weights = sum(p.numel() * 4 for p in model.parameters())
        # Four checkpoints (last, previous, best, one being written), each of weights and two moments; and the weights.
        needed = weights * (4 * (3 + averaged) + 2)
        free = shutil.disk_usage(self.path).free
        require(
            free >= needed,
            f"{self.option}: the run needs about {needed / 1e6:.0f} MB for its checkpoints and {free / 1e6:.0f} MB "
            "are free; free some space or choose another folder",
        )

    # -- what is written

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint of this run to continue from."""
        return any((self.path / name).is_file() for name in (LAST, PREVIOUS))

    @contextlib.contextmanager
    def saving(self, write: Callable[[Path], Any]) -> Iterator[None]:
        """Replace last.ckpt with what `write` writes; the one before it becomes previous.ckpt.

        What else is written in the block is on the disk before the checkpoint that knows of it takes its place, so that
        a run killed in between writes it again.
        """
        last, previous = self.path / LAST, self.path / PREVIOUS
        with self._naming(last), whole(last, keep=previous if self._last_is_good else None) as partial:
            write(partial)
            sync(partial)
            self._begin()
            yield
        self._last_is_good = True

    def _begin(self) -> None:
        """An earlier run makes room for this one, now that this one has a state to keep."""
        if self._begun:
            return
        if self._replaces:
            for name in OWN_FILES:
                (self.path / name).unlink(missing_ok=True)
            self._remove_logs(self._old_logs)
        for name, text in self.texts.items():
            self.write(name, text)
        self._replaces, self._begun = False, True

    def keep_best(self) -> None:
        """A copy of last.ckpt, not a second name of it: damage to one is not damage to both."""
        with self._naming(self.path / BEST), whole(self.path / BEST) as partial:
            shutil.copyfile(self.path / LAST, partial)

    def write(self, name: str, text: str) -> None:
        """Write one of the run's texts."""
        with self._naming(self.path / name):
            write_text(self.path / name, text)

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            if "inline_container" in reason:  # torch.save, which says of a full disk only at which byte it was
                reason = f"is the disk full? {reason}"
            kept = f"; the run up to its last checkpoint is kept, continue it with `resume` {self.path}"
            kept = kept if self.resumable and not self._replaces else ""
            raise UserError(f"{path}: cannot be written ({reason}){kept}") from error


def latest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run that can be continued from, and what it holds.

    A damaged last.ckpt is passed over with a word, for the one before it or the best.

    Raises:
        UserError: there is none.
    """
    problems = []
    for name in (LAST, PREVIOUS, BEST):
        path = folder / name
        if not path.is_file():
            continue
        try:
            contents = _undamaged(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems or name != LAST:
            warn(f"{problems[0] if problems else f'{folder / LAST}: is missing'}; continuing from {name}")
        return path, contents
    raise UserError(f"`resume` {folder}: {problems[0] if problems else f'holds no {LAST}; there is nothing to resume'}")


def _undamaged(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, its checksums held against its bytes (PyTorch does not) and its numbers finite."""
    contents = read_checkpoint(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                damaged = archive.testzip()
            except Exception as error:
                damaged = one_line(error)
        require(damaged is None, f"{path}: is damaged ({damaged})")
    broken = [name for name, value in state_dict_of(contents).items() if not value.isfinite().all()]
    require(not broken, f"{path}: holds weights that are infinite or not a number")
    return contents
