"""Pictures of explanations, one page that carries them, and their numbers."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

LEAST_SIDE = 224  # pixels of the shorter side of a picture: maps of small images are enlarged to be seen
STRENGTH = 0.6  # share of the colours where a map is largest


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


def coloured(image: Image.Image, colours_hw3: np.ndarray) -> Image.Image:
    """Colours 0 to 1 of patches, as large as the enlarged image."""
    picture = Image.fromarray((255 * colours_hw3).round().astype(np.uint8))
    return picture.resize(enlarged(image).size, Image.Resampling.NEAREST)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 6) -> Image.Image:
    """Pictures in rows, on white."""
    width = max(sum(p.width + gap for p in row) for row in rows) + gap
    height = sum(max(p.height for p in row) + gap for row in rows) + gap
    sheet, top = Image.new("RGB", (width, height), "white"), gap
    for row in rows:
        left = gap
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + gap
        top += max(p.height for p in row) + gap
    return sheet


STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1, h2 { font-weight: 600; line-height: 1.25; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 224px; } figure img { width: 100%; display: block; }
figcaption { font-size: .85rem; opacity: .8; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr + tr { border-top: 1px solid #8884; }
"""


def page(title: str, found: Sequence[Explained], directions: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Everything in one HTML file that asks no other for anything."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for each in found:
        label = html.escape(each.label) or "(no name)"
        body += [f"<h2>{html.escape(each.name)}: {label}, {100 * each.score:.1f}%</h2>", '<div class="row">']
        for caption, picture in {"image": enlarged(each.image), **each.pictures}.items():
            body.append(
                f'<figure><img alt="{html.escape(caption)}" src="{_inline(picture)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        body.append("</div>")
        if each.areas:
            rows = [[name, f"{gone:.3f}", f"{shown:.3f}"] for name, (gone, shown) in each.areas.items()]
            body.append(_table(["method", "deletion (low is better)", "insertion (high is better)"], rows))
    if directions:
        names = list(dict.fromkeys(name for _, shares in directions for name in shares))
        rows = [[layer, *(f"{100 * s[n]:.1f}%" if n in s else "" for n in names)] for layer, s in directions]
        body += ["<h2>What each direction gives</h2>", _table(["layer", *names], rows)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _inline(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, "png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
