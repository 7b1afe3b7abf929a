"""vimamba eval: measure a trained model on held-out images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.inference import DeviceOptions, RenamedClasses, Runner
from vimamba.cli.parsing import add_options, describe, fetches, read_config, take
from vimamba.data.loaders import ImageDataModule, default_workers
from vimamba.data.sources import ImageData, open_data
from vimamba.data.split import HeldOut, how_drawn
from vimamba.data.transforms import AugmentOptions
from vimamba.errors import UserError, require, shown
from vimamba.models.description import fits
from vimamba.tasks.figures import save_confusion
from vimamba.tasks.results import Evaluation, Results
from vimamba.tasks.run_folder import CONFIG
from vimamba.tasks.weights import ModelCard, load_model

OWN = "held-out images"  # of the run, by the name that its results are shown under


@dataclasses.dataclass
class EvalOptions:
    """What to measure on.

    Args:
        data: mnist, a folder, hfds/NAME or wds/FOLDER; what the run was trained on if not given
        split: val (held-out images) or all; auto takes the held-out ones where a folder or the run tells them apart
        class_names: file with one class name a line, for hub data and shards whose labels have none
        max_undecodable: share of files that may be undecodable before it stops
        output: folder for confusion.png; the run's own if not given, where the picture is named after other data
    """

    data: str | None = None
    split: Literal["auto", "val", "all"] = "auto"
    class_names: str | None = None
    max_undecodable: float = 0.01
    output: str | None = None

    def __post_init__(self) -> None:
        require(
            0.0 <= self.max_undecodable <= 1.0,
            f"--max_undecodable is {self.max_undecodable}; give a share from 0 to 1, such as 0.01",
        )


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("--config", action="config")
    add_options(parser, EvalOptions)
    add_options(parser, DeviceOptions)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parser: ArgumentParser, options: Namespace) -> int:
    what, device = take(EvalOptions, options), take(DeviceOptions, options)
    terminal.quiet_libraries()
    model, card = load_model(options.run)
    data, which = open_for_eval(what, Path(options.run))
    for line in data.notes:
        terminal.warn(line)
    samples = RenamedClasses(data.val, data.class_names, card.class_names)
    runner = Runner(model, device)
    results, skipped = evaluate(runner, card, data, samples, device, what.max_undecodable, options.json)
    picture = write_confusion(what, Path(options.run), card, data, which, results)
    if options.json:
        shown = {
            "run": options.run,
            "model": card.model,
            "data": data.name,
            "skipped": skipped,
            **results.to_dict(),
        }
        print(json.dumps(shown | {"confusion": str(picture) if picture else None}))
        return 0
    console = terminal.console()
    terminal.print_classes(console, [row for row in results.per_class if row.images])
    if absent := [row.name for row in results.per_class if not row.images]:
        console.print(f"no images of: {', '.join(absent[:20])}{' ...' if len(absent) > 20 else ''}", markup=False)
    if skipped:
        terminal.warn(f"{skipped} image{'s' * (skipped > 1)} could not be decoded and were left out")
    top = min(5, len(card.class_names))
    console.print(
        f"\n[bold green]{terminal.percent(results.top1)}%[/] top-1, {terminal.percent(results.top5)}% top-{top}, "
        f"loss {results.loss:.4f}, on {results.images} {which} of {data.name}"
    )
    if picture:
        console.print(f"confusion matrix: {picture}", markup=False)
    return 0


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
        told = {name: config[name] for name in kinds if name in config}
        for name, value in told.items():
            require(fits(value, kinds[name]), f"{path}: {name} is {shown(value)}; expected {describe(kinds[name])}")
        return cls(**told)


def open_for_eval(what: EvalOptions, run: Path) -> tuple[ImageData, str]:
    """The images to measure on, and what to call them.

    Of data that the run was trained on, wherever they lie now, it is the images that it held out; others are taken
    whole where they have no half to hold out.
    """
    config = TrainedOn.of(run)
    name = what.data or config.data
    if name is None:
        raise UserError("--data: say what to measure on; the run's folder does not tell what it was trained on")
    if what.data is None and fetches("data", name):
        raise UserError(f"the run's {CONFIG} names data to be fetched: give --data {name} if you mean to")
    own = what.data is None or same_place(name, str(config.data))
    if own and what.split != "all":
        return open_own(name, config, what.class_names, run), OWN
    data = open_data(name, 0.2 if what.split == "val" else 1.0, 0, what.class_names, strict=False)
    if what.split != "all" and data.moved_from(HeldOut.read(folder_of(run))):
        return open_own(name, config, what.class_names, run), OWN
    return data, "images"


def open_own(name: str, config: TrainedOn, class_names: str | None, run: Path) -> ImageData:
    """The data of a run, with the images that it held out."""
    names, drawn = class_names or config.class_names, how_drawn(folder_of(run))
    return open_data(name, config.val_fraction, config.seed, names, strict=False, **drawn)


def same_place(name: str, other: str) -> bool:
    return name == other or (Path(name).exists() and Path(other).exists() and Path(name).samefile(other))


def evaluate(
    runner: Runner, card: ModelCard, data: ImageData, samples: Any,
    options: DeviceOptions, most_skipped: float, on_stderr: bool,
) -> tuple[Results, int]:  # fmt: skip
    """Results over all the samples, and how many could not be decoded."""
    workers = default_workers(data) if options.num_workers is None else options.num_workers
    module = ImageDataModule(data, card.preprocessing, AugmentOptions(), options.batch_size, workers, seed=0)
    evaluation = Evaluation(card.class_names, confusion=True).to(runner.device)
    skipped = 0
    with terminal.progress_bar(terminal.console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=len(samples))
        for batch in module.eval_loader(samples):
            if len(batch.images):
                evaluation.update(runner(batch.images), batch.targets.to(runner.device))
            for line in batch.skipped:
                terminal.warn(f"{line}; skipped")
            skipped += len(batch.skipped)
            require(
                skipped <= most_skipped * len(samples),
                f"stopped: {skipped} of the {len(samples)} images cannot be decoded, more than {most_skipped:.0%}; "
                "the warnings name them: repair or remove them",
            )
            bar.advance(task, len(batch.targets) + len(batch.skipped))
    require(skipped < len(samples), f"none of the {len(samples)} images can be decoded; there is nothing to measure")
    return evaluation.compute(), skipped


def write_confusion(
    what: EvalOptions, run: Path, card: ModelCard, data: ImageData, which: str, results: Results
) -> Path | None:
    """The picture of the confusion matrix; in the run's folder, that of its held-out images is not replaced by others.

    None where there are too many classes for one, or it cannot be written.
    """
    if results.confusion is None:
        return None
    folder = Path(what.output) if what.output else folder_of(run)
    own = which == OWN or what.output is not None
    path = folder / ("confusion.png" if own else f"confusion-{Path(data.name).resolve().name}.png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{card.model} on {data.name}: {terminal.percent(results.top1)}%"
        save_confusion(path, results.confusion, card.class_names, title)
    except OSError as error:
        # The numbers have been computed: they are shown whatever becomes of the picture.
        terminal.warn(f"{path}: cannot be written ({error.strerror or error}); give another folder with --output")
        return None
    return path
