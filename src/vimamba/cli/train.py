"""vimamba train: teach a model the classes of your images."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from vimamba.cli import terminal
from vimamba.cli.parsing import Parser, add_options, config_files
from vimamba.cli.train_progress import TrainProgress
from vimamba.data.mnist import write_digits
from vimamba.data.scenes import write_scenes
from vimamba.data.sources import BUILT_IN
from vimamba.errors import require
from vimamba.quiet import quiet_libraries
from vimamba.tasks.config import GROUPS, TrainConfig, check_source, fetches, read_config
from vimamba.tasks.dense import DenseTask
from vimamba.tasks.resume import config_of
from vimamba.tasks.run_folder import LOGS, OWN_FILES
from vimamba.tasks.signals import StoppedAtOnce, StoppedBySignal
from vimamba.tasks.training import Training

OF_THE_CALL = ("config", "print_config", "resume", "overwrite")  # not part of a run's config.yaml


def arguments(parser: Parser) -> None:
    parser.typed_only = OF_THE_CALL
    parser.add_argument("--config", action="config")
    for group in GROUPS:
        add_options(parser, group)
    parser.add_argument("--resume", type=str | None, default=None, help="continue the run in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")


def before_parsing(arguments: list[str]) -> list[str]:
    """`--resume RUN` brings the run's own options, over which others may be given."""
    own = None
    for position, argument in enumerate(arguments):
        if argument == "--resume" or argument.startswith("--resume="):
            folder = argument.partition("=")[2] or "".join(arguments[position + 1 : position + 2])
            require(bool(folder), "--resume: give the folder of a run")
            own = config_of(folder)
            arguments = ["--config", str(own), "--output", folder, *arguments]
            break
    typed = {argument.removeprefix("--").partition("=")[0].partition(".")[0] for argument in arguments}
    for path in config_files(arguments):
        values = read_config(path)
        for name in OF_THE_CALL:
            require(name not in values, f"--config {path}: {name} must be typed, as --{name}; a file may not say it")
        check_source(path, values, typed, builds=path != own)
    return arguments


def run(parser: ArgumentParser, options: Namespace) -> int:
    values = {name: value for name, value in options.as_dict().items() if name not in OF_THE_CALL}
    quiet_libraries()
    resumed_from = Path(options.resume) if options.resume else None
    training = Training(TrainConfig.of(values), resumed_from, options.overwrite, terminal.warn)
    console = terminal.console()
    training.trainer.callbacks.append(TrainProgress(console, training.keeper))  # type: ignore[attr-defined]
    folder = training.folder.path
    again = f"vimamba train --resume {shlex.quote(str(folder))}"
    for name in ("data", "logger"):
        if fetches(name, options[name]):
            again += f" --{name} {shlex.quote(options[name])}"
    try:
        training.fit(lambda training: print_heading(console, training))
    except StoppedBySignal as stopped:
        with contextlib.suppress(OSError):  # the terminal may be what went away
            console.print(f"\nStopped at {stopped.where}; everything is saved. Continue with")
            console.print(f"  {again}", style="bold")
        return 128 + stopped.signum
    except StoppedAtOnce as stopped:
        keeper = training.keeper
        with contextlib.suppress(OSError):
            console.print(f"\nStopped at once; {keeper.kept()}{f': {again}' if keeper.saved_at else ''}", markup=False)
        return 128 + stopped.signum
    if training.trainer.is_global_zero:
        print_summary(console, training)
    return 0


def print_heading(console: Console, training: Training) -> None:
    trainer, card, data = training.trainer, training.card, training.data
    if not trainer.is_global_zero:
        return
    machine = training.config.machine
    parameters = sum(p.numel() for p in training.task.model.parameters())
    size = training.size + (" grey" if card.preprocessing.in_chans == 1 else "")
    devices = f"{trainer.num_devices} " if trainer.num_devices > 1 else ""
    where = f"{devices}{trainer.strategy.root_device.type}, {machine.precision}"
    console.print(f"[bold]{card.model}[/]  {terminal.count(parameters)} parameters, {size}, {where}", markup=True)
    console.print(
        f"{data.name}  {len(data.train)} images to learn from, {len(data.val)} held out, "
        f"{len(card.class_names)} classes",
        markup=False,
    )
    console.print(training.schedule, markup=False)
    if training.note:
        console.print(training.note, markup=False)
    console.print()


def print_summary(console: Console, training: Training) -> None:
    folder, record, task = training.folder.path, training.keeper.record, training.task
    console.print()
    terminal.print_classes(console, record.best_classes)
    console.print()
    for which, count in training.skipped.counts.items():
        terminal.warn(f"{count} {which} image{'s' * (count > 1)} could not be decoded and were left out")
    heading = task.columns.get(task.monitor, task.monitor)
    value = terminal.cell(heading, record.best[record.monitor]) + ("%" if heading.endswith("%") else "")
    console.print(
        f"[bold green]{task.sentence(value)}[/] by the weights of epoch {record.best['epoch']}, "
        f"after {terminal.duration(record.seconds)}."
    )
    console.print(f"In {folder}: {', '.join(n for n in (*OWN_FILES, LOGS) if (folder / n).exists())}", markup=False)
    name = shlex.quote(str(folder))
    pictures = "IMAGE..."
    if training.data.name in BUILT_IN:
        kind, write = ("digits", write_digits) if training.data.name == "mnist" else ("scenes", write_scenes)
        pictures = f"{shlex.quote(str(write(folder / kind)[0].parent))}/*.png"
    output = f" --output {shlex.quote(str(folder / 'pictures'))}" if isinstance(task, DenseTask) else ""
    console.print(f"Next: vimamba eval {name}", markup=False)
    console.print(f"      vimamba predict {name} {pictures}{output}", markup=False)
