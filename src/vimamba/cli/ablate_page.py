"""A study as a table and a picture, and the documentation page made from all studies."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from rich.table import Table

from vimamba.cli import terminal
from vimamba.errors import UserError
from vimamba.files import write_text
from vimamba.layers.grid import ScanPath
from vimamba.tasks.ablation import BASE, DESIGNS
from vimamba.tasks.study import Findings, Row, Study, difference

COLUMNS = ("design", "top-1 %", "±", "runs", "lr", "steps", "parameters", "MFLOPs", "forward ms", "step ms")
DRAWN = ("row", "column", "snake", "window2")


def save_plot(path: Path, study: Study, title: str) -> None:
    """Accuracy, with its spread, over the cost of a forward pass."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    labels = []
    for row in study.rows:
        at = (1e3 * row.gflops, 100 * row.top1)
        color = "#ea580c" if row.design == BASE else "#2563eb"
        axes.errorbar(*at, yerr=100 * row.spread, fmt="o", color=color, capsize=2)
        labels.append(
            axes.annotate(
                row.design, at, (5, 4), textcoords="offset points", fontsize=8,
                arrowprops=dict(arrowstyle="-", color="#94a3b8", linewidth=0.6, shrinkA=0),
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
        )  # fmt: skip
    axes.set(
        xlabel="MFLOPs of a forward pass", ylabel="held-out accuracy, % (mean ± deviation over seeds)", title=title
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    _spread(figure, labels)
    figure.savefig(path)


def _spread(figure: Figure, labels: list[Annotation]) -> None:
    """Move labels down until none stands on another or on a point; a line leads to its own."""
    figure.draw_without_rendering()  # the layout is known then
    points = (label.axes.transData.transform(label.xy) for label in labels if label.axes)
    near = 4 * figure.dpi / 72  # less than a label is away from its point
    taken = [Bbox.from_extents(x - near, y - near, x + near, y + near) for x, y in points]
    for label in sorted(labels, key=lambda label: -label.xy[1]):
        box = Text.get_window_extent(label)  # the annotation's own has its line, too
        down = next(down for down in range(10**4) if not box.translated(0, -down).count_overlaps(taken))
        if down:
            across, up = label.xyann
            label.xyann = (across + 6, up - 72 * down / figure.dpi)  # room for the line
        taken.append(Text.get_window_extent(label))


def plot_of(page: Path, name: str) -> Path:
    """Where the page has the picture of a study."""
    return page.with_name(f"{page.stem}-{name}.png")


def draw_paths(path: Path, grid: tuple[int, int] = (4, 6)) -> None:
    """Each path over a small grid, from its first patch (a dot) to its last (an arrow)."""
    figure = Figure(figsize=(3 * len(DRAWN), 2.3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        order = ScanPath.parse(name).keys(grid).flatten().argsort().tolist()
        rows, columns = zip(*(divmod(patch, grid[1]) for patch in order), strict=True)
        axes.scatter(columns, rows, s=90, marker="s", color="#e2e8f0")
        axes.plot(columns, rows, color="#2563eb", linewidth=1.5)
        axes.plot(columns[0], rows[0], "o", color="#ea580c")
        axes.annotate(
            "", (columns[-1], rows[-1]), (columns[-2], rows[-2]), arrowprops=dict(arrowstyle="-|>", color="#2563eb")
        )
        axes.set(title=name, aspect="equal")
        axes.invert_yaxis()
        axes.axis("off")
    figure.savefig(path)


def write_page(page: Path, findings: Findings) -> None:
    """docs/designs.md and the JSON file that it is made from: switches, drawings, every study's table and findings."""
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        findings.write(page.with_suffix(".json"))
        draw_paths(page.with_name("paths.svg"))
        write_text(page, render(page, findings))
    except OSError as error:
        raise UserError(f"--page {page}: cannot be written ({error.strerror})") from error


def render(page: Path, findings: Findings) -> str:
    """The page; its tables, and every sentence with a number of ours in it, say what the findings are."""
    parts = [SWITCHES, cost_table(findings.costs)]
    for name, study in sorted(findings.studies.items()):
        parts += [f"## Measured on {name}", markdown_table(study), told_apart(study), best_rates(study),
                  f"![accuracy and cost]({plot_of(page, name).name})"]  # fmt: skip
    return "\n\n".join([*parts, advice(findings)]) + "\n"


def cost_table(costs: dict[str, float]) -> str:
    """What `design_costs` found."""
    rows = [f"| {name} | {cost:.2f} |" for name, cost in sorted(costs.items(), key=lambda item: item[1])]
    return "\n".join([COSTS, "", "| design | forward time |", "| --- | ---: |", *rows])


def cells(row: Row) -> list[str]:
    """A row as a table shows it."""
    return [
        row.design, f"{100 * row.top1:.2f}", f"{100 * row.spread:.2f}", str(row.runs), f"{row.lr:g}", str(row.steps),
        terminal.count(row.parameters), f"{1e3 * row.gflops:.1f}", f"{row.forward_ms:.1f}", f"{row.step_ms:.1f}",
    ]  # fmt: skip


def terminal_table(study: Study) -> Table:
    """The study as a table in the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in study.rows:
        table.add_row(*cells(row))
    return table


def markdown_table(study: Study) -> str:
    """The study as a table in Markdown, with its budget above and what skipping does below."""
    common = " ".join(f"{name}={value}" for name, value in study.model_args.items())
    caption = (
        f"`{study.model}` {common}, batches of {study.batch_size}, the training {study.equal} of {study.epochs} epochs "
        f"of {BASE} for every design, its learning rate the best of {', '.join(f'{lr:g}' for lr in study.lrs)} for the "
        "first seed."
    )
    lines = [caption, "", "| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in study.rows]
    return "\n".join([*lines, *(f"\n{line}" for line in skipping_lines(study))])


def skipping_lines(study: Study) -> list[str]:
    """What skipping does to each gated design."""
    return [
        f"{row.design}: skipping {100 * row.skip_share:.0f}% of the directions changes top-1 by "
        f"{100 * (row.skip_top1 - row.top1):+.2f} points and forward time by "
        f"{100 * (row.skip_forward_ms / row.forward_ms - 1):+.0f}%."
        for row in study.rows
        if row.skip_share is not None and row.skip_top1 is not None and row.skip_forward_ms is not None
    ]


def told_apart(study: Study) -> str:
    """Which designs the seeds tell apart from the base, in a clause each; single runs tell nothing."""
    base = study.row(BASE)
    if base is None or base.runs < 2:
        return f"One run of {BASE} has no spread, so no order is claimed."
    clauses = []
    for row in sorted(study.rows, key=lambda row: -row.top1):
        if row is base or row.runs < 2:
            continue
        points, clear = difference(row, base)
        verdict = ("above" if points > 0 else "below") if clear else "not told apart from"
        clauses.append(f"{row.design} is {verdict} {BASE} ({points:+.2f} points)")
    return f"Against the spread of the seeds: {'; '.join(clauses)}."


def best_rates(study: Study) -> str:
    """The designs that did best with each learning rate."""
    rates: dict[str, list[str]] = {}
    for row in study.rows:
        rates.setdefault(f"{row.lr:g}", []).append(row.design)
    clauses = [f"{rate} for {', '.join(designs)}" for rate, designs in sorted(rates.items())]
    return f"Best learning rate: {'; '.join(clauses)}."


def advice(findings: Findings) -> str:
    """Which design to use: what is known of the published models, and what the studies found."""
    compared = [versus(findings, *pair) for pair in COMPARED]
    found = [clause for clause in [*compared, most_worth(findings), skipping(findings)] if clause]
    return "\n".join([ADVICE, *(f"  - {clause}" for clause in found), LEARNING_RATE])


def versus(findings: Findings, design: str, other: str) -> str:
    """How one design did beside another in every study that has runs enough of both, and what it costs."""
    clauses = []
    for name, study in sorted(findings.studies.items()):
        row, beside = study.row(design), study.row(other)
        if row is not None and beside is not None and min(row.runs, beside.runs) > 1:
            points, clear = difference(row, beside)
            clauses.append(f"{points:+.1f} points on {name}{'' if clear else ', not told apart'}")
    if not clauses:
        return ""
    if design in findings.costs and other in findings.costs:
        clauses.append(f"{findings.costs[design] / findings.costs[other]:.2f} of the forward time")
    return f"{design} against {other}: {'; '.join(clauses)}."


def most_worth(findings: Findings) -> str:
    """The design that stands furthest above the base in each study."""
    clauses = []
    for name, study in sorted(findings.studies.items()):
        base = study.row(BASE)
        gains = {} if base is None else {row.design: difference(row, base) for row in study.rows}
        above = {design: points for design, (points, clear) in gains.items() if clear and points > 0}
        if above:
            best = max(above, key=above.__getitem__)
            clauses.append(f"{best} on {name} ({above[best]:+.1f} points)")
    return f"Worth most above {BASE}: {'; '.join(clauses)}." if clauses else ""


def skipping(findings: Findings) -> str:
    """What it cost to skip directions in each study."""
    clauses = [
        f"{100 * row.skip_share:.0f}% of the directions of {row.design} for {100 * (row.skip_top1 - row.top1):+.2f} "
        f"points on {name}"
        for name, study in sorted(findings.studies.items())
        for row in study.rows
        if row.skip_share is not None and row.skip_top1 is not None
    ]
    sparsity = DESIGNS["gate"]["gate_sparsity"]
    return f"Skipping, trained with `gate_sparsity={sparsity}`: {'; '.join(clauses)}." if clauses else ""


SWITCHES = """# Bidirectional designs

*Made by `vimamba ablate --page` from designs.json; edit `vimamba/cli/ablate_page.py` instead.*

A direction is a path over the grid of patches and a sense. These are arguments of `VisionMamba`, or
`--model_args.NAME VALUE` of `vimamba train`.

| argument | what it does |
| --- | --- |
| `bidirectional="ssm_conv"` | both senses, each with its own weights: the published models |
| `bidirectional="ssm"` | both senses, one set of convolution and projections; only A differs |
| `bidirectional="layer"` | layers in pairs, the second reads backwards; the streams are added |
| `bidirectional="none"` | one sense |
| `bidirectional="every 2nd"`, `"last 8"`, or a list | both senses in some layers, one in the others |
| `alternate=True` | layers of one sense take turns in it |
| `pooled_token=True` | layers of one sense read the mean of the tokens first: global context at half the cost |
| `paths=["row", "column"]` | which orders are read, below; `"column:backward"` for one sense of one |
| `path_weights="shared"` | all paths use one set of weights |
| `merge="gate"`, `gate="image"` or `"token"` | directions weighed by a learned gate, the mean at the start |
| `gate_sparsity=0.1` | factor in `model.gate_loss(gates)`, low where layers have chosen; `vimamba train` adds it |
| `model.set_gate_threshold(0.3)` | in evaluation, do not compute directions whose image gate is under this |
| `conv="2d"` | a 3×3 convolution on the grid in place of the causal one |
| `stem="conv"` | 3×3 convolutions of stride 2 in place of the patch embedding |
| `pos_embed="sincos"`, `rope="patches"` | fixed positions added once; rotation in front of every block |
| `num_registers=4` | learned tokens spread among the patches |

![paths](paths.svg)

Row order is free. Every other path costs one gather in front of the mixer and one behind."""

COSTS = """## What each costs

Forward time on the CPU of Vim-Ti's width, 6 blocks, one image of 512×512 pixels, as a multiple of ssm_conv."""

COMPARED = (
    (BASE, "none"),
    (BASE, "ssm"),
    ("layer", BASE),
    ("alternate", BASE),
    ("every 2nd", BASE),
)
"""Two senses beside one, own weights beside shared ones, and what computes less beside the base."""

ADVICE = """## Which to use

- Published weights load into `ssm_conv` (or what a checkpoint was trained with), nothing else. `merge="gate"` may be
  put on top of them: it starts out as the same model.
- The tables are of small models on small images under a small budget: they rank what learns fast there. They are no
  evidence about ImageNet, where the published order is ssm_conv 73.9, none 73.2, ssm 72.8, layer 70.9 (arXiv
  2401.09417), nor about dense tasks, where the same paper has ssm_conv ahead of none by 3.6 mIoU on ADE20K; neither
  was trained here. What they say of the classification of small images:"""

LEARNING_RATE = """\
- Learning rate: take the one in the design's row above as a first guess at this size of model and batch; larger
  models want less (the published recipes: 0.001 for batches of 1024 from scratch)."""
