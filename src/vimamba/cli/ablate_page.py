"""The picture of a study and the documentation page made from studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vimamba.errors import UserError
from vimamba.layers.grid import ScanPath

DRAWN = ("row", "column", "snake", "window2")


def save_plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Accuracy, with its spread, over the cost of a forward pass."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for row in rows:
        at = (1e3 * row["gflops"], 100 * row["top1"])
        color = "#ea580c" if row["design"] == "ssm_conv" else "#2563eb"
        axes.errorbar(*at, yerr=100 * row["spread"], fmt="o", color=color, capsize=2)
        axes.annotate(row["design"], at, (5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        xlabel="MFLOPs of a forward pass", ylabel="held-out accuracy, % (mean ± deviation over seeds)", title=title
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    figure.savefig(path)
    plt.close(figure)


def draw_paths(path: Path, grid: tuple[int, int] = (4, 6)) -> None:
    """Each path over a small grid, from its first patch (a dot) to its last (an arrow)."""
    figure, panels = plt.subplots(1, len(DRAWN), figsize=(3 * len(DRAWN), 2.3), layout="constrained")
    for axes, name in zip(panels, DRAWN, strict=True):
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
    plt.close(figure)


def write_page(page: Path, studies: Path, costs: dict[str, float]) -> None:
    """docs/designs.md: the switches, the drawing of each path, and every study's table and findings."""
    tables = sorted(studies.glob("ablate-*/table.md"))
    if not tables:
        raise UserError(f"--page {page}: {studies} holds no finished study")
    page.parent.mkdir(parents=True, exist_ok=True)
    draw_paths(page.with_name("paths.svg"))
    parts = [SWITCHES, cost_table(costs)]
    for file in tables:
        name = file.parent.name.removeprefix("ablate-")
        plot = page.with_name(f"designs-{name}.png")
        plot.write_bytes((file.parent / "designs.png").read_bytes())
        parts += [f"## Measured on {name}", file.read_text(encoding="utf-8").strip(), findings(file),
                  f"![accuracy and cost]({plot.name})"]  # fmt: skip
    page.write_text("\n\n".join([*parts, ADVICE]) + "\n", encoding="utf-8")


def cost_table(costs: dict[str, float]) -> str:
    """What `design_costs` found."""
    rows = [f"| {name} | {cost:.2f} |" for name, cost in sorted(costs.items(), key=lambda item: item[1])]
    return "\n".join([COSTS, "", "| design | forward time |", "| --- | ---: |", *rows])


def findings(file: Path) -> str:
    """Which designs the seeds tell apart from ssm_conv, in a clause each; single runs tell nothing."""
    table = [line for line in file.read_text(encoding="utf-8").splitlines() if " | " in line][2:]
    rows = [line.strip("| ").split(" | ") for line in table]
    top1 = {row[0]: (float(row[1]), float(row[2])) for row in rows if int(row[3]) > 1}
    if "ssm_conv" not in top1:
        return "One run of ssm_conv has no spread, so no order is claimed."
    base, spread = top1.pop("ssm_conv")
    clauses = []
    for name, (mean, own) in sorted(top1.items(), key=lambda item: -item[1][0]):
        clear = abs(mean - base) > spread + own
        verdict = ("above" if mean > base else "below") if clear else "not told apart from"
        clauses.append(f"{name} is {verdict} ssm_conv ({mean - base:+.2f} points)")
    rates: dict[str, list[str]] = {}
    for row in rows:
        rates.setdefault(row[4], []).append(row[0])
    best = "; ".join(f"{rate} for {', '.join(names)}" for rate, names in sorted(rates.items()))
    return f"Against the spread of the seeds: {'; '.join(clauses)}.\n\nBest learning rate: {best}."


SWITCHES = """# Bidirectional designs

*Made by `vimamba ablate --page`; edit `vimamba/cli/ablate_page.py` instead.*

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

ADVICE = """## Which to use

- Published weights load into `ssm_conv` (or what a checkpoint was trained with), nothing else. `merge="gate"` may be
  put on top of them: it starts out as the same model.
- The tables are of small models on small images under a small budget: they rank what learns fast there. They are no
  evidence about ImageNet, where the published order is ssm_conv 73.9, none 73.2, ssm 72.8, layer 70.9 (arXiv
  2401.09417), nor about dense tasks, where the same paper has ssm_conv ahead of none by 3.6 mIoU on ADE20K; neither
  was trained here.
- Classification of small images, from the tables: two senses (ssm_conv) beat one (none) by 8 to 12 points, and own
  weights for the second beat shared ones (ssm). One sense a layer in turns (layer, alternate) and two in every second
  layer do as well or better at the same training compute, with a fifth less to compute in use: take them where
  compute is short. On the larger grid a convolutional stem, on 8×8 pixels a 2-D convolution, was worth most.
- Skipping: trained with `gate_sparsity=0.15`, layers choose, and a third of the directions can go at no loss.
- Learning rate: take the one in the design's row above as a first guess at this size of model and batch; larger
  models want less (the published recipes: 0.001 for batches of 1024 from scratch)."""
