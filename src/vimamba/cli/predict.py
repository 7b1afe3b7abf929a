"""vimamba predict: name what is in images."""

from __future__ import annotations

import csv
import glob
import io
import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.markup import escape

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.data.walk import LeftOut, find_images
from vimamba.errors import UserError, escaped, require
from vimamba.inference.predictor import load_run
from vimamba.inference.runner import DeviceOptions
from vimamba.processes import default_workers

FEW = 256  # images that are decoded sooner than worker processes start


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, its model.safetensors or one of its checkpoints")
    parser.add_argument("images", nargs="+", help="image files, folders, or patterns such as 'photos/**/*.jpg'")
    parser.add_argument("--config", action="config")
    add_options(parser, DeviceOptions)
    parser.add_argument("--top", type=int, default=5, help="classes shown for each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, one line an image")
    parser.add_argument("--csv", action="store_true", help="print a table with a header, one row an image")


def run(parser: ArgumentParser, options: Namespace) -> int:
    device = take(DeviceOptions, options)
    if options.top < 1:
        raise UserError(f"--top is {options.top}; it must be at least 1")
    require(not (options.json and options.csv), "--json and --csv: choose one to print")
    terminal.quiet_libraries()
    predictor = load_run(options.run, device.device, device.precision)
    paths = list_images(options.images)
    workers = device.num_workers
    if workers is None:
        workers = 0 if len(paths) <= FEW else default_workers()
    top = min(options.top, len(predictor.class_names))
    out = terminal.console()
    # One console for lines and bar where both go to the terminal: the lines then appear above the bar.
    shown_on = out if out.is_terminal else terminal.console(stderr=True)
    failed = 0
    if options.csv:
        numbered = [f"{column}_{place}" for place in range(1, top + 1) for column in ("class", "probability")]
        print_row(out, ["image", *numbered, "error"])
    with terminal.progress_bar(shown_on) as bar:
        task = bar.add_task("predicting", total=len(paths))
        for path, answer in zip(paths, predictor.stream(paths, device.batch_size, workers), strict=True):
            failed += isinstance(answer, UserError)
            if options.csv:
                print_row(out, row_of(path, answer, top))
            else:
                print_answer(out, path, answer, top, options.json)
            bar.advance(task)
    if failed:
        terminal.warn(f"{failed} of {len(paths)} images could not be read")
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


def print_answer(out: Console, path: str, answer: Any, top: int, as_json: bool) -> None:
    """One line: on stdout what the image shows, on stderr what is wrong with it."""
    if as_json:
        body = {"error": str(answer)} if isinstance(answer, UserError) else answer.to_dict(top)
        out.out(json.dumps({"image": path, **body}))
    elif isinstance(answer, UserError):
        terminal.warn(str(answer))
    else:
        first, *others = [(escape(name), f"{100 * p:.1f}%") for name, p in answer.top(top)]
        rest = "  ".join(f"{name} {share}" for name, share in others)
        out.print(f"{escape(escaped(path))}  [bold green]{first[0]}[/] {first[1]}  [dim]{rest}[/]")


def row_of(path: str, answer: Any, top: int) -> list[str]:
    """An image's row of the table: its classes with their probabilities, or why it could not be read."""
    if isinstance(answer, UserError):
        return [escaped(path), *[""] * (2 * top), str(answer)]
    return [escaped(path), *(cell for name, p in answer.top(top) for cell in (name, f"{p:.6f}")), ""]


def print_row(out: Console, cells: list[str]) -> None:
    """One line of CSV on stdout."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    out.out(line.getvalue())
