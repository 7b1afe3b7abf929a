"""vimamba predict: say what is in images, in words and pictures."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import glob
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.markup import escape

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.data.coco_json import write_coco
from vimamba.data.decode import DecodeError, decode_image
from vimamba.data.walk import LeftOut, find_images
from vimamba.errors import UserError, escaped, require
from vimamba.files import whole
from vimamba.inference.answers import MIN_SCORE, Asked
from vimamba.inference.predictor import Predictor, load_run
from vimamba.inference.runner import DeviceOptions, fitting
from vimamba.inference.tiles import TileOptions, Tiling, detect, segment
from vimamba.processes import default_workers
from vimamba.quiet import quiet_libraries
from vimamba.tasks.dense import DenseTask
from vimamba.tasks.detection import DetectionTask
from vimamba.tasks.options import InferenceOptions
from vimamba.tasks.results import Detections, Segmentation

FEW = 256  # images that are decoded sooner than worker processes start
LISTED = 8  # classes or objects in a line for people
LONGEST = 200  # bytes of the name of an image in those of its pictures: systems take 255


@dataclasses.dataclass
class PredictOptions:
    """What is to be said, and where.

    Args:
        output: folder for pictures: each image with what was found in it, to segment also the masks, and to detect all
            objects in predictions.json, as COCO has them
        top: classes, or objects, shown for each image; 5, or 100 objects, if not given
        min_score: objects of which a detector is less sure are left out
        json: print one JSON object a line, one line an image
        csv: print a table with a header
    """

    output: str | None = None
    top: int | None = None
    min_score: float = MIN_SCORE
    json: bool = False
    csv: bool = False

    def __post_init__(self) -> None:
        require(self.top is None or self.top >= 1, f"--top is {self.top}; it must be at least 1")
        require(0.0 <= self.min_score <= 1.0, f"--min_score is {self.min_score}; give a share from 0 to 1")
        require(not (self.json and self.csv), "--json and --csv: choose one to print")
        require(
            self.output is None or not Path(self.output).exists() or Path(self.output).is_dir(),
            f"--output {self.output}: is a file; give a folder",
        )


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("images", nargs="+", help="image files, folders, or patterns such as 'photos/**/*.jpg'")
    parser.add_argument("--config", action="config")
    for group in (PredictOptions, TileOptions, InferenceOptions, DeviceOptions):
        add_options(parser, group)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what, device = take(PredictOptions, options), take(DeviceOptions, options)
    tiles, how = take(TileOptions, options), take(InferenceOptions, options)
    quiet_libraries()
    predictor = load_run(options.run, device.device, device.precision, how.window, how.flip)
    predictor.task.check_inference(how)
    detects = issubclass(predictor.task, DetectionTask)
    require(detects or what.min_score == MIN_SCORE, "--min_score: is for runs that detect objects")
    paths = list_images(options.images)
    if tiles.tile is not None:
        alone = device.batch_size is None and device.num_workers is None
        require(alone, "--tile: looks at one tile after the other; leave --batch_size and --num_workers out")
        return run_tiled(predictor, paths, what, tiles)
    workers = device.num_workers
    if workers is None:
        workers = 0 if len(paths) <= FEW else default_workers()
    asked = Asked.by(predictor, what.top, what.min_score)
    out = terminal.console()
    # One console for lines and bar where both go to the terminal: the lines then appear above the bar.
    shown_on = out if out.is_terminal else terminal.console(stderr=True)
    pictures = Pictures(Path(what.output), predictor) if what.output else None
    failed = 0
    if what.csv:
        print_row(out, ["image", *predictor.task.result.columns(asked.top), "error"])
    with terminal.progress_bar(shown_on) as bar, pictures or contextlib.nullcontext():
        task = bar.add_task("predicting", total=len(paths))
        for path, answer in zip(paths, predictor.stream(paths, device.batch_size, workers), strict=True):
            failed += isinstance(answer, UserError)
            answer = asked.of(answer)
            files = pictures.add(path, answer) if pictures else {}
            if what.csv:
                for row in rows_of(path, answer, asked.top, predictor.task.result):
                    print_row(out, row)
            else:
                print_answer(out, path, answer, asked, what.json, files)
            bar.advance(task)
    return told(failed, len(paths))


def run_tiled(predictor: Predictor, paths: list[str], what: PredictOptions, tiles: TileOptions) -> int:
    """The same of images that are read in tiles, one after the other."""
    require(issubclass(predictor.task, DenseTask), "--tile: is for runs that segment or detect")
    require(what.output is not None, "--tile: give --output, a folder for what is found")
    require(not what.csv, "--csv: goes without --tile; --json prints what was found")
    out = terminal.console()
    asked = Asked.by(predictor, what.top, what.min_score)
    failed = 0
    with Pictures(Path(what.output or ""), predictor) as pictures:
        try:
            with terminal.progress_bar(out if out.is_terminal else terminal.console(stderr=True)) as bar:
                for path in paths:
                    answer, files = pictures.add_tiled(path, tiles, what.min_score, bar)
                    failed += isinstance(answer, UserError)
                    print_answer(out, path, answer, asked, what.json, files)
        except KeyboardInterrupt:
            done = pictures.tilings[-1:] and f" at {pictures.tilings[-1].progress()}"
            print(f"\nstopped{done or ''}; the same command goes on there", file=sys.stderr)
            return 128 + signal.SIGINT
        pictures.end()
    return told(failed, len(paths))


def told(failed: int, count: int) -> int:
    """The exit status, and on stderr how many images could not be read."""
    if failed:
        terminal.warn(f"{failed} of {count} images could not be read")
    return 1 if failed else 0


def list_images(given: list[str]) -> list[str]:
    """Files as they are, folders and patterns by what they hold; in the order given, each once."""
    found: dict[str, None] = {}
    for name in given:
        path = Path(name)
        if path.is_dir():
            left_out = LeftOut()
            inside = find_images(path, left_out)
            require(bool(inside), f"{escaped(name)}: holds no images")
            for line in left_out.lines(path):
                terminal.warn(line)
        elif path.exists() or not glob.has_magic(name):
            inside = [str(path)]  # a missing file is reported in its own line
        else:
            inside = [match for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not inside:
                raise UserError(f"{escaped(name)}: no file matches the pattern")
        found.update(dict.fromkeys(inside))
    return list(found)


def print_answer(out: Console, path: str, answer: Any, asked: Asked, as_json: bool, files: dict[str, str]) -> None:
    """One line: on stdout what the image shows, on stderr what is wrong with it."""
    if as_json:
        out.out(json.dumps({"image": path, **asked.body(answer), **files}))
    elif isinstance(answer, UserError):
        terminal.warn(str(answer))
    else:
        found = [(escape(name), f"{100 * p:.1f}%") for name, p in answer.top(min(asked.top, LISTED))]
        first, *others = found or [("nothing", "")]
        rest = "  ".join(f"{name} {share}" for name, share in others)
        out.print(f"{escape(escaped(path))}  [bold green]{first[0]}[/] {first[1]}  [dim]{rest}[/]")


def rows_of(path: str, answer: Any, top: int, kind: Any) -> list[list[str]]:
    """An image's rows of the table, or why it could not be read."""
    if isinstance(answer, UserError):
        return [[escaped(path), *[""] * len(kind.columns(top)), str(answer)]]
    return [[escaped(path), *row, ""] for row in answer.rows(top)]


def print_row(out: Console, cells: list[str]) -> None:
    """One line of CSV on stdout."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    out.out(line.getvalue())


class Pictures:
    """A folder of what was found: a picture an image, masks, and at the end COCO's JSON of all objects.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, folder: Path, predictor: Predictor):
        self.folder, self.predictor = folder, predictor
        self.used: set[str] = set()
        self.objects: list[tuple[str, Detections]] = []
        self.tilings: list[Tiling] = []
        self.open = contextlib.ExitStack()

    def __enter__(self) -> Pictures:
        self.open.enter_context(made(self.folder))
        return self

    def __exit__(self, *error: Any) -> None:
        """Write what is of all images, or of those that were done when something ended it."""
        with self.open:
            if not issubclass(self.predictor.task, DetectionTask):
                return
            file = self.folder / "predictions.json"
            with written(file):
                found = [answer for _, answer in self.objects]
                images = [(path, answer.size) for path, answer in self.objects]
                write_coco(file, images, [answer.to_coco() for answer in found], self.predictor.class_names)

    def add(self, path: str, answer: Any) -> dict[str, str]:
        """Write the pictures of an image; their paths by what they show."""
        if isinstance(answer, UserError):
            return {}
        name, image = self._name(Path(path).stem), decode_image(path)
        with fitting(self.predictor.task, 1, [(image.height, image.width)]):
            pictures = {"overlay": answer.draw(image)}
            if isinstance(answer, Segmentation):
                pictures["mask"] = answer.mask_image()
        if isinstance(answer, Detections):
            self.objects.append((path, answer))
        files = {what: self.folder / f"{name}-{what}.png" for what in pictures}
        for what, file in files.items():
            with written(file), whole(file) as partial:
                pictures[what].save(partial, "png")
        return {what: str(file) for what, file in files.items()}

    def add_tiled(self, path: str, tiles: TileOptions, min_score: float, bar: Any) -> tuple[Any, dict[str, str]]:
        """Look at an image tile by tile; what was found, or why it could not be read, and the paths."""
        name = self._name(Path(path).stem)
        try:
            tiling = Tiling(self.predictor, path, tiles, self.folder, name)
        except DecodeError as error:
            return error, {}
        self.tilings.append(tiling)
        line = bar.add_task(f"tiles of {escape(escaped(Path(path).name))}", total=len(tiling))

        def advance(done: int, of: int) -> None:
            bar.update(line, completed=done)

        try:
            with written(self.folder), fitting(self.predictor.task, 1, [tiling.image.size]):
                if not issubclass(self.predictor.task, DetectionTask):
                    return segment(tiling, advance)
                found, files = detect(tiling, min_score, advance)
                self.objects.append((path, found))
                return found, files
        except DecodeError as error:
            tiling.end()
            return error, {}
        finally:
            bar.remove_task(line)

    def end(self) -> None:
        """Remove what was kept for going on, once all images are done."""
        for tiling in self.tilings:
            tiling.end()

    def _name(self, stem: str) -> str:
        """A name that no other image has: those of different folders may be called the same."""
        while len(os.fsencode(stem)) > LONGEST:
            stem = stem[:-1]
        name, count = stem, 1
        while name in self.used:
            count += 1
            name = f"{stem}-{count}"
        self.used.add(name)
        return name


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder to write into; where nothing was written, what had to be made for it is gone again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """What keeps a file from being written, as a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error
