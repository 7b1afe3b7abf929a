"""vimamba train: teach a model the classes of your images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from timm.data import resolve_data_config
from torch import nn

from vimamba.cli import terminal
from vimamba.cli.machine import cores
from vimamba.cli.parsing import add_options, config_files, fetches, read_config, take
from vimamba.cli.resume import Resumed, check_same, config_of, resume
from vimamba.cli.train_options import GROUPS, OF_THE_CALL, MachineOptions, RunOptions
from vimamba.cli.train_progress import TrainProgress, duration
from vimamba.data.loaders import ImageDataModule, default_workers
from vimamba.data.sample import write_digits
from vimamba.data.sources import BUILT_IN, ImageData, open_data
from vimamba.data.split import HELD_OUT, how_drawn
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import UserError, naming, nearest, one_line, require
from vimamba.models.description import BUILDING, check_arguments, check_plain
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.run_folder import CONFIG, OWN_FILES, RunFolder
from vimamba.tasks.run_keeper import CheckpointEvery, RunKeeper
from vimamba.tasks.signals import StoppedAtOnce, StoppedBySignal, StopSignals
from vimamba.tasks.skipped import SkippedFiles
from vimamba.tasks.weights import Architecture, ModelCard, architecture, build_model, check_model_name, load_start


def arguments(parser: ArgumentParser) -> None:
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
    typed = {argument.partition("=")[0] for argument in arguments}
    for path in config_files(arguments):
        check_config(path, read_config(path), typed, builds=path != own)
    return arguments


def check_config(path: Path, values: dict[str, Any], typed: set[str], builds: bool = True) -> None:
    """Refuse a file's options that fetch or replace, unless they were typed too: the file may be a stranger's.

    A resumed run builds its model from what its checkpoint says, so that its config may name what is no longer there.
    """
    for name in OF_THE_CALL:
        require(name not in values, f"--config {path}: {name} must be typed, as --{name}; a file may not say it")
    for name in ("data", "model") if builds else ("data",):
        if fetches(name, values.get(name)) and f"--{name}" not in typed:
            raise UserError(
                f"--config {path}: names a {name} to be fetched; type --{name} {values[name]} if you mean it"
            )
    model_args = values.get("model_args") if builds else None
    building = sorted(BUILDING & model_args.keys()) if isinstance(model_args, dict) else []
    if building and not any(argument.startswith("--model_args") for argument in typed):
        raise UserError(f"--config {path}: model_args may not give {building[0]}; type --model_args.{building[0]}")


def run(parser: ArgumentParser, options: Namespace) -> int:
    run_options, machine = take(RunOptions, options), take(MachineOptions, options)
    optim, augment = take(OptimOptions, options), take(AugmentOptions, options)
    terminal.quiet_libraries()
    resumed = resume(parser, options) if options.resume else None
    check_model_name(run_options.model)
    data = open_data(
        run_options.data, run_options.val_fraction, run_options.seed, run_options.class_names,
        **(how_drawn(Path(options.resume)) if options.resume else {}),
    )  # fmt: skip
    if optim.lr is None and (run_options.pretrained or run_options.checkpoint):
        optim.lr = 2e-4  # trained weights are lost at the rate that new ones need
    if augment.augment == "auto":
        augment.augment = "crop" if data.photographs else "affine"
    unused = f"--auto_augment {augment.auto_augment}: goes with --augment crop, and here it is {augment.augment}"
    require(augment.auto_augment is None or augment.augment == "crop", unused)
    if resumed:
        card = resumed.card
        check_same(options.resume, card, run_options.model, run_options.model_args, data.class_names)
    else:
        behind = architecture(run_options.model)
        prep = choose_preprocessing(run_options, data, behind)
        card = describe_model(run_options, data.class_names, prep, behind)
    path = Path(run_options.output or default_output(run_options))
    held_out = data.held_out()
    texts = {CONFIG: config_text(options, path)} | ({HELD_OUT: held_out.text()} if held_out else {})
    folder = RunFolder(path, texts, resumed.checkpoint if resumed else None)
    signals = StopSignals()
    keeper = RunKeeper(folder, CheckpointEvery.parse(run_options.checkpoint_every), signals, data.name)
    skipped = SkippedFiles(terminal.warn, run_options.max_undecodable)
    console = terminal.console()
    trainer = build_trainer(optim, machine, path, [keeper, skipped, TrainProgress(console, keeper)])
    model, note = (card.build(), "") if resumed else build_start(run_options, card)
    if resumed:
        note = f"continued from {resumed.checkpoint.name}" + "".join(f", {change}" for change in resumed.changes)
    task = ClassificationTask(model, card, optim, augment, run_options.seed)
    workers = default_workers(data) if run_options.num_workers is None else run_options.num_workers
    module = ImageDataModule(data, card.preprocessing, augment, optim.batch_size, workers, run_options.seed)
    first_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with folder.held(options.overwrite) if first_process else contextlib.nullcontext():
        if first_process and not resumed:
            folder.check_space(task.model, averaged=task.ema is not None)
        print_heading(console, task, data, trainer, machine, note)
        with signals:
            status = fit(trainer, task, module, resumed, keeper, run_options, console)
    if status == 0 and trainer.is_global_zero:
        print_summary(console, path, keeper, skipped)
    return status


def fit(
    trainer: pl.Trainer, task: ClassificationTask, module: ImageDataModule, resumed: Resumed | None,
    keeper: RunKeeper, options: RunOptions, console: Console,
) -> int:  # fmt: skip
    """Train to the end or until asked to stop; the exit status."""
    folder = keeper.folder.path
    typed = [(n, getattr(options, n)) for n in ("data",) if fetches(n, getattr(options, n))]
    more = "".join(f" --{name} {shlex.quote(value)}" for name, value in typed)
    again = f"vimamba train --resume {shlex.quote(str(folder))}{more}"
    try:
        trainer.fit(task, module, ckpt_path=resumed.checkpoint if resumed else None, weights_only=True)
    except StoppedBySignal as stopped:
        keeper.draw_curves(task.card)
        with contextlib.suppress(OSError):  # the terminal may be what went away
            console.print(f"\nStopped at {stopped.where}; everything is saved. Continue with")
            console.print(f"  {again}", style="bold")
        return 128 + stopped.signum
    except StoppedAtOnce:
        console.print(f"\nStopped at once; {keeper.kept()}{f': {again}' if keeper.saved_at else ''}", markup=False)
        return 128 + signal.SIGINT
    except UserError:
        raise
    except Exception as error:
        if resumed and not keeper.started:  # Lightning trips over a checkpoint of something else in many ways
            wrong = f"{resumed.checkpoint.relative_to(folder)} cannot be continued from"
            raise UserError(f"--resume {folder}: {wrong} ({type(error).__name__}: {one_line(error)})") from error
        if isinstance(error, MisconfigurationException):  # what a strategy cannot do shows when it begins
            raise UserError(f"the trainer refuses: {one_line(error)}") from error
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            smaller = f"--batch_size {task.optim.batch_size}: does not fit into the memory; give less, and --accumulate"
            raise UserError(f"{smaller} for as many images a step; {keeper.kept()}") from error
        raise
    return 0


def default_output(options: RunOptions) -> str:
    """runs/DATA-MODEL."""
    return f"runs/{Path(options.data.rstrip('/')).name}-{options.model.replace('/', '_').replace(':', '_')}"


def choose_preprocessing(options: RunOptions, data: ImageData, behind: Architecture) -> Preprocessing:
    """What the options say, else what the data know of themselves, else what the model was made for."""
    own = resolve_data_config(args={"crop_pct": None}, pretrained_cfg=behind.pretrained_cfg, verbose=False)
    in_chans = options.in_chans or data.in_chans
    size = options.img_size or data.img_size or tuple(own["input_size"][-2:])
    size = (size, size) if isinstance(size, int) else size
    if data.mean and data.std:
        mean, std = data.mean[:1] * in_chans, data.std[:1] * in_chans
    elif in_chans == len(own["mean"]):
        mean, std = tuple(own["mean"]), tuple(own["std"])
    else:
        mean, std = ((sum(own[key]) / len(own[key]),) * in_chans for key in ("mean", "std"))
    crop_pct = 1.0 if data.img_size else own["crop_pct"]
    interpolation = "bicubic" if own["interpolation"] == "random" else own["interpolation"]
    return Preprocessing(size, in_chans, mean, std, interpolation, crop_pct, own["crop_mode"])


def describe_model(options: RunOptions, class_names: list[str], prep: Preprocessing, behind: Architecture) -> ModelCard:
    """What the run's files will say of its model; refused now where they could not be opened again."""
    model_args = {**behind.model_args, **options.model_args}
    model_args = {key: value for key, value in model_args.items() if key not in BUILDING}
    if model_args:
        with naming("--model_args"):
            check_plain(model_args)
            check_arguments(behind.name, model_args)
    return ModelCard(behind.name, model_args, class_names, prep)


def build_start(options: RunOptions, card: ModelCard) -> tuple[nn.Module, str]:
    """The model with its first weights, and a note on where they are from."""
    torch.manual_seed(options.seed)
    prep = card.preprocessing
    classes = len(card.class_names)
    model = build_model(options.model, classes, prep.in_chans, prep.img_size, options.model_args, options.pretrained)
    note = "published weights" if options.pretrained else ""
    if options.checkpoint:
        note = load_start(model, Path(options.checkpoint))
    return model, note


def build_trainer(
    optim: OptimOptions, machine: MachineOptions, folder: Path, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """Lightning's trainer, without the files and lines of its own."""
    known = ["auto", *StrategyRegistry.available_strategies()]
    hint = nearest(machine.strategy, known) or "; give auto, ddp or fsdp"
    require(machine.strategy in known, f"--strategy {machine.strategy}: there is no such strategy{hint}")
    try:
        trainer = pl.Trainer(
            **dataclasses.asdict(machine),
            max_epochs=optim.epochs,
            gradient_clip_val=optim.clip_grad,
            accumulate_grad_batches=optim.accumulate,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except Exception as error:  # Lightning's own errors, one kind for each option
        plain = MachineOptions()
        given = {key: value for key, value in vars(machine).items() if value != getattr(plain, key)} or vars(machine)
        options = " ".join(f"--{key} {value}" for key, value in given.items())
        raise UserError(f"{options}: not possible here: {one_line(error)}") from error
    check_processes(trainer, machine)
    if trainer.precision != machine.precision:  # Lightning takes another without asking
        raise UserError(f"--precision {machine.precision}: needs a GPU; on the CPU give bf16-mixed or 32-true")
    return trainer


def check_processes(trainer: pl.Trainer, machine: MachineOptions) -> None:
    """Refuse more processes than there are cores for, and machines that would wait for each other for ever."""
    few = trainer.strategy.root_device.type != "cpu" or trainer.num_devices <= cores()
    require(
        few,
        f"--devices {machine.devices}: starts as many processes on the CPU, which has {cores()} cores; give no more",
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    launched = "MASTER_ADDR" in os.environ or (environment is not None and environment.creates_processes_externally)
    require(
        trainer.num_nodes == 1 or launched,
        f"--num_nodes {machine.num_nodes}: would wait for the other machines for ever; start it on each of them with "
        "torchrun or srun, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set",
    )


def config_text(options: Namespace, folder: Path) -> str:
    """Every option of the run, so that `--config` repeats it."""
    kept = options.clone()
    for name in OF_THE_CALL:
        kept.pop(name, None)
    kept["output"] = str(folder)
    return yaml.safe_dump(kept.as_dict(), sort_keys=False, allow_unicode=True)


def print_heading(
    console: Any,
    task: ClassificationTask,
    data: ImageData,
    trainer: pl.Trainer,
    machine: MachineOptions,
    note: str,
) -> None:
    if not trainer.is_global_zero:
        return
    prep, card = task.card.preprocessing, task.card
    parameters = sum(p.numel() for p in task.model.parameters())
    size = " x ".join(map(str, prep.img_size)) + (" grey" if prep.in_chans == 1 else "")
    devices = f"{trainer.num_devices} " if trainer.num_devices > 1 else ""
    where = f"{devices}{trainer.strategy.root_device.type}, {machine.precision}"
    console.print(f"[bold]{card.model}[/]  {terminal.count(parameters)} parameters, {size}, {where}", markup=True)
    console.print(
        f"{data.name}  {len(data.train)} images to learn from, {len(data.val)} held out, "
        f"{len(card.class_names)} classes",
        markup=False,
    )
    for line in data.notes:
        terminal.warn(line)
    if note:
        console.print(note, markup=False)
    console.print()


def print_summary(console: Any, folder: Path, keeper: RunKeeper, skipped: SkippedFiles) -> None:
    best = keeper.record.best
    console.print()
    terminal.print_classes(console, keeper.record.best_classes)
    console.print()
    for which, count in skipped.counts.items():
        terminal.warn(f"{count} {which} image{'s' * (count > 1)} could not be decoded and were left out")
    top1 = terminal.percent(best["val_top1"])
    console.print(
        f"[bold green]{top1}%[/] of the held-out images named right by the weights of epoch {best['epoch']}, "
        f"after {duration(keeper.record.seconds)}."
    )
    console.print(f"In {folder}: {', '.join(n for n in OWN_FILES if (folder / n).exists())}", markup=False)
    name = shlex.quote(str(folder))
    pictures = "IMAGE..."
    if keeper.trained_on in BUILT_IN:
        pictures = f"{shlex.quote(str(write_digits(folder / 'digits')[0].parent))}/*.png"
    console.print(f"Next: vimamba eval {name}", markup=False)
    console.print(f"      vimamba predict {name} {pictures}", markup=False)
