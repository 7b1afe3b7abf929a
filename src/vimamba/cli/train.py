"""vimamba train: teach a model the classes of your images."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from timm.data import resolve_data_config

from vimamba.cli import terminal
from vimamba.cli.parsing import Precision, add_options, config_files, fetches, read_config, take
from vimamba.cli.train_progress import TrainProgress, duration
from vimamba.data.loaders import ImageDataModule, default_workers
from vimamba.data.sample import write_digits
from vimamba.data.sources import BUILT_IN, ImageData, open_data
from vimamba.data.split import how_drawn
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import UserError, naming, one_line, require
from vimamba.models.description import BUILDING, check_arguments, check_plain
from vimamba.tasks import run_folder
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.run_folder import RunFolder, SkippedFiles, StoppedBySignal
from vimamba.tasks.weights import Architecture, ModelCard, architecture, build_model, check_model_name, load_start

OF_THE_CALL = ("config", "print_config", "resume", "overwrite")  # not part of a run's config.yaml


@dataclasses.dataclass
class RunOptions:
    """What to learn from, with what, and where to keep it.

    Args:
        data: mnist (built in), a folder with train/ and val/ or with one sub-folder for each class, hfds/NAME of
            the hub, or wds/FOLDER of shards
        model: a model of `vimamba models` or any of timm's
        output: folder for what the run leaves; runs/DATA-MODEL if not given
        model_args: keyword arguments of the model, such as --model_args.depth 8
        pretrained: start from the model's published weights
        checkpoint: start from the weights in this file
        img_size: height and width the model sees, or one number; the data's or the model's own if not given
        in_chans: 1 (grey) or 3 (colour); the data's own if not given
        val_fraction: share held out of a folder that has no val/
        class_names: file with one class name a line, for hub data and shards whose labels have none
        num_workers: processes that decode images; chosen by the machine if not given
        max_undecodable: share of files that may be undecodable before the run stops
        seed: of the weights, the order of the images and their augmentation
    """

    data: str
    model: str
    output: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    img_size: int | tuple[int, int] | None = None
    in_chans: int | None = None
    val_fraction: float = 0.2
    class_names: str | None = None
    num_workers: int | None = None
    max_undecodable: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or (1,)
        require(min(sizes) >= 1, f"--img_size is {self.img_size}; it must be at least 1")
        require(
            self.in_chans in (None, 1, 3),
            f"--in_chans is {self.in_chans}; images have 1 (grey) or 3 (colour)",
        )
        require(
            self.num_workers is None or self.num_workers >= 0,
            f"--num_workers is {self.num_workers}; it counts",
        )
        require(self.seed >= 0, f"--seed is {self.seed}; it cannot be negative")
        require(
            not (self.pretrained and self.checkpoint),
            "--pretrained and --checkpoint: choose one to start from",
        )


@dataclasses.dataclass
class MachineOptions:
    """What to compute on; passed to Lightning.

    Args:
        accelerator: cpu, gpu, mps ...; auto takes the fastest
        devices: how many, or which: 2, [0, 3], auto
        strategy: auto, ddp, fsdp ...
        num_nodes: machines
        precision: 32-true, bf16-mixed or 16-mixed
    """

    accelerator: str = "auto"
    devices: int | list[int] | str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    precision: Precision = "32-true"


GROUPS = (RunOptions, OptimOptions, AugmentOptions, MachineOptions)


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config")
    for group in GROUPS:
        add_options(parser, group)
    parser.add_argument("--resume", type=str | None, default=None, help="continue the run in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")


def before_parsing(arguments: list[str]) -> list[str]:
    """`--resume RUN` brings the run's own options, over which others may be given."""
    for position, argument in enumerate(arguments):
        if argument.startswith("--resume"):
            folder = argument.partition("=")[2] or "".join(arguments[position + 1 : position + 2])
            require(bool(folder), "--resume: give the folder of a run")
            config = Path(folder) / run_folder.CONFIG
            require(config.is_file(), f"--resume {folder}: holds no {run_folder.CONFIG}; it is not a run's folder")
            arguments = ["--config", str(config), *arguments, "--output", folder]
            break
    for path in config_files(arguments):
        check_config(path, read_config(path), {argument.partition("=")[0] for argument in arguments})
    return arguments


def check_config(path: Path, values: dict[str, Any], typed: set[str]) -> None:
    """Refuse a file's options that fetch or replace, unless they were typed too: the file may be a stranger's."""
    for name in OF_THE_CALL:
        require(name not in values, f"--config {path}: {name} must be typed, as --{name}; a file may not say it")
    for name in ("data", "model"):
        if fetches(name, values.get(name)) and f"--{name}" not in typed:
            raise UserError(
                f"--config {path}: names a {name} to be fetched; type --{name} {values[name]} if you mean it"
            )
    model_args = values.get("model_args")
    building = sorted(BUILDING & model_args.keys()) if isinstance(model_args, dict) else []
    if building and not any(argument.startswith("--model_args") for argument in typed):
        raise UserError(f"--config {path}: model_args may not give {building[0]}; type --model_args.{building[0]}")


def run(parser: ArgumentParser, options: Namespace) -> int:
    run_options = take(RunOptions, options)
    optim, augment, machine = (
        take(OptimOptions, options),
        take(AugmentOptions, options),
        take(MachineOptions, options),
    )
    terminal.quiet_libraries()
    console = terminal.console()
    check_model_name(run_options.model)
    data = open_data(
        run_options.data, run_options.val_fraction, run_options.seed, run_options.class_names,
        **(how_drawn(Path(options.resume)) if options.resume else {}),
    )  # fmt: skip
    if optim.lr is None and (run_options.pretrained or run_options.checkpoint):
        optim.lr = 2e-4  # trained weights are lost at the rate that new ones need
    if augment.augment == "auto":
        augment.augment = "crop" if data.photographs else "affine"
    behind = architecture(run_options.model)
    prep = choose_preprocessing(run_options, data, behind)
    card = describe_model(run_options, data.class_names, prep, behind)
    folder = Path(run_options.output or default_output(run_options))
    if options.resume:
        run_folder.check_resumable(folder, card)
    files = RunFolder(folder, data.name)
    skipped = SkippedFiles(terminal.warn, run_options.max_undecodable)
    trainer = build_trainer(optim, machine, folder, [files, skipped, TrainProgress(console, files)])
    task, note = build_task(run_options, card, optim, augment)
    first_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first_process and not options.resume:
        run_folder.prepare_folder(folder, options.overwrite)
        run_folder.check_space(folder, task.model)
        write_config(options, folder)
    if first_process and (held_out := data.held_out()):
        held_out.write(folder)
    workers = default_workers(data) if run_options.num_workers is None else run_options.num_workers
    module = ImageDataModule(data, prep, augment, optim.batch_size, workers, run_options.seed)
    print_heading(console, task, data, trainer, machine, note)
    try:
        trainer.fit(task, module, ckpt_path=folder / run_folder.LAST if options.resume else None, weights_only=True)
    except StoppedBySignal as stopped:
        files.draw_curves(card) if files.rows else None
        console.print(f"\nStopped at {stopped.where}; everything is saved. Continue with")
        typed = [(n, getattr(run_options, n)) for n in ("data", "model") if fetches(n, getattr(run_options, n))]
        more = "".join(f" --{name} {shlex.quote(value)}" for name, value in typed)
        console.print(f"  vimamba train --resume {shlex.quote(str(folder))}{more}", style="bold")
        return 128 + stopped.signum
    except Exception as error:
        if options.resume and not files.started:  # Lightning trips over a checkpoint of something else in many ways
            wrong = f"{run_folder.LAST} cannot be continued from ({type(error).__name__}: {one_line(error)})"
            raise UserError(f"--resume {folder}: {wrong}") from error
        raise
    if trainer.is_global_zero:
        print_summary(console, folder, files, skipped)
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


def build_task(
    options: RunOptions, card: ModelCard, optim: OptimOptions, augment: AugmentOptions
) -> tuple[ClassificationTask, str]:
    """The model with its first weights, and a note on where they are from."""
    torch.manual_seed(options.seed)
    prep = card.preprocessing
    classes = len(card.class_names)
    model = build_model(options.model, classes, prep.in_chans, prep.img_size, options.model_args, options.pretrained)
    note = "published weights" if options.pretrained else ""
    if options.checkpoint:
        note = load_start(model, Path(options.checkpoint))
    return ClassificationTask(model, card, optim, augment, options.seed), note


def build_trainer(
    optim: OptimOptions, machine: MachineOptions, folder: Path, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """Lightning's trainer, without the files and lines of its own."""
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
        given = " ".join(f"--{key} {value}" for key, value in dataclasses.asdict(machine).items())
        raise UserError(f"{given}: not possible here: {error}") from error
    if trainer.precision != machine.precision:  # Lightning takes another without asking
        raise UserError(f"--precision {machine.precision}: needs a GPU; on the CPU give bf16-mixed or 32-true")
    return trainer


def write_config(options: Namespace, folder: Path) -> None:
    """Every option of the run, so that `--config` repeats it."""
    kept = options.clone()
    for name in OF_THE_CALL:
        kept.pop(name, None)
    kept["output"] = str(folder)
    try:
        text = yaml.safe_dump(kept.as_dict(), sort_keys=False, allow_unicode=True)
        (folder / run_folder.CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / run_folder.CONFIG}: cannot be written ({error.strerror})") from error


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


def print_summary(console: Any, folder: Path, files: RunFolder, skipped: SkippedFiles) -> None:
    best = files.best
    console.print()
    terminal.print_classes(console, files.best_classes)
    console.print()
    for which, count in skipped.counts.items():
        terminal.warn(f"{count} {which} image{'s' * (count > 1)} could not be decoded and were left out")
    top1 = terminal.percent(best["val_top1"])
    console.print(
        f"[bold green]{top1}%[/] of the held-out images named right by the weights of epoch {best['epoch']}, "
        f"after {duration(files.seconds)}."
    )
    console.print(f"In {folder}: {', '.join(n for n in run_folder.OWN_FILES if (folder / n).exists())}", markup=False)
    name = shlex.quote(str(folder))
    pictures = "IMAGE..."
    if files.trained_on in BUILT_IN:
        pictures = f"{shlex.quote(str(write_digits(folder / 'digits')[0].parent))}/*.png"
    console.print(f"Next: vimamba eval {name}", markup=False)
    console.print(f"      vimamba predict {name} {pictures}", markup=False)
