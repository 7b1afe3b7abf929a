"""Pictures of explanations, one page that carries them, and their numbers."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from vimamba.tasks.figures import shortened, text_picture
from vimamba.tasks.overlays import in_base64

LEAST_SIDE = 224  # pixels of the shorter side of a picture: maps of small images are enlarged to be seen
TEXT = 14  # pixels of the letters of a sheet
LEFT_TO_RIGHT = "\u200e"  # the mark behind a name of any script, and in front of the first
STRENGTH = 0.6  # share of the colours where a map is largest
DECADES = 4  # of a logarithmic map below its largest value


class Explained(NamedTuple):
    """One image and what was found of it."""

    name: str
    label: str
    score: float
    image: Image.Image
    pictures: dict[str, Image.Image]
    """By what they show: each method's overlay, and the tokens' norms and colours."""
    areas: dict[str, tuple[float, float]]
    """By method, and "random": under deletion and insertion."""

    @property
    def answer(self) -> str:
        """The name of the class, or that it has none."""
        return self.label if self.label.strip() else "(no name)"

    @property
    def columns(self) -> dict[str, Image.Image]:
        """The image itself and its pictures, as large."""
        return {"image": enlarged(self.image), **self.pictures}


def as_picture(image_CHW: torch.Tensor, preprocessing: Any) -> Image.Image:
    """What the model sees, as people see it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (255 * (image_CHW.cpu() * std + mean)).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")


def enlarged(image: Image.Image) -> Image.Image:
    """A copy that is large enough to be looked at, its pixels as squares."""
    times = max(1, -(-LEAST_SIDE // min(image.size)))
    return image.convert("RGB").resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def overlay(image: Image.Image, map_hw: np.ndarray) -> Image.Image:
    """A copy of an image, enlarged, with the largest values of a map in colour; negative ones are none."""
    picture = enlarged(image)
    values_hw = np.clip(np.nan_to_num(map_hw), 0, None)
    share_hw = (values_hw / max(values_hw.max(), np.finfo(np.float32).tiny)).astype(np.float32)
    share_HW = np.asarray(Image.fromarray(share_hw).resize(picture.size, Image.Resampling.BILINEAR))
    colour_HW3 = 255 * matplotlib.colormaps["inferno"](share_HW)[..., :3]
    mixed = np.asarray(picture) * (1 - STRENGTH * share_HW[..., None]) + colour_HW3 * STRENGTH * share_HW[..., None]
    return Image.fromarray(np.clip(mixed, 0, 255).round().astype(np.uint8))


def logarithmic(map_hw: np.ndarray) -> Image.Image:
    """A map on a logarithmic scale, enlarged: black is a ten-thousandth of the largest value, or less."""
    share_hw = map_hw / max(map_hw.max(), np.finfo(np.float32).tiny)
    with np.errstate(divide="ignore"):
        shade_hw = 1 + np.log10(share_hw).clip(-DECADES, 0) / DECADES
    return enlarged(
        Image.fromarray((255 * matplotlib.colormaps["inferno"](shade_hw)[..., :3]).round().astype(np.uint8))
    )


def coloured(image: Image.Image, colours_hw3: np.ndarray) -> Image.Image:
    """Colours 0 to 1 of patches, as large as the enlarged image."""
    picture = Image.fromarray((255 * colours_hw3).round().astype(np.uint8))
    return picture.resize(enlarged(image).size, Image.Resampling.NEAREST)


def sheet_of(found: Sequence[Explained], fields: dict[str, dict[str, Image.Image]]) -> Image.Image:
    """The pictures of each image and the receptive fields: `page`'s arguments."""
    rows = []
    for each in found:
        names = [LEFT_TO_RIGHT + shortened(name) + LEFT_TO_RIGHT for name in (Path(each.name).name, each.answer)]
        rows.append((f"{': '.join(names)}, {100 * each.score:.1f}%", each.columns))
    return contact_sheet([*rows, *((f"receptive field, {shortened(name)}", ways) for name, ways in fields.items())])


def contact_sheet(rows: Sequence[tuple[str, dict[str, Image.Image]]], gap: int = 6) -> Image.Image:
    """Rows of pictures on white, each under its title, in columns that are headed by what they show.

    Rows of the same columns that follow each other stand under one line of headings.
    """
    tables = [list(table) for _, table in itertools.groupby(rows, lambda row: list(row[1]))]
    parts = [part for table in tables for part in _under_headings(table, gap)]
    width = max(left + picture.width for line in parts for left, picture in line) + gap
    sheet, top = Image.new("RGB", (width, sum(_height(line) + gap for line in parts) + gap), "white"), gap
    for line in parts:
        for left, picture in line:
            sheet.paste(picture, (left, top))
        top += _height(line) + gap
    return sheet


Line = list[tuple[int, Image.Image]]
"""Pictures beside each other, each with where its left edge stands."""


def _height(line: Line) -> int:
    return max(picture.height for _, picture in line)


def _under_headings(rows: Sequence[tuple[str, dict[str, Image.Image]]], gap: int) -> Iterator[Line]:
    """The headings, and of each row its title and its pictures."""
    headings = [text_picture(name, TEXT, "black", "white") for name in rows[0][1]]
    columns = zip(headings, *(pictures.values() for _, pictures in rows), strict=True)
    widths = [max(picture.width for picture in column) + gap for column in columns]
    lefts = list(itertools.accumulate(widths[:-1], initial=gap))
    yield list(zip(lefts, headings, strict=True))
    for title, pictures in rows:
        yield [(gap, text_picture(title, TEXT, "dimgrey", "white"))]
        yield list(zip(lefts, pictures.values(), strict=True))


STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1, h2 { font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; margin: .5rem 0; }
figure { margin: 0; width: 224px; max-width: calc(50% - .5rem); } figure img { width: 100%; display: block; }
figcaption { font-size: .85rem; opacity: .8; }
p { margin: .3rem 0; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem; text-align: right; }
td { white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #8884; }
"""


def page(
    title: str,
    found: Sequence[Explained],
    directions: Sequence[tuple[str, dict[str, float], dict[str, float]]],
    fields: dict[str, dict[str, Image.Image]],
) -> str:
    """Everything in one HTML file that asks no other for anything.

    Args:
        title: what is explained.
        found: of each image.
        directions: of each layer its name, the share of each direction, and the gate of each or nothing.
        fields: pictures of receptive fields, by whose and of which directions.
    """
    body = [f"<h1>{_isolated(title)}</h1>"]
    for each in found:
        body.append(f"<h2>{_isolated(each.name)}: {_isolated(each.answer)}, {100 * each.score:.1f}%</h2>")
        body.append(_row(each.columns))
        if each.areas:
            rows = [[name, f"{gone:.3f}", f"{shown:.3f}"] for name, (gone, shown) in each.areas.items()]
            body.append(_table(["method", "deletion (low is better)", "insertion (high is better)"], rows))
    if fields:
        body += [
            "<h2>How far the middle patch sees</h2>",
            f"<p>The effective receptive field; black is less than 10<sup>-{DECADES}</sup> of the largest value.</p>",
            *(_row({f"{name}, {way}": picture for way, picture in ways.items()}) for name, ways in fields.items()),
        ]
    if directions:
        names = list(dict.fromkeys(name for _, shares, _ in directions for name in shares))
        rows = [[layer, *(_share(name, shares, gates) for name in names)] for layer, shares, gates in directions]
        body += ["<h2>What each direction gives</h2>", _table(["layer", *names], rows)]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _share(name: str, shares: dict[str, float], gates: dict[str, float]) -> str:
    gate = f" (gate {gates[name]:.2f})" if name in gates else ""
    return f"{100 * shares[name]:.1f}%{gate}" if name in shares else ""


def _isolated(text: str) -> str:
    """Text that keeps its direction of writing to itself."""
    return f"<bdi>{html.escape(text)}</bdi>"


def _row(pictures: dict[str, Image.Image]) -> str:
    figures = (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{in_base64(picture)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, picture in pictures.items()
    )
    return f'<div class="row">{"".join(figures)}</div>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'
