"""Where a run's numbers are logged, by the names of Lightning's loggers."""

from __future__ import annotations

import importlib
import itertools
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers as known
from lightning.pytorch.loggers import Logger

from vimamba.errors import UserError, nearest, one_line
from vimamba.tasks.run_folder import LOGS

OWN_LOGGERS = ("tensorboard", "csv")  # which write files, and call nobody


def _classes() -> dict[str, type[Logger]]:
    """Lightning's loggers by their short names: tensorboard, csv, wandb ..."""
    return {name.removesuffix("Logger").lower(): getattr(known, name) for name in known.__all__ if name != "Logger"}


def check_loggers(names: str) -> list[type[Logger]]:
    """The classes that a text such as "tensorboard,csv" names; "none" names none.

    Raises:
        UserError: there is no such logger.
    """
    return [] if names.strip() == "none" else [_find(name.strip()) for name in names.split(",")]


def _find(name: str) -> type[Logger]:
    classes = _classes()
    if name in classes:
        return classes[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"`logger` {name}: cannot be imported ({one_line(error)})") from error
    if isinstance(found, type) and issubclass(found, Logger):
        return found
    hint = nearest(name, classes) or f"; give {', '.join(classes)}, the path of a logger's class, or none"
    raise UserError(f"`logger` {name}: there is no such logger{hint}")


def build_loggers(names: str, folder: Path) -> list[Logger]:
    """The loggers, each with a folder of its own for this beginning of the run below logs/.

    Raises:
        UserError: one needs a package or an account that is not there.
    """
    began = base = time.strftime("%Y-%m-%d_%H-%M-%S")
    for again in itertools.count(2):  # within a second
        if not any((folder / LOGS).glob(f"*/{began}")):
            break
        began = f"{base}_{again}"
    built = []
    for logger in check_loggers(names):
        short = logger.__name__.removesuffix("Logger").lower()
        try:
            built.append(logger(**_arguments(logger, folder, short, began)))
        except Exception as error:  # each service refuses in its own way
            raise UserError(f"`logger` {short}: cannot be used here: {one_line(error)}") from error
    return built


def _arguments(logger: type[Logger], folder: Path, short: str, began: str) -> dict[str, Any]:
    """Folders for those that write files; the others go by their own settings, as Lightning builds them."""
    if logger in (known.TensorBoardLogger, known.CSVLogger):
        return {"save_dir": folder / LOGS, "name": short, "version": began}
    return {"save_dir": str(folder / LOGS)} if logger is known.WandbLogger else {}
