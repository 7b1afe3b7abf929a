"""The pictures that a run, an evaluation and a prediction leave."""

from __future__ import annotations

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure  # not pyplot's, whose backend is the user's
from matplotlib.font_manager import FontEntry, get_font
from PIL import Image

from vimamba.data.decode import flatten
from vimamba.tasks.record import Record

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#64748b"
NAMED = 60
"""Classes that have room for their names."""
DOTS = 100  # to an inch
LONG = 40
"""Characters of a name that is not cut."""


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def save_curves(path: Path, record: Record, title: str, heading: str) -> None:
    """Loss and the number that decides over the epochs; a heading that ends in % shows shares as percentages."""
    rows = record.rows
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in rows], color=GREY, marker=".", label="training (augmented)")
    if "val_loss" in rows[-1]:
        left.plot(epochs, [row["val_loss"] for row in rows], color=BLUE, marker=".", label="held out")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend(frameon=False)
    share = heading.endswith("%")
    values = [row[record.monitor] * (100 if share else 1) for row in rows]
    right.plot(epochs, values, color=BLUE, marker=".")
    best = epochs.index(record.best["epoch"])
    right.annotate(
        f"{values[best]:.2f}%" if share else f"{values[best]:.4g}", (epochs[best], values[best]),
        (0, 8 if values[best] == max(values) else -16),  # points: on the side where the line does not go
        textcoords="offset points", ha="center", color=ORANGE, weight="bold",
    )  # fmt: skip
    right.margins(y=0.12)
    right.plot(epochs[best], values[best], "o", color=ORANGE)
    right.set(xlabel="epoch", ylabel=f"held out, {heading}")
    for axes in (left, right):
        _style(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    (title,), families = _drawable([title])
    figure.suptitle(title, fontsize=11, fontfamily=families)
    figure.savefig(path)


def text_picture(text: str, size: int, colour: str, background: str) -> Image.Image:
    """A line of text, letters of so many pixels."""
    (text,), families = _drawable([text])
    figure = Figure(figsize=(0.1, 0.1), dpi=DOTS, facecolor=background)
    figure.text(0, 0, text or " ", fontsize=72 * size / DOTS, fontfamily=families, color=colour)
    return _rendered(figure, pad=0.25 * size / DOTS)


def _rendered(figure: Figure, pad: float) -> Image.Image:
    """What a figure shows, as a picture as large as that."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight", pad_inches=pad)
    return Image.open(drawn).convert("RGB")


def with_caption(image: Image.Image, lines: list[str]) -> Image.Image:
    """A copy of an image with lines of text below it, in letters of about a fifteenth of its width."""
    image = flatten(image)
    width, height = image.size
    lines, families = _drawable(lines)
    inches = max(width, 160) / DOTS
    row = 0.24 + inches / 15
    figure = Figure(figsize=(inches, row * len(lines)), dpi=DOTS)
    for number, line in enumerate(lines):
        figure.text(
            0.02, 1 - (number + 0.5) / len(lines), shortened(line), va="center", fontsize=72 * row / 2.2,
            fontfamily=families,
        )  # fmt: skip
    caption = _rendered(figure, pad=0.05)  # as wide as the longest line
    whole = Image.new("RGB", (max(width, caption.width), height + caption.height), "white")
    whole.paste(image.convert("RGB"), ((whole.width - width) // 2, 0))
    whole.paste(caption, (0, height))
    return whole


def save_confusion(path: Path, confusion_CC: torch.Tensor, class_names: list[str], title: str) -> None:
    """Rows are the classes of the images, columns what was predicted, colours the share of the row.

    Up to NAMED classes have their names at the edges; beyond that there are numbers, and the pairs that are confused
    most are listed by name.
    """
    count = len(class_names)
    share_CC = confusion_CC / confusion_CC.sum(1, keepdim=True).clamp(min=1)
    (title, *names), families = _drawable([title, *map(shortened, class_names)])
    longest = max(map(len, names))
    side = min(18.0, max(4.0, 0.32 * count) + 0.09 * longest) if count <= NAMED else 9.0
    with matplotlib.rc_context({"font.family": families}):
        figure = Figure(figsize=(side, side), dpi=150, layout="constrained")
        axes = figure.subplots()
        # Of several classes that share a point of the picture, the one with the largest share is seen.
        cells = torch.nn.functional.adaptive_max_pool2d(share_CC[None].float(), min(count, 250))[0]
        axes.imshow(cells.numpy(), cmap="Blues", vmin=0, vmax=1, extent=(-0.5, count - 0.5, count - 0.5, -0.5))
        if count <= NAMED:
            axes.set_xticks(range(count), names, rotation=90 if longest > 2 else 0)
            axes.set_yticks(range(count), names)
        else:
            lines = "\n".join(_most_confused(confusion_CC, names))
            axes.text(1.04, 1, lines, transform=axes.transAxes, va="top", fontsize=9, linespacing=1.6)
        if count <= 25:
            for row in range(count):
                for column in range(count):
                    if number := int(confusion_CC[row, column]):
                        color = "white" if share_CC[row, column] > 0.5 else "black"
                        axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=color)
        axes.set(xlabel="predicted", ylabel="class of the image")
        axes.set_title(title, wrap=True)
        axes.tick_params(length=0)
        figure.savefig(path, bbox_inches="tight")


def _most_confused(confusion_CC: torch.Tensor, names: list[str], most: int = 25) -> list[str]:
    """A line on each of the pairs of classes that are taken for each other most often."""
    wrong_CC = confusion_CC.clone().fill_diagonal_(0)
    found = wrong_CC.flatten().topk(min(most, wrong_CC.numel()))
    pairs = [(int(i) // len(wrong_CC), int(i) % len(wrong_CC), int(n)) for n, i in zip(*found, strict=True) if n > 0]
    heading = "confused most" if pairs else "nothing confused"
    return [heading, *(f"{n}x  {names[true]} ({true}) for {names[taken]} ({taken})" for true, taken, n in pairs)]


def _drawable(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts as matplotlib draws them, and the font families that have their characters.

    A dollar sign is no mathematics, and a character that no installed font has is written as its number.
    """
    families = ["DejaVu Sans"]
    covered = set(_characters(font_manager.findfont("DejaVu Sans")))
    missing = {c for text in texts for c in text if c.isprintable()} - covered
    for listed in (_listed_fonts, _unlisted_fonts):
        for font in sorted(listed(), key=lambda font: font.name) if missing else ():
            if found := missing & _characters(font.fname):
                families.append(font.name)
                covered, missing = covered | found, missing - found
    return [_plain(text, covered) for text in texts], families


def _listed_fonts() -> list[FontEntry]:
    """Those that matplotlib knows, but one that has a box for every character."""
    return [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]


@cache  # once a process: it reads the folders of fonts
def _unlisted_fonts() -> list[FontEntry]:
    """Those that came after matplotlib wrote its list, which it keeps between processes."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for file in set(font_manager.findSystemFonts()) - known:
        with contextlib.suppress(Exception):  # a damaged file is no font
            font_manager.fontManager.addfont(file)
    return [font for font in _listed_fonts() if font.fname not in known]


@cache
def _characters(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, get_font(file).get_charmap()))
    except OSError:  # removed after matplotlib wrote its list
        return frozenset()


def _plain(text: str, covered: set[str]) -> str:
    numbers = (f"\\u{ord(c):04x}" if c <= "\uffff" else f"\\U{ord(c):08x}" for c in text)
    return "".join(c if c in covered else number for c, number in zip(text, numbers, strict=True)).replace("$", r"\$")


def shortened(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= LONG else f"{name[: LONG // 2]}...{name[-LONG // 2 :]}"
