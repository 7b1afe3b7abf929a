"""Scan paths: the orders in which a mixer reads the grid of patches.

A path is an order and a sense. "row" is the order the tokens lie in, so it costs nothing; every other order is a
permutation of the patches: one gather in front of the mixer and one behind it. Class and register tokens keep their
places in the sequence on every path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.errors import nearest
from vimamba.layers.tokens import Layout

ORDERS = ("row", "column", "snake", "window")
SENSES = ("both", "forward", "backward")


@dataclass(frozen=True)
class Path:
    """An order over the grid, and its sense.

    Args:
        order: "row" (left to right, row after row), "column" (downwards, column after column: cross-scan, as VMamba),
            "snake" (rows in turn left to right and right to left, so that neighbours in the sequence are neighbours
            in the grid, as PlainMamba) or "window" (row order within a window, window after window, as LocalMamba).
        window: rows and columns of a window; windows at the right and bottom edges may be smaller.
        sense: "forward", "backward", or "both", which leaves the choice to the mixer's mode.
    """

    order: str = "row"
    window: tuple[int, int] = (0, 0)
    sense: str = "both"

    @staticmethod
    def parse(text: str) -> Path:
        """Read "row", "column", "snake", "window4" or "window2x3", each with ":forward" or ":backward" if wished.

        Raises:
            ValueError: it is none of these.
        """
        found = re.fullmatch(r"(row|column|snake|window)(?:(\d+)(?:x(\d+))?)?(?::(forward|backward))?", str(text))
        if not found or (found[1] == "window") != bool(found[2]):
            known = ("row", "column", "snake", "window4")
            hint = "; give its size, such as 'window4'" if text == "window" else nearest(text, known)
            raise ValueError(
                "paths: each must be 'row', 'column', 'snake' or 'windowN' (N×N patches), with ':forward' or "
                f"':backward' for one sense only, got {text!r}{hint}"
            )
        height = int(found[2] or 0)
        window = (height, int(found[3] or height))
        if found[1] == "window" and 0 in window:
            raise ValueError(f"paths: the windows of {text!r} hold no patch")
        return Path(found[1], window, found[4] or "both")

    @property
    def name(self) -> str:
        """The order in one word that can stand in a parameter's name."""
        if self.order != "window":
            return self.order
        height, width = self.window
        return f"window{height}" if height == width else f"window{height}x{width}"

    @property
    def along_rows(self) -> bool:
        """Whether the tokens lie in this order already."""
        return self.order == "row"

    def keys(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """(rows, columns) whole numbers that rise along the path."""
        rows, columns = grid
        row = torch.arange(rows, device=device)[:, None]
        column = torch.arange(columns, device=device)[None]
        if self.order == "column":
            return column * rows + row
        if self.order == "snake":
            return row * columns + torch.where(row % 2 == 0, column, columns - 1 - column)
        if self.order == "window":
            height, width = self.window
            window = (row // height) * -(-columns // width) + column // width
            return window * (height * width) + (row % height) * width + column % width
        return row * columns + column


class Route(NamedTuple):
    """A path through a sequence: `order` gathers the tokens along it, `rank` puts them back."""

    order: Tensor  # (length,)
    rank: Tensor  # (length,)


def route(path: Path, layout: Layout, x: Tensor) -> Route | None:
    """The route of a path for `x`, (batch, length, ...), kept for each layout and device; None for row order."""
    if path.along_rows:
        return None
    # A graph computes its own: a kept tensor could not be part of it. Nor may a fake tensor be kept.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return _build(path, layout, x.device)
    return _kept(path, layout, x.device)


def _build(path: Path, layout: Layout, device: torch.device) -> Route:
    patches = layout.grid[0] * layout.grid[1]
    places = torch.arange(patches, device=device)  # of the patches in the sequence
    for extra in layout.extras:
        places = places + (places >= extra)
    along = places[path.keys(layout.grid, device).flatten().argsort()]
    order = torch.arange(patches + len(layout.extras), device=device).index_copy(0, places, along)
    return Route(order, order.argsort())


@lru_cache(maxsize=256)
def _kept(path: Path, layout: Layout, device: torch.device) -> Route:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass
        return _build(path, layout, device)


def parse_paths(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """The paths of one layer.

    Raises:
        ValueError: there are none, one is unknown, or one is there twice.
    """
    if isinstance(paths, str) or not paths:
        raise ValueError(f'paths must be a sequence such as ("row", "column"), got {paths!r}')
    parsed = tuple(path if isinstance(path, Path) else Path.parse(path) for path in paths)
    for i, path in enumerate(parsed):
        for other in parsed[:i]:
            if other.name == path.name:
                raise ValueError(
                    f'paths: "{path.name}" is there twice; name it once, without ":forward" or ":backward", for both'
                )
    return parsed


def check_windows(paths: Sequence[Path], grid: tuple[int, int]) -> None:
    """Raise ValueError if a path's windows are larger than the grid."""
    for path in paths:
        if path.window[0] > grid[0] or path.window[1] > grid[1]:
            raise ValueError(
                f'paths: the windows of "{path.name}" are larger than the grid of {grid[0]}×{grid[1]} patches'
            )
