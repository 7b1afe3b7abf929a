"""vimamba explain: show what in images a classifier's answers rest on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.markup import escape

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.cli.predict import list_images, made, told, written
from vimamba.errors import UserError, escaped, nearest, require
from vimamba.files import whole
from vimamba.inference.explain import report
from vimamba.inference.explain.faithful import curves, random_map
from vimamba.inference.explain.maps import MAPS, METHODS, explain
from vimamba.inference.explain.tokens import Use, direction_use, other_model, receptive_fields
from vimamba.inference.predictor import PictureDataset, Pictures, Predictor, load_run
from vimamba.quiet import quiet_libraries
from vimamba.tasks.classification import ClassificationTask

SHOWN = [name for name in METHODS if name not in ("gradcam", "integrated_gradients")]  # those without other packages
FIELD_IMAGES = 8  # over which a receptive field is averaged


@dataclasses.dataclass
class ExplainOptions:
    """What is asked, and where the answers go.

    Args:
        output: folder for overlays, sheet.png, report.html and explain.npz
        method: attribution, attention, rollout, gradcam, integrated_gradients, token_norms, principal_components,
            receptive_field, directions; all but those that need other packages if not given
        target: the class that is asked about; the likeliest of each image if not given
        curves: measure each map of an answer by deletion and insertion, beside a random map
        compare: models of timm whose receptive fields, untrained, stand beside the run's
        device: cpu, cuda, cuda:1, mps ...; auto takes the fastest
    """

    output: str
    method: list[str] = dataclasses.field(default_factory=lambda: list(SHOWN))
    target: str | None = None
    curves: bool = True
    compare: list[str] = dataclasses.field(default_factory=list)
    device: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.method), f"`method`: give one or more of {', '.join(METHODS)}")
        for name in self.method:
            hint = nearest(name, METHODS) or f"; give {', '.join(METHODS)}"
            require(name in METHODS, f"`method` {name}: there is no such method{hint}")
        self.method = list(dict.fromkeys(self.method))
        for name in self.compare:
            require(timm.is_model(name), f"`compare` {name}: there is no such model{nearest(name, timm.list_models())}")
        is_file = Path(self.output).exists() and not Path(self.output).is_dir()
        require(not is_file, f"`output` {self.output}: is a file; give a folder")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("images", nargs="+", help="image files, folders, or patterns such as 'photos/**/*.jpg'")
    parser.add_argument("--config", action="config")
    add_options(parser, ExplainOptions)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what = take(ExplainOptions, options)
    quiet_libraries()
    predictor = load_run(options.run, what.device)
    require(
        issubclass(predictor.task, ClassificationTask),
        f"{options.run}: does not classify, and vimamba explain asks what a class rests on; give a run that classifies",
    )
    target = None if what.target is None else class_number(what.target, predictor.class_names)
    paths = list_images(options.images)
    folder, out = Path(what.output), terminal.console()
    found: list[tuple[int, Found]] = []
    failed = 0
    dataset = PictureDataset(Pictures(paths), predictor.transform)
    with terminal.progress_bar(out if out.is_terminal else terminal.console(stderr=True)) as bar, made(folder):
        line = bar.add_task("explaining", total=len(paths))
        for index, path in enumerate(paths):
            item = dataset[index]
            bar.advance(line)
            if isinstance(item, UserError):
                terminal.warn(str(item))
                failed += 1
                continue
            if not found:  # said before the work on many images
                for name in what.compare:
                    other_model(name, item.image[None])
            each = explained(predictor, item.image, path, what, target)
            found.append((index, each))
            save(folder, f"{index:03}-{Path(path).stem[:80]}", each.shown.pictures)
            out.print(
                f"{escape(escaped(path))}  [bold green]{escape(each.shown.label)}[/] {100 * each.shown.score:.1f}%"
            )
        if found:
            write_all(folder, str(options.run), found, fields_of(predictor, [each for _, each in found], what))
            out.print(f"{escape(str(folder / 'report.html'))}")
    return told(failed, len(paths))


def class_number(name: str, names: list[str]) -> int:
    """The number of a class.

    Raises:
        UserError: the model has none of that name.
    """
    require(name in names, f"`target` {escaped(name)}: the run knows no such class{nearest(name, names)}")
    return names.index(name)


class Found(NamedTuple):
    """What was found of one image."""

    shown: report.Explained
    numbers: dict[str, np.ndarray]
    uses: list[Use]
    batch: torch.Tensor
    """The image as the model takes it, (1, channels, height, width)."""


def explained(
    predictor: Predictor, image_CHW: torch.Tensor, path: str, what: ExplainOptions, target: int | None
) -> Found:
    """Ask one image everything."""
    model, batch = predictor.model, image_CHW[None].to(predictor.device)
    with torch.no_grad():
        scores = model(batch)[0].softmax(-1)
    number = int(scores.argmax()) if target is None else target
    of_image = [name for name in what.method if name not in ("receptive_field", "directions")]
    values = {name: explain(model, batch, name, [number])[0] for name in of_image}
    numbers = {name: value.cpu().numpy() for name, value in values.items()}
    image = report.as_picture(image_CHW, predictor.card.preprocessing)
    pictures = {
        name.replace("_", " "): (report.coloured if value.ndim == 3 else report.overlay)(image, value)
        for name, value in numbers.items()
    }
    maps = {name: value for name, value in values.items() if name in MAPS}
    areas: dict[str, tuple[float, float]] = {}
    if what.curves and maps:
        for name, value in [*maps.items(), ("random", random_map(next(iter(maps.values()))))]:
            judged = curves(model, batch[0], value.to(predictor.device), number)
            areas[name.replace("_", " ")] = judged.deletion_area, judged.insertion_area
            numbers |= {f"{name} deletion": judged.deletion.numpy(), f"{name} insertion": judged.insertion.numpy()}
    uses = direction_use(model, batch) if "directions" in what.method else []
    for index, use in enumerate(uses):
        numbers[f"directions {index}"] = use.shares_BG[0].cpu().numpy()
        if use.gates_BG is not None:
            numbers[f"gates {index}"] = use.gates_BG[0].cpu().numpy()
    shown = report.Explained(path, predictor.class_names[number], float(scores[number]), image, pictures, areas)
    return Found(shown, numbers, uses, batch)


def fields_of(predictor: Predictor, found: list[Found], what: ExplainOptions) -> dict[str, dict[str, np.ndarray]]:
    """The receptive fields over the first images, of those that are as large as the first."""
    if "receptive_field" not in what.method:
        return {}
    alike = [each.batch for each in found if each.batch.shape == found[0].batch.shape][:FIELD_IMAGES]
    fields = receptive_fields(predictor.model, torch.cat(alike), what.compare)
    return {name: {way: field.cpu().numpy() for way, field in ways.items()} for name, ways in fields.items()}


def save(folder: Path, stem: str, pictures: dict[str, Image.Image]) -> None:
    """A PNG of each picture."""
    for what, picture in pictures.items():
        file = folder / f"{os.fsencode(stem).decode(errors='replace')}-{what.replace(', ', '-').replace(' ', '-')}.png"
        with written(file), whole(file) as partial:
            picture.save(partial, "png")


def write_all(
    folder: Path, title: str, found: list[tuple[int, Found]], fields: dict[str, dict[str, np.ndarray]]
) -> None:
    """The receptive fields, the sheet, the page and the numbers."""
    numbers = {f"{index}/{name}": value for index, each in found for name, value in each.numbers.items()}
    numbers |= {f"receptive_field/{name}/{way}": field for name, ways in fields.items() for way, field in ways.items()}
    drawn = {name: {way: report.logarithmic(field) for way, field in ways.items()} for name, ways in fields.items()}
    save(folder, "receptive-field", {f"{name}, {way}": p for name, ways in drawn.items() for way, p in ways.items()})
    shown = [each.shown for _, each in found]
    layers = mean_use([each.uses for _, each in found])
    with written(folder):
        with whole(folder / "sheet.png") as partial:
            report.sheet_of(shown, drawn).save(partial, "png")
        with whole(folder / "report.html") as partial:
            partial.write_text(report.page(title, shown, layers, drawn), encoding="utf-8")
        with whole(folder / "explain.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **numbers)  # type: ignore[arg-type]


def mean_use(of_images: list[list[Use]]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """The name of each layer, and by direction its mean share over the images and its mean gate, if it has one."""

    def named(names: list[str], values: list[torch.Tensor]) -> dict[str, float]:
        return dict(zip(names, torch.cat(values).mean(0).tolist(), strict=True))

    return [
        (
            str(index),
            named(uses[0].names, [use.shares_BG for use in uses]),
            named(uses[0].names, [use.gates_BG for use in uses if use.gates_BG is not None])
            if uses[0].gates_BG is not None
            else {},
        )
        for index, uses in enumerate(zip(*of_images, strict=True))
    ]
