"""A training run from its arguments to its folder: `vimamba.train`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from vimamba.data.loaders import ImageDataModule
from vimamba.data.sources import open_data
from vimamba.data.split import HELD_OUT, how_drawn
from vimamba.errors import UserError, naming, one_line, out_of_memory
from vimamba.models.description import BUILDING, check_arguments, check_plain
from vimamba.quiet import libraries_quiet
from vimamba.tasks.checkpoint_every import CheckpointEvery
from vimamba.tasks.config import GROUPS, TrainConfig, default_output
from vimamba.tasks.defaults import choose_lr, choose_schedule, steps_an_epoch
from vimamba.tasks.find import find_task
from vimamba.tasks.loggers import build_loggers
from vimamba.tasks.options import RunOptions
from vimamba.tasks.record import Record
from vimamba.tasks.resume import check_same, config_before, find_checkpoint
from vimamba.tasks.run_folder import CONFIG, RunFolder
from vimamba.tasks.run_keeper import RunKeeper
from vimamba.tasks.signals import StoppedAtOnce, StoppedBySignal, StopSignals
from vimamba.tasks.skipped import SkippedFiles
from vimamba.tasks.task import Choice
from vimamba.tasks.trainer import build_trainer
from vimamba.tasks.weights import Architecture, ModelCard, architecture, check_model_name, load_start

if TYPE_CHECKING:
    from vimamba.inference.predictor import Predictor

Warn = Callable[[str], None]
WORKER_ENDED = "DataLoader worker (pid"  # in PyTorch's words for it


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        folder: with config.yaml, metrics.csv, model.safetensors (the weights of the best epoch), curves.png, logs/ and
            checkpoints/.
        record: what each epoch came to, which of them was the best, and the seconds that it took.
    """

    folder: Path
    record: Record

    @property
    def history(self) -> list[dict[str, Any]]:
        """A row for each epoch: `epoch`, `train_loss`, `val_loss`, `val_top1` ..."""
        return self.record.rows

    @property
    def best(self) -> dict[str, Any]:
        """The row of the epoch whose weights were kept."""
        return self.record.best

    def predictor(self, device: str | torch.device | None = None) -> Predictor:
        """The trained model at work, as `vimamba.load_run` gives it."""
        from vimamba.inference.predictor import load_run

        return load_run(self.folder, device)


def train(
    data: str | os.PathLike[str] | None = None,
    model: str | None = None,
    *,
    resume: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
    progress: bool = True,
    **options: Any,
) -> Run:
    callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else callbacks
    loggers = [loggers] if isinstance(loggers, Logger) else loggers
    given = {"data": data, "model": model, **options}
    values = {name: value for name, value in given.items() if value is not None or name not in ("data", "model")}
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    before = config_before(Path(resume), values).to_dict() if resume is not None else {}
    before.pop("output", None)  # the folder may have been moved
    with contextlib.nullcontext() if progress else libraries_quiet():
        training = Training(
            TrainConfig.of(before | values), Path(resume) if resume is not None else None, overwrite,
            lambda line: warnings.warn(line, stacklevel=3), callbacks, loggers, progress,
        )  # fmt: skip
        return training.fit()


class Training:
    """A run that is ready to begin: everything is built and checked, and nothing written yet.

    Args:
        config: what is asked for.
        resumed_from: the folder of a run to go on with.
        overwrite: replace the run in the output folder.
        warn: is told what was left out or taken for something.
        callbacks: Lightning's, beside those that keep the run.
        loggers: Lightning's, beside those that the arguments name.
        progress: show Lightning's own progress bar.

    Raises:
        UserError: it cannot begin; nothing has been touched.
    """

    def __init__(
        self,
        config: TrainConfig,
        resumed_from: Path | None = None,
        overwrite: bool = False,
        warn: Warn = warnings.warn,
        callbacks: Sequence[pl.Callback] = (),
        loggers: Sequence[Logger] = (),
        progress: bool = False,
    ):
        options, self.config, self.overwrite = config.run, config, overwrite
        self.resumed = find_checkpoint(resumed_from, config, warn) if resumed_from else None
        task = find_task(options.task)
        check_model_name(options.model)
        self.data = open_data(
            options.data, options.val_fraction, options.seed, options.class_names, source=task.source(),
            ignore_index=config.dense.ignore_index, **(how_drawn(resumed_from) if resumed_from else {}),
        )  # fmt: skip
        behind = architecture(self.resumed.card.model if self.resumed else options.model)
        choice = task.choose(config, self.data, behind)
        augment = choice.augment
        self.card = self._describe(choice, behind)
        path = resumed_from or Path(options.output or default_output(options))
        self.folder = RunFolder(path, self.resumed.checkpoint if self.resumed else None)
        every = CheckpointEvery.parse(options.checkpoint_every)
        self.keeper = RunKeeper(self.folder, every, StopSignals(), self.data.name)
        self.warn, self.skipped = warn, SkippedFiles(warn, options.max_undecodable)
        self.trainer = build_trainer(
            config, path, self.keeper, [self.skipped, *callbacks], [*build_loggers(options.logger, path), *loggers],
            progress, f"val_{task.monitor}", task.mode,
        )  # fmt: skip
        images = len(self.data.train) // self.trainer.world_size
        self.optim = choose_schedule(config.optim, images, task.batches)
        self.trainer.fit_loop.max_epochs = self.optim.epochs
        self.trainer.log_every_n_steps = min(10, max(1, images // self.optim.batch))  # type: ignore[attr-defined]
        model, self.note = self._build()
        trained = options.pretrained or options.checkpoint is not None
        self.optim = choose_lr(self.optim, model, trained, self.card if self.resumed else None)
        self.folder.texts = self._texts()
        self.task = task(model, self.card, self.optim, augment, options.seed, config.dense)
        if config.machine.compile:  # now that the moving average has its copy
            model.compile()
        workers = self.data.workers if options.num_workers is None else options.num_workers
        self.module = ImageDataModule(
            self.data, task.transforms(self.card.preprocessing, augment), self.optim.batch, workers, options.seed,
            augment.repeated_augmentation,
        )  # fmt: skip

    def _describe(self, choice: Choice, behind: Architecture) -> ModelCard:
        """What the run's files say of its model; of a resumed one what its checkpoint says, which must be the same."""
        options, names = self.config.run, self.data.class_names
        if self.resumed:
            check_same(self.resumed.folder, self.resumed.card, options.model, options.model_args, names)
            return self.resumed.card
        return describe_model(options, names, choice, behind)

    def _texts(self) -> dict[str, str]:
        """The files that the run begins with: its arguments with what was chosen, and what it holds out."""
        options = dataclasses.replace(self.config.run, output=str(self.folder.path))
        if not self.resumed:
            options.img_size = self.card.preprocessing.img_size
        config, held_out = dataclasses.replace(self.config, run=options, optim=self.optim), self.data.held_out()
        return {CONFIG: config.to_text()} | ({HELD_OUT: held_out.text()} if held_out else {})

    def _build(self) -> tuple[nn.Module, str]:
        """The model and a note on where its weights are from."""
        if self.resumed:
            model = self.card.build()
            changes = "".join(f", {change}" for change in self.resumed.changes)
            note = f"continued from {self.resumed.checkpoint.name}{changes}"
        else:
            model, note = build_start(self.config.run, self.card)
        if self.config.machine.grad_checkpointing:
            set_grad_checkpointing(model, self.config.run.model)
        return model, note

    @property
    def size(self) -> str:
        """Of what the model sees: 224 x 224."""
        return " x ".join(map(str, self.card.preprocessing.img_size))

    @property
    def schedule(self) -> str:
        """How long the run takes, as a clause."""
        optim, images = self.optim, len(self.data.train) // self.trainer.world_size
        each = steps_an_epoch(images, optim.batch, optim.accumulate)
        size = optim.batch * optim.accumulate * self.trainer.world_size
        steps = f"{optim.epochs} epochs of {each} steps of {size} images: {optim.passes * each} steps"
        return f"{steps}, learning rate {optim.highest_lr:g}"

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The run's folder, kept from other runs by the first process."""
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            yield
            return
        with self.folder.held(self.overwrite):
            if not self.resumed:
                self.folder.check_space(self.task.model, averaged=self.task.ema is not None)
            yield

    def fit(self, heading: Callable[[Training], None] = lambda training: None) -> Run:
        """Train to the end.

        Args:
            heading: is called when the folder is held and training is about to begin.

        Raises:
            UserError: something is wrong with the input, the machine or the numbers; says what is kept.
            StoppedBySignal: it was asked to stop, and everything is saved.
            StoppedAtOnce: it was asked a second time; what had been saved before is kept.
        """
        checkpoint, path = self.resumed.checkpoint if self.resumed else None, self.folder.path
        with self._held():
            for line in self.data.notes if rank_zero_only.rank == 0 else ():  # type: ignore[attr-defined]
                self.warn(line)
            heading(self)
            with self.keeper.signals:
                try:
                    self.trainer.fit(self.task, self.module, ckpt_path=checkpoint, weights_only=True)
                except UserError:
                    raise
                except StoppedBySignal as stopped:
                    self.keeper.draw_curves(self.task)
                    stopped.args = (f"stopped at {stopped.where}; everything is saved: continue with `resume` {path}",)
                    raise
                except StoppedAtOnce as stopped:
                    stopped.args = (f"stopped at once; {self.keeper.kept()}",)
                    raise
                except Exception as error:
                    signum = self.keeper.signals.asked
                    if signum and WORKER_ENDED in str(error):  # a young one, before `obey_parent`
                        raise StoppedAtOnce(signum, f"stopped at once; {self.keeper.kept()}") from error
                    if (refused := self._refusal(error)) is None:
                        raise
                    raise refused from error
        return Run(path, self.keeper.record)

    def _refusal(self, error: Exception) -> UserError | None:
        """What the user can do about an error from a library, in a sentence; None where that is not known."""
        if self.resumed and not self.keeper.started:  # Lightning trips over a checkpoint of something else in many ways
            folder = self.folder.path
            wrong = f"{self.resumed.checkpoint.relative_to(folder)} cannot be continued from"
            return UserError(f"`resume` {folder}: {wrong} ({type(error).__name__}: {one_line(error)})")
        if isinstance(error, MisconfigurationException):  # what a strategy cannot do shows when it begins
            return UserError(f"the trainer refuses: {one_line(error)}")
        if WORKER_ENDED in str(error):
            why = f"a process that decodes images was ended, as happens where memory runs out ({one_line(error)})"
            return UserError(f"`num_workers`: {why}; give fewer; {self.keeper.kept()}")
        if out_of_memory(error):
            smaller = f"`batch_size` {self.optim.batch_size}: does not fit into the memory; give less, and `accumulate`"
            more = f"for as many images a step, `grad_checkpointing`, or a smaller `img_size` than {self.size}"
            return UserError(f"{smaller} {more}; {self.keeper.kept()}")
        return None


def describe_model(options: RunOptions, class_names: list[str], choice: Choice, behind: Architecture) -> ModelCard:
    """What the run's files will say of its model; refused now where they could not be opened again."""
    model_args = {**behind.model_args, **options.model_args}
    model_args = {key: value for key, value in model_args.items() if key not in BUILDING}
    if model_args:
        with naming("`model_args`"):
            check_plain(model_args)
            check_arguments(behind.name, model_args)
    return ModelCard(behind.name, model_args, class_names, choice.preprocessing, task=options.task, head=choice.head)


def build_start(options: RunOptions, card: ModelCard) -> tuple[nn.Module, str]:
    """The model with its first weights, and a note on where they are from."""
    torch.manual_seed(options.seed)
    # By the name that was given, which may be a page of the hub's with weights and arguments of its own.
    model = dataclasses.replace(card, model=options.model, model_args=options.model_args).build(options.pretrained)
    note = "published weights" if options.pretrained else ""
    if options.checkpoint:
        note = load_start(model, Path(options.checkpoint), card.task)
    return model, note


def set_grad_checkpointing(model: Any, name: str) -> None:
    """Keep less of the forward pass.

    Raises:
        UserError: the model cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm's models assert that they can
        raise UserError(f"`grad_checkpointing`: {name} cannot do that; leave it out") from error


def _document() -> None:
    """Give `train` the signature and the words of its arguments, which stand with the classes that hold them."""
    own = inspect.signature(train).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    named = [
        inspect.Parameter(field.name, keyword, default=_default(field), annotation=field.type)
        for group in GROUPS
        for field in dataclasses.fields(group)
        if field.name not in own
    ]
    first, *rest = (p for p in own.values() if p.name != "options")
    train.__signature__ = inspect.Signature([first, *rest, *named], return_annotation=Run)  # type: ignore[attr-defined]
    words = "\n".join(inspect.cleandoc(group.__doc__ or "").partition("Args:\n")[2] for group in GROUPS)
    words = textwrap.indent(words, "    ").rstrip()
    train.__doc__ = f"""Teach a model the classes of your images, as `vimamba train` does.

    Writes and resumes the same folders as the command. Ctrl-C saves the run and raises StoppedBySignal.

    Args:
{words}
        resume: continue the run in this folder; of its arguments, those given here are changed.
        overwrite: replace the run in the output folder.
        callbacks: Lightning's, such as EarlyStopping("val_loss").
        loggers: Lightning's, built; beside those that `logger` names.
        progress: show a progress bar, and what other libraries have to say.

    Returns:
        Run, with the folder, the rows of the epochs and a predictor.

    Raises:
        UserError: an argument, the data or the machine does not allow it; the sentence says what to do.
    """


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return {} if field.default_factory is not dataclasses.MISSING else inspect.Parameter.empty


_document()
