"""What a run goes on from, and which of its arguments may change on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from vimamba.errors import UserError, naming, require, shown
from vimamba.models.description import BUILDING
from vimamba.tasks.config import TrainConfig, check_source, read_config
from vimamba.tasks.options import MachineOptions
from vimamba.tasks.run_folder import CONFIG, WEIGHTS, latest_checkpoint
from vimamba.tasks.weights import ModelCard, described_weights

# What may change within a run. Everything else decides what the steps so far mean, or what the checkpoint holds.
TAKEN = {
    *("data", "num_workers", "max_undecodable", "checkpoint_every", "logger"),
    *("epochs", "patience", "lr", "weight_decay", "schedule", "warmup_epochs", "min_lr", "clip_grad"),
    *(field.name for field in dataclasses.fields(MachineOptions) if field.name != "precision"),
}


@dataclasses.dataclass
class Resumed:
    """A checkpoint to go on from, the model it is of, and what differs from the run's arguments so far."""

    folder: Path
    checkpoint: Path
    card: ModelCard
    changes: list[str]


def config_of(folder: str | Path) -> Path:
    """The file of a run's arguments.

    Raises:
        UserError: there is no such run.
    """
    config = Path(folder) / CONFIG
    require(config.is_file(), f"`resume` {folder}: holds no {CONFIG}; it is not a run's folder")
    return config


def config_before(folder: Path, given: Container[str]) -> TrainConfig:
    """What a run was asked for so far.

    Args:
        folder: the run's, which may be a stranger's.
        given: names of the arguments that the user gives now.

    Raises:
        UserError: there is no such run, its file is damaged, or it names what is to be fetched or imported.
    """
    path = config_of(folder)
    with naming(f"`resume` {folder}"):
        values = read_config(path)
        check_source(path, values, given, builds=False)
        return TrainConfig.of(values)


def find_checkpoint(folder: Path, config: TrainConfig, warn: Callable[[str], None]) -> Resumed:
    """Hold the arguments against those that the run had, and find its last checkpoint.

    Raises:
        UserError: one differs that may not, or there is nothing to go on from.
    """
    now = config.to_dict()
    before = config_before(folder, now).to_dict()
    if Path(now["output"] or folder).resolve() != folder.resolve():
        raise UserError(f"`output` {now['output']}: a run that is resumed stays in {folder}; leave `output` out")
    changed = {
        name: f"{name} {_text(before[name])} -> {_text(now[name])}"
        for name in now
        if name != "output" and before[name] != now[name]
    }
    if refused := [change for name, change in changed.items() if name not in TAKEN]:
        raise UserError(
            f"`resume` {folder}: {' and '.join(refused)} cannot change within a run; leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or start a new run from its weights with "
            f"`checkpoint` {folder / WEIGHTS}"
        )
    path, contents = latest_checkpoint(folder, warn)
    tensors, described = described_weights(contents)
    require(described is not None, f"`resume` {folder}: {path.name} is not a checkpoint of a training run")
    with naming(f"`resume` {folder}: {path.relative_to(folder)}"):
        card = ModelCard.from_dict(described, tensors)
    begun = _epochs_begun(contents)
    require(
        config.optim.epochs is None or config.optim.epochs >= begun,
        f"`resume` {folder}: `epochs` is {config.optim.epochs}, and the run is in epoch {begun} already; give more",
    )
    return Resumed(folder, path, card, list(changed.values()))


def check_same(folder: Path, saved: ModelCard, model: str, model_args: dict[str, Any], class_names: list[str]) -> None:
    """Refuse a checkpoint of another model, or of other classes, than the run's config and data say."""
    card = saved.model, {k: v for k, v in saved.model_args.items() if k not in BUILDING}
    given = model, {k: v for k, v in model_args.items() if k not in BUILDING}
    of_a_page = ":" in model  # which need not be there any more: the checkpoint says what it said
    for what, then, now in (
        ("model", card[0], card[0] if of_a_page else given[0]),
        ("`model_args`", card[1], {**card[1], **given[1]} if of_a_page else given[1]),
        ("number of classes", len(saved.class_names), len(class_names)),
        ("list of classes", saved.class_names, class_names),
    ):
        require(then == now, f"`resume` {folder}: the checkpoint's {what} is {shown(then)}, not {shown(now)}")


def _epochs_begun(contents: dict[str, Any]) -> int:
    place = contents.get("ImageDataModule")
    epoch, batches = (place.get(key) if isinstance(place, dict) else 0 for key in ("epoch", "batches_done"))
    whole = isinstance(epoch, int) and isinstance(batches, int)  # if not, Lightning will stumble over it
    return epoch + (batches > 0) if whole else 0  # type: ignore[operator]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
