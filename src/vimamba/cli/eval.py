"""vimamba eval: measure a trained model on held-out images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.data.sources import ImageData
from vimamba.errors import require
from vimamba.inference.evaluation import OWN, Split, evaluate, folder_of, open_for_eval
from vimamba.inference.runner import DeviceOptions, Runner
from vimamba.quiet import quiet_libraries
from vimamba.tasks.figures import save_confusion
from vimamba.tasks.find import find_task
from vimamba.tasks.options import InferenceOptions
from vimamba.tasks.results import Results
from vimamba.tasks.weights import ModelCard, load_model


@dataclasses.dataclass
class EvalOptions:
    """What to measure on.

    Args:
        data: mnist, a folder, hfds/NAME or wds/FOLDER; what the run was trained on if not given
        split: val (held-out images) or all; auto takes the held-out ones where a folder or the run tells them apart
        class_names: file with one class name a line, for hub data, shards and masks whose labels have none
        ignore_index: value of the pixels of a mask that do not count; the run's, or 255, if not given
        max_undecodable: share of files that may be undecodable before it stops
        output: folder for confusion.png; the run's own if not given, where the picture is named after other data
    """

    data: str | None = None
    split: Split = "auto"
    class_names: str | None = None
    ignore_index: int | None = None
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
    add_options(parser, InferenceOptions)
    add_options(parser, DeviceOptions)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parser: ArgumentParser, options: Namespace) -> int:
    what, device, how = take(EvalOptions, options), take(DeviceOptions, options), take(InferenceOptions, options)
    quiet_libraries()
    model, card = load_model(options.run)
    task = find_task(card.task)
    task.check_inference(how)
    data, which = open_for_eval(Path(options.run), task, what.data, what.split, what.class_names, what.ignore_index)
    runner = Runner(model, card, device.device, device.precision, how)
    with terminal.progress_bar(terminal.console(stderr=True)) as bar:
        bar_line = bar.add_task("evaluating", total=len(data.val))
        results, skipped = evaluate(
            runner, data, device.batch_size, device.num_workers, what.max_undecodable, terminal.warn,
            lambda done, of: bar.update(bar_line, completed=done),
        )  # fmt: skip
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
    terminal.print_classes(console, [row for row in results.per_class if row[task.counted]])
    if absent := [row["name"] for row in results.per_class if not row[task.counted]]:
        console.print(
            f"no {task.counted} of: {', '.join(absent[:20])}{' ...' if len(absent) > 20 else ''}", markup=False
        )
    if skipped:
        terminal.warn(f"{skipped} image{'s' * (skipped > 1)} could not be decoded and were left out")
    columns = {**task.columns, "loss": "loss"}
    said = [terminal.said(columns[name], results.numbers[name]) for name in columns if name in results.numbers]
    rest = "".join(f", {number}" for number in said[1:])
    console.print(f"\n[bold green]{said[0]}[/]{rest}, on {results.images} {which} of {data.name}")
    if picture:
        console.print(f"confusion matrix: {picture}", markup=False)
    return 0


def write_confusion(
    what: EvalOptions, run: Path, card: ModelCard, data: ImageData, which: str, results: Results
) -> Path | None:
    """The picture of the confusion matrix; in the run's folder, that of its held-out images is not replaced by others.

    None where there are too many classes for one, or it cannot be written.
    """
    if results.confusion is None:
        return None
    folder = Path(what.output) if what.output else folder_of(run)
    replaced = which == OWN or what.output is not None
    path = folder / ("confusion.png" if replaced else f"confusion-{Path(data.name).resolve().name}.png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{card.model} on {data.name}: {terminal.percent(results.numbers['top1'])}%"
        save_confusion(path, results.confusion, card.class_names, title)
    except OSError as error:
        # The numbers have been computed: they are shown whatever becomes of the picture.
        terminal.warn(f"{path}: cannot be written ({error.strerror or error}); give another folder with --output")
        return None
    return path
