"""A comparison as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimamba.benchmark.run import Result, groups
from vimamba.benchmark.timing import quartiles
from vimamba.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
PLOTS = (".png", ".svg", ".pdf")


def check_writable(path: str | Path, option: str, parents: bool = False) -> None:
    """Raise UserError unless a file can be written there, in folders made for it or (without `parents`) its own."""
    path = Path(path)
    fresh = not path.exists()
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from error
    if fresh:
        path.unlink()


def as_row(result: Result) -> dict[str, Any]:
    """One result in plain values: seconds, bytes, operations."""
    entry = result.entry
    low, middle, high = quartiles(result.seconds) if result.seconds else (None, None, None)
    return {
        "name": result.name,
        "model": entry.model,
        "model_args": entry.model_args,
        "attention": entry.attention if result.cost.attends else None,
        "pass": entry.passes,
        "dtype": entry.dtype,
        "batch": entry.batch,
        "size": entry.size,
        "device": entry.device,
        "mode": entry.mode,
        "parameters": result.cost.parameters,
        "gflops_per_image": result.cost.flops / 1e9,
        "median_s": middle,
        "lower_quartile_s": low,
        "upper_quartile_s": high,
        "times_s": result.seconds,
        "images_per_s": result.images_per_second,
        "relative_time": result.relative,
        "peak_extra_bytes": result.peak_bytes,
        "error": result.error,
    }


def write_json(path: str | Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """Everything measured, with the machine it was measured on."""
    content = {"schema": SCHEMA, "machine": machine, "results": [as_row(result) for result in results]}
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def tables(results: Sequence[Result]) -> list[Table]:
    """A table for each pass, type and batch, by size; the relative time is that to the first model of its size."""
    titled: dict[tuple, Table] = {}
    for group in groups(results):
        passes, dtype, batch, _ = group[0].entry.combination
        if (passes, dtype, batch) not in titled:
            titled[passes, dtype, batch] = _empty_table(f"{passes}, {dtype}, batch {batch}")
        for result in group:
            titled[passes, dtype, batch].add_row(*_cells(result), end_section=result is group[-1])
    return list(titled.values())


def _empty_table(title: str) -> Table:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    shown.add_column("model", no_wrap=True)
    for heading in ("px", "GFLOPs", "ms", "spread", "relative", "images/s", "extra MB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown


def _cells(result: Result) -> list[str]:
    cells = [result.name, str(result.entry.size), f"{result.cost.flops / 1e9:.2f}"]
    megabytes = "-" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}"
    if result.error is not None:
        return [*cells, f"[red]{result.error.replace('[', chr(92) + '[')}[/]", "", "", "", megabytes]
    low, middle, high = (1000 * t for t in quartiles(result.seconds))
    times = [_digits(middle), f"±{50 * (high - low) / middle:.0f}%"]
    return [*cells, *times, f"{result.relative:.2f}", _digits(result.images_per_second or 0), megabytes]


def _digits(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(path: str | Path, machine_line: str, results: Sequence[Result]) -> None:
    """Time and memory against resolution, logarithmic: one row of panels for each pass, type and batch."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result.entry.combination[:3] for result in results))
    figure = Figure(figsize=(10, 0.8 + 3.4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    names = list(dict.fromkeys(result.name for result in results))
    for kind, (time_panel, memory_panel) in zip(kinds, panels, strict=True):
        passes, dtype, batch = kind
        for i, name in enumerate(names):
            shown = [r for r in results if r.name == name and r.entry.combination[:3] == kind]
            timed = [(r.entry.size, r.median / batch) for r in shown if r.median]
            sized = [(r.entry.size, r.peak_bytes / 1e6) for r in shown if r.peak_bytes]
            for panel, points in ((time_panel, timed), (memory_panel, sized)):
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=name)
        time_panel.set_title(f"{passes}, {dtype}, batch {batch}", loc="left")
        time_panel.set_ylabel("seconds per image")
        memory_panel.set_ylabel("peak memory beyond the model, MB")
        sizes = sorted({r.entry.size for r in results if r.entry.combination[:3] == kind})
        for panel in (time_panel, memory_panel):
            _logarithmic(panel, sizes)
    panels[0, 0].legend(frameon=False)
    figure.suptitle(machine_line, fontsize="small")
    try:
        figure.savefig(path, dpi=140)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the plot cannot be written ({error})") from error


def _logarithmic(panel: Any, sizes: Sequence[int]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log" if panel.lines else "linear")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.minorticks_off()
    panel.set_xlabel("image height and width, pixels")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
