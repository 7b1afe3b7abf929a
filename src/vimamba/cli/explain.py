"""vimamba explain: show what in images a classifier's answers rest on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from rich.markup import escape

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.cli.predict import list_images, told, written
from vimamba.errors import UserError, escaped, nearest, require
from vimamba.files import whole
from vimamba.inference.explain import report
from vimamba.inference.explain.attention import look
from vimamba.inference.explain.faithful import curves, random_map
from vimamba.inference.explain.maps import METHODS, explain
from vimamba.inference.explain.tokens import principal_colours, token_norms
from vimamba.inference.predictor import PictureDataset, Pictures, Predictor, load_run
from vimamba.models.token_model import TokenModel
from vimamba.tasks.classification import ClassificationTask


@dataclasses.dataclass
class ExplainOptions:
    """What is asked, and where the answers go.

    Args:
        output: folder for overlays, sheet.png, report.html and explain.npz
        method: attribution, attention, rollout, gradcam, integrated_gradients
        target: the class that is asked about; the likeliest of each image if not given
        curves: measure each method by deletion and insertion, beside a random map
        device: cpu, cuda, cuda:1, mps ...; auto takes the fastest
    """

    output: str
    method: list[str] = dataclasses.field(default_factory=lambda: ["attribution", "attention", "rollout"])
    target: str | None = None
    curves: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        require(bool(self.method), f"`method`: give one or more of {', '.join(METHODS)}")
        for name in self.method:
            hint = nearest(name, METHODS) or f"; give {', '.join(METHODS)}"
            require(name in METHODS, f"`method` {name}: there is no such method{hint}")
        self.method = list(dict.fromkeys(self.method))
        is_file = Path(self.output).exists() and not Path(self.output).is_dir()
        require(not is_file, f"`output` {self.output}: is a file; give a folder")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("images", nargs="+", help="image files, folders, or patterns such as 'photos/**/*.jpg'")
    parser.add_argument("--config", action="config")
    add_options(parser, ExplainOptions)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what = take(ExplainOptions, options)
    terminal.quiet_libraries()
    predictor = load_run(options.run, what.device)
    require(
        issubclass(predictor.task, ClassificationTask), f"{options.run}: does not classify; explain takes runs that do"
    )
    target = None if what.target is None else class_number(what.target, predictor.class_names)
    paths = list_images(options.images)
    folder, out = Path(what.output), terminal.console()
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found, arrays, shares, failed = [], {}, [], 0
    dataset = PictureDataset(Pictures(paths), predictor.transform)
    with terminal.progress_bar(out if out.is_terminal else terminal.console(stderr=True)) as bar:
        line = bar.add_task("explaining", total=len(paths))
        for index, path in enumerate(paths):
            item = dataset[index]
            bar.advance(line)
            if isinstance(item, UserError):
                terminal.warn(str(item))
                failed += 1
                continue
            each, numbers, of_layers = explained(predictor, item.image, path, what, target)
            found.append(each)
            shares.append(of_layers)
            arrays.update({f"{index}/{name}": value for name, value in numbers.items()})
            save(folder, f"{index:03}-{Path(path).stem[:80]}", each)
            out.print(f"{escape(escaped(path))}  [bold green]{escape(each.label)}[/] {100 * each.score:.1f}%")
    if found:
        write_all(folder, str(options.run), found, arrays, shares)
        out.print(f"{escape(str(folder / 'report.html'))}")
    return told(failed, len(paths))


def class_number(name: str, names: list[str]) -> int:
    """The number of a class.

    Raises:
        UserError: the model has none of that name.
    """
    require(name in names, f"`target` {escaped(name)}: the run knows no such class{nearest(name, names)}")
    return names.index(name)


def explained(
    predictor: Predictor, image_CHW: torch.Tensor, path: str, what: ExplainOptions, target: int | None
) -> tuple[report.Explained, dict[str, np.ndarray], list[dict[str, float]]]:
    """One image: pictures and areas, the numbers, and the share of each direction by layer."""
    model, batch = predictor.model, image_CHW[None].to(predictor.device)
    with torch.no_grad():
        scores = model(batch)[0].softmax(-1)
    number = int(scores.argmax()) if target is None else target
    maps = {name: explain(model, batch, name, [number])[0] for name in what.method}
    numbers = {name: value.cpu().numpy() for name, value in maps.items()}
    image = as_picture(image_CHW, predictor.card.preprocessing)
    pictures = {name: report.overlay(image, value) for name, value in numbers.items()}
    areas: dict[str, tuple[float, float]] = {}
    if what.curves:
        for name, value in [*maps.items(), ("random", random_map(next(iter(maps.values()))))]:
            judged = curves(model, batch[0], value.to(predictor.device), number)
            areas[name] = judged.deletion_area, judged.insertion_area
            numbers |= {f"{name} deletion": judged.deletion.numpy(), f"{name} insertion": judged.insertion.numpy()}
    of_layers: list[dict[str, float]] = []
    if isinstance(model, TokenModel):
        numbers["token norms"] = token_norms(model, batch)[0].cpu().numpy()
        pictures["token norms"] = report.overlay(image, numbers["token norms"])
        pictures["principal components"] = report.coloured(image, principal_colours(model, batch)[0].cpu().numpy())
        for layer in look(model, batch):
            names = [direction.name for direction in layer.directions]
            of_layers.append(dict(zip(names, layer.shares_BG[0].tolist(), strict=True)))
    name = predictor.class_names[number]
    return report.Explained(path, name, float(scores[number]), image, pictures, areas), numbers, of_layers


def as_picture(image_CHW: torch.Tensor, preprocessing: Any) -> Image.Image:
    """What the model sees, as people see it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (255 * (image_CHW.cpu() * std + mean)).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def save(folder: Path, stem: str, each: report.Explained) -> None:
    """A PNG of each picture of one image."""
    for what, picture in each.pictures.items():
        file = folder / f"{os.fsencode(stem).decode(errors='replace')}-{what.replace(' ', '-')}.png"
        with written(file), whole(file) as partial:
            picture.save(partial, "png")


def write_all(
    folder: Path, title: str, found: list[report.Explained], arrays: dict[str, np.ndarray], shares: list[Any]
) -> None:
    """The sheet, the page and the numbers."""
    rows = [[report.enlarged(each.image), *each.pictures.values()] for each in found]
    layers = [
        (str(i), {name: float(np.mean([of_image[i][name] for of_image in shares])) for name in shares[0][i]})
        for i in range(len(shares[0]))
    ]
    with written(folder):
        with whole(folder / "sheet.png") as partial:
            report.contact_sheet(rows).save(partial, "png")
        with whole(folder / "report.html") as partial:
            partial.write_text(report.page(title, found, layers), encoding="utf-8")
        with whole(folder / "explain.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
