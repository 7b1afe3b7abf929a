"""Which images a trained model is measured on, and what it is found to know."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vimamba.data.loaders import ImageDataModule
from vimamba.data.samples import Samples
from vimamba.data.sources import ImageData, open_data
from vimamba.data.split import HeldOut, how_drawn
from vimamba.data.transforms import AugmentOptions
from vimamba.errors import UserError, nearest, require, shown
from vimamba.inference.runner import Runner
from vimamba.kinds import describe, fits
from vimamba.tasks.config import fetches, read_config
from vimamba.tasks.results import Results
from vimamba.tasks.run_folder import CONFIG
from vimamba.tasks.task import Task, evaluation_of, results_of

Split = Literal["auto", "val", "all"]
OWN = "held-out images"  # of the run, by the name that its results are shown under


def folder_of(run: Path) -> Path:
    """The folder of a run, given itself, its weights or one of its checkpoints."""
    folders = (run,) if run.is_dir() else (run.parent, run.parent.parent)
    return next((folder for folder in folders if (folder / CONFIG).is_file()), folders[0])


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What a run's config.yaml says of its data; like all that a run carries, it may be a stranger's."""

    data: str | None = None
    class_names: str | None = None
    val_fraction: float = 0.2
    seed: int = 0
    ignore_index: int | None = None

    @classmethod
    def of(cls, run: Path) -> TrainedOn:
        """What the run's folder tells, or the defaults where it has no config.yaml.

        Raises:
            UserError: it is no configuration, or a value is of another kind.
        """
        path = folder_of(run) / CONFIG
        if not path.exists():
            return cls()
        config, kinds = read_config(path), get_type_hints(cls)
        found = {name: config[name] for name in kinds if name in config}
        for name, value in found.items():
            require(fits(kinds[name], value), f"{path}: {name} is {shown(value)}; expected {describe(kinds[name])}")
        return cls(**found)


def open_for_eval(
    run: Path, task: type[Task], data: str | None = None, split: Split = "auto", class_names: str | None = None,
    ignore_index: int | None = None,
) -> tuple[ImageData, str]:  # fmt: skip
    """The images to measure a run on, and what to call them.

    Of data that the run was trained on, wherever they lie now, it is the images that it held out; others are taken
    whole where they have no half to hold out.
    """
    config = TrainedOn.of(run)
    name = data or config.data
    if name is None:
        raise UserError("`data`: say what to measure on; the run's folder does not tell what it was trained on")
    if data is None and fetches("data", name):
        raise UserError(f"the run's {CONFIG} names data to be fetched: give `data` {name} if you mean to")
    same = data is None or same_place(name, str(config.data))
    how: dict[str, Any] = {"source": task.source(), "strict": False}
    how["ignore_index"] = ignore_index if ignore_index is not None or not same else config.ignore_index
    if same and split != "all":
        return open_own(name, config, class_names, run, how), OWN
    found = open_data(name, 0.2 if split == "val" else 1.0, 0, class_names, **how)
    if split != "all" and found.moved_from(HeldOut.read(folder_of(run))):
        return open_own(name, config, class_names, run, how), OWN
    return found, "images"


def open_own(name: str, config: TrainedOn, class_names: str | None, run: Path, how: dict[str, Any]) -> ImageData:
    """The data of a run, with the images that it held out."""
    names, drawn = class_names or config.class_names, how_drawn(folder_of(run))
    return open_data(name, config.val_fraction, config.seed, names, **how, **drawn)


def same_place(name: str, other: str) -> bool:
    return name == other or (Path(name).exists() and Path(other).exists() and Path(name).samefile(other))


def evaluate(
    runner: Runner, data: ImageData, batch_size: int | None = None, num_workers: int | None = None,
    most_skipped: float = 0.01, warn: Callable[[str], None] = warnings.warn,
    advance: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Results, int]:  # fmt: skip
    """Results over the held-out images of some data, and how many of them could not be decoded.

    Args:
        runner: with the model.
        data: whose classes the model knows, in any order.
        batch_size: images at once; chosen by the task if None.
        num_workers: processes that decode; chosen by the data and the machine if None.
        most_skipped: share of files that may be undecodable.
        warn: is told of each of them, and of what was left out of the data or taken for something.
        advance: is told how many images of how many are done.

    Raises:
        UserError: the model does not know a class, or too many files cannot be decoded.
    """
    task, card = runner.task, runner.card
    for line in data.notes:
        warn(line)
    samples = RenamedClasses(data.val, task, data.class_names, card.class_names)
    workers = data.workers if num_workers is None else num_workers
    transforms = task.transforms(card.preprocessing, AugmentOptions(augment="none"))
    module = ImageDataModule(data, transforms, batch_size or task.eval_batch, workers)
    evaluation = evaluation_of(task, card.class_names, detailed=True).to(runner.device)
    skipped = done = 0
    for batch in module.eval_loader(samples):
        if len(batch.images):
            targets = runner.to_device(batch.targets)
            for outputs, rows in runner(batch.images, batch.sizes):
                task.update(evaluation, outputs, targets[rows])
        for line in batch.skipped:
            warn(f"{line}; skipped")
        skipped += len(batch.skipped)
        require(
            skipped <= most_skipped * len(samples),
            f"stopped: {skipped} of the {len(samples)} images cannot be decoded, more than {most_skipped:.0%}; "
            "the warnings name them: repair or remove them",
        )
        done += len(batch.images) + len(batch.skipped)
        advance(done, len(samples))
    require(skipped < len(samples), f"none of the {len(samples)} images can be decoded; there is nothing to measure")
    return results_of(task, evaluation, card.class_names), skipped


class RenamedClasses:
    """Samples whose classes are counted in a model's order rather than the data's."""

    def __init__(self, samples: Samples, task: type[Task], data_names: list[str], model_names: list[str]):
        index = {name: i for i, name in enumerate(model_names)}
        unknown = [name for name in data_names if name not in index]
        if unknown:
            listed = ", ".join(model_names[:10]) + (" ..." if len(model_names) > 10 else "")
            hint = nearest(unknown[0], model_names) or f"; those are {listed}"
            raise UserError(
                f"`data`: has {len(data_names)} classes, of which '{unknown[0]}' is not among the "
                f"{len(model_names)} that the model knows{hint}"
            )
        self.samples, self.task, self.order = samples, task, [index[name] for name in data_names]

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Any:
        return self.samples.image(index)

    def target(self, index: int) -> Any:
        return self.task.renumbered(self.samples.target(index), self.order)

    def name(self, index: int) -> str:
        return self.samples.name(index)
