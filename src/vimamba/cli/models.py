"""vimamba models: list the models, with their size and cost."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from typing import Any

import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.table import Table

from vimamba.cli import terminal
from vimamba.errors import UserError, nearest
from vimamba.models.registry import count_flops, count_parameters
from vimamba.quiet import quiet_libraries

MAX_MEASURED = 40  # building a thousand models takes minutes


@dataclasses.dataclass(frozen=True)
class ModelLine:
    """A model's size and cost; flops counts a multiply-add as two and is None where it cannot be counted."""

    name: str
    parameters: int
    input: tuple[int, ...]
    flops: int | None


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "filter", nargs="?", default=None, help="part of a name, or a pattern such as 'vim_*' or 'vit_tiny*'"
    )
    parser.add_argument("--all", action="store_true", help="timm's models too, not only vimamba's")
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def run(parser: ArgumentParser, options: Namespace) -> int:
    quiet_libraries()
    names = select(options.filter, options.all)
    console, measured = terminal.console(), []
    with terminal.progress_bar(terminal.console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=min(len(names), MAX_MEASURED))
        for name in names[:MAX_MEASURED]:
            measured.append(measure(name))
            bar.advance(task)
    if options.json:
        print(json.dumps([dataclasses.asdict(line) for line in measured]))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "input", "GFLOPs"):
        table.add_column(heading, justify="right")
    for line in measured:
        flops = "-" if line.flops is None else f"{line.flops / 1e9:.2f}"
        table.add_row(line.name, terminal.count(line.parameters), " x ".join(map(str, line.input)), flops)
    console.print(table)
    if len(names) > MAX_MEASURED:
        console.print(f"and {len(names) - MAX_MEASURED} more: {', '.join(names[MAX_MEASURED:])}", markup=False)
    console.print("[dim]GFLOPs of one image at that size; a multiply-add counts as two[/]")
    return 0


def own_models() -> list[str]:
    """vimamba's models among timm's."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vimamba.")]


def select(pattern: str | None, everything: bool) -> list[str]:
    """The names that a filter asks for."""
    known = timm.list_models() if everything else own_models()
    if pattern is None:
        return known
    wildcard = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = fnmatch.filter(known, wildcard)
    if not names:
        hint = nearest(pattern, known) or ("" if everything else "; --all looks among timm's too")
        raise UserError(f"no model matches '{pattern}'{hint}")
    return names


def measure(name: str) -> ModelLine:
    """Size and cost of a model, computed from shapes alone: no memory is used where the model can be built without."""
    try:
        with torch.device("meta"):
            return _measure(name)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return _measure(name, required=False)


def _measure(name: str, required: bool = True) -> ModelLine:
    """The line of a model built on the current device; without its operations if they are not required."""
    model: Any = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    flops: int | None = None
    try:
        flops = count_flops(model, size)
    except (NotImplementedError, RuntimeError):
        if required:
            raise
    return ModelLine(name, count_parameters(model), tuple(size), flops)
