"""The pictures that a run and an evaluation leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#64748b"


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def save_curves(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Loss and held-out accuracy over the epochs."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=150, layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in rows], color=GREY, marker=".", label="training (augmented)")
    left.plot(epochs, [row["val_loss"] for row in rows], color=BLUE, marker=".", label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend(frameon=False)
    top1 = [100 * row["val_top1"] for row in rows]
    right.plot(epochs, top1, color=BLUE, marker=".", label="top-1")
    best = max(range(len(rows)), key=lambda i: top1[i])
    right.annotate(
        f"{top1[best]:.2f}%", (epochs[best], top1[best]), (0, -14), textcoords="offset points",
        ha="center", color=ORANGE, weight="bold",
    )  # fmt: skip
    right.plot(epochs[best], top1[best], "o", color=ORANGE)
    right.set(xlabel="epoch", ylabel="held-out accuracy, %")
    for axes in (left, right):
        _style(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def save_confusion(path: Path, confusion_CC: torch.Tensor, class_names: list[str], title: str) -> None:
    """Rows are the classes of the images, columns what was predicted, colours the share of the row."""
    count = len(class_names)
    share_CC = confusion_CC / confusion_CC.sum(1, keepdim=True).clamp(min=1)
    side = min(16.0, max(4.5, 0.32 * count + 2))
    figure, axes = plt.subplots(figsize=(side, side), dpi=150, layout="constrained")
    axes.imshow(share_CC.numpy(), cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        axes.set_xticks(range(count), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(range(count), class_names)
    if count <= 25:
        for row in range(count):
            for column in range(count):
                if number := int(confusion_CC[row, column]):
                    color = "white" if share_CC[row, column] > 0.5 else "black"
                    axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted", ylabel="class of the image", title=title)
    axes.tick_params(length=0)
    figure.savefig(path)
    plt.close(figure)
