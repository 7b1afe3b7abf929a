"""--resume: what a run goes on from, and which options may change on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.train_options import GROUPS, MachineOptions
from vimamba.errors import UserError, naming, require, shown
from vimamba.models.description import BUILDING
from vimamba.tasks.run_folder import CONFIG, WEIGHTS, latest_checkpoint
from vimamba.tasks.weights import ModelCard, described_weights

# What may change within a run. Everything else decides what the steps so far mean, or what the checkpoint holds.
TAKEN = {
    *("data", "num_workers", "max_undecodable", "checkpoint_every"),
    *("epochs", "lr", "weight_decay", "schedule", "warmup_epochs", "min_lr", "clip_grad"),
    *(field.name for field in dataclasses.fields(MachineOptions) if field.name != "precision"),
}


@dataclasses.dataclass
class Resumed:
    """A checkpoint to go on from, the model it is of, and the options that differ from the run's so far."""

    checkpoint: Path
    card: ModelCard
    changes: list[str]


def config_of(folder: str) -> Path:
    """The options of a run.

    Raises:
        UserError: there is no such run.
    """
    config = Path(folder) / CONFIG
    require(config.is_file(), f"--resume {folder}: holds no {CONFIG}; it is not a run's folder")
    return config


def resume(parser: ArgumentParser, options: Namespace) -> Resumed:
    """Hold the options against those that the run had, and find its last checkpoint.

    Raises:
        UserError: an option differs that may not, or there is nothing to go on from.
    """
    folder = options.resume
    before = parser.parse_args(["--config", str(config_of(folder))])
    if Path(options.output).absolute() != Path(folder).absolute():
        raise UserError(f"--output {options.output}: a run that is resumed stays in {folder}; leave --output out")
    names = [field.name for group in GROUPS for field in dataclasses.fields(group) if field.name != "output"]
    changed = {
        name: f"{name} {_text(before[name])} -> {_text(options[name])}"
        for name in names
        if before[name] != options[name]
    }
    if refused := [change for name, change in changed.items() if name not in TAKEN]:
        raise UserError(
            f"--resume {folder}: {' and '.join(refused)} cannot change within a run; leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or start a new run from its weights with "
            f"--checkpoint {Path(folder) / WEIGHTS}"
        )
    path, contents = latest_checkpoint(Path(folder), terminal.warn)
    tensors, described = described_weights(contents)
    require(described is not None, f"--resume {folder}: {path.name} is not a checkpoint of vimamba train")
    with naming(f"--resume {folder}: {path.relative_to(folder)}"):
        card = ModelCard.from_dict(described, tensors)
    begun = _epochs_begun(contents)
    require(
        options.epochs >= begun,
        f"--resume {folder}: --epochs is {options.epochs}, and the run is in epoch {begun} already; give more",
    )
    return Resumed(path, card, list(changed.values()))


def check_same(folder: str, saved: ModelCard, model: str, model_args: dict[str, Any], class_names: list[str]) -> None:
    """Refuse a checkpoint of another model, or of other classes, than the run's config and data say."""
    card = saved.model, {k: v for k, v in saved.model_args.items() if k not in BUILDING}
    given = model, {k: v for k, v in model_args.items() if k not in BUILDING}
    of_a_page = ":" in model  # which need not be there any more: the checkpoint says what it said
    for what, then, now in (
        ("model", card[0], card[0] if of_a_page else given[0]),
        ("--model_args", card[1], {**card[1], **given[1]} if of_a_page else given[1]),
        ("number of classes", len(saved.class_names), len(class_names)),
        ("list of classes", saved.class_names, class_names),
    ):
        require(then == now, f"--resume {folder}: the checkpoint's {what} is {shown(then)}, not {shown(now)}")


def _epochs_begun(contents: dict[str, Any]) -> int:
    place = contents.get("ImageDataModule")
    epoch, batches = (place.get(key) if isinstance(place, dict) else 0 for key in ("epoch", "batches_done"))
    whole = isinstance(epoch, int) and isinstance(batches, int)  # if not, Lightning will stumble over it
    return epoch + (batches > 0) if whole else 0  # type: ignore[operator]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
