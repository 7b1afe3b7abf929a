"""A grid of tokens of any rank: where each token stands, and in which order a path reads them.

A series is a grid of one axis, an image of two (rows, columns), a volume or a video of three. Its patches lie in the
sequence in row order, the last axis fastest; class and register tokens stand among them and keep their places on every
path. Row order costs nothing; every other order is a permutation: one gather in front of the mixer, one behind it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.errors import nearest

CLASS_TOKENS = {"none": 0, "head": 1, "middle": 1, "double": 2}


class Layout(NamedTuple):
    """What a sequence consists of: patches in row order, and the places of the tokens that are not patches, rising."""

    grid: tuple[int, ...]
    classes: tuple[int, ...] = ()
    registers: tuple[int, ...] = ()

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return math.prod(self.grid)

    @property
    def extras(self) -> tuple[int, ...]:
        """The places of all tokens that are not patches; rising, by comparing: a graph's symbols cannot be sorted."""
        merged = list(self.registers)
        for i, place in enumerate(self.classes):
            merged.insert(i + sum(register < place for register in self.registers), place)
        return tuple(merged)


def shape_text(sizes: Sequence[int]) -> str:
    """Sizes as people write them, "14×14"."""
    return "×".join(map(str, sizes))


def class_positions(class_token: str, patches: int) -> tuple[int, ...]:
    """The places of the class tokens in a sequence with `patches` patch tokens (arXiv 2401.09417, table 5)."""
    return {"none": (), "head": (0,), "middle": (patches // 2,), "double": (0, patches + 1)}[class_token]


def token_layout(class_token: str, grid: tuple[int, ...], num_registers: int = 0) -> Layout:
    """Class tokens where `class_positions` says; registers spread evenly (arXiv 2405.14858), each in mid-stretch."""
    patches = math.prod(grid)
    classes = class_positions(class_token, patches)
    length = patches + len(classes)
    before = [(2 * i + 1) * length // (2 * num_registers) for i in range(num_registers)]  # tokens in front of each
    moved = tuple(at + sum(tokens <= at for tokens in before) for at in classes)
    return Layout(tuple(grid), moved, tuple(tokens + i for i, tokens in enumerate(before)))


def with_token(layout: Layout, position: int) -> Layout:
    """The layout after one more token, which counts as a register, has been put in at `position`."""
    classes, registers = (
        tuple(place + (place >= position) for place in places) for places in (layout.classes, layout.registers)
    )
    return Layout(layout.grid, classes, tuple(sorted((*registers, position))))


def insert_tokens(patches_BLE: Tensor, tokens_BTE: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Put the tokens among the patches so that they end up at `positions`, in rising order."""
    pieces, start = [], 0
    for i, position in enumerate(positions):
        pieces += [patches_BLE[:, start : position - i], tokens_BTE[:, i : i + 1]]
        start = position - i
    return torch.cat([*pieces, patches_BLE[:, start:]], dim=1)


def split_tokens(x_BLE: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inverse of `insert_tokens`: patches and tokens apart."""
    pieces, start = [], 0
    for position in positions:
        pieces.append(x_BLE[:, start:position])
        start = position + 1
    patches = torch.cat([*pieces, x_BLE[:, start:]], dim=1) if positions else x_BLE
    return patches, take_tokens(x_BLE, positions)


def take_tokens(x_BLE: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The tokens at `positions`, side by side."""
    tokens = [x_BLE[:, position : position + 1] for position in positions]
    return tokens[0] if len(tokens) == 1 else torch.cat([x_BLE[:, :0], *tokens], dim=1)


@dataclass(frozen=True)
class ScanPath:
    """An order over the grid, and which way round it is read.

    Args:
        order: "row" (the last axis fastest: on an image left to right, row after row), "column" (the first axis
            fastest: downwards, column after column; cross-scan, as VMamba), "snake" (rows in turn left to right and
            right to left, so that neighbours in the sequence are neighbours in the grid, as PlainMamba) or "window"
            (row order within a window, window after window, as LocalMamba).
        window: patches of a window along every axis, or one number for all axes; the last windows may be smaller.
        reverse: read from the last patch to the first, or not; None leaves both to the mixer's mode.
    """

    order: str = "row"
    window: tuple[int, ...] = ()
    reverse: bool | None = None

    @staticmethod
    def parse(text: str) -> ScanPath:
        """Read "row", "column", "snake", "window4" or "window2x3", each with ":forward" or ":backward" if wished.

        Raises:
            ValueError: it is none of these.
        """
        found = re.fullmatch(r"(row|column|snake|window)(\d+(?:x\d+)*)?(?::(forward|backward))?", str(text))
        if not found or (found[1] == "window") != bool(found[2]):
            known = ("row", "column", "snake", "window4")
            hint = "; give its size, such as 'window4'" if text == "window" else nearest(text, known)
            raise ValueError(
                "paths: each must be 'row', 'column', 'snake' or 'windowN' (N×N patches), with ':forward' or "
                f"':backward' for one way round only, got {text!r}{hint}"
            )
        window = tuple(map(int, found[2].split("x"))) if found[2] else ()
        if 0 in window:
            raise ValueError(f"paths: the windows of {text!r} hold no patch")
        return ScanPath(found[1], window, found[3] == "backward" if found[3] else None)

    @property
    def name(self) -> str:
        """The order in one word that can stand in a parameter's name."""
        sides = self.window if len(set(self.window)) > 1 else self.window[:1]
        return self.order + "x".join(map(str, sides))

    @property
    def along_rows(self) -> bool:
        """Whether the tokens lie in this order already."""
        return self.order == "row"

    def check_rank(self, grid: tuple[int, ...]) -> None:
        """Raise ValueError if the grid is empty, or the path's windows are of another rank."""
        if min(grid, default=0) < 1:
            raise ValueError(f"paths: a grid of {shape_text(grid)} patches is empty")
        if len(self.window) > 1 and len(self.window) != len(grid):
            raise ValueError(f'paths: "{self.name}" needs a grid of rank {len(self.window)}, got {shape_text(grid)}')

    def check_fits(self, grid: tuple[int, ...]) -> None:
        """`check_rank`, and raise ValueError if the path's windows are larger than the grid."""
        self.check_rank(grid)
        if any(side > n for side, n in zip(self._window_of(grid), grid, strict=False)):
            raise ValueError(
                f'paths: the windows of "{self.name}" are larger than the grid of {shape_text(grid)} patches'
            )

    def _window_of(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        return self.window * len(grid) if len(self.window) == 1 else self.window

    def keys(self, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """Whole numbers of the grid's shape that rise along the path."""
        rank = len(grid)
        axes = [
            torch.arange(n, device=device).view([-1 if other == axis else 1 for other in range(rank)])
            for axis, n in enumerate(grid)
        ]
        if self.order == "window":
            sides = self._window_of(grid)
            windows = _row_major([axis // side for axis, side in zip(axes, sides, strict=True)], _ceil(grid, sides))
            inside = _row_major([axis % side for axis, side in zip(axes, sides, strict=True)], sides)
            return windows * math.prod(sides) + inside
        if self.order == "column":
            return _row_major(axes[::-1], grid[::-1])
        return _row_major(axes, grid, turning=self.order == "snake")


def _ceil(grid: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // side) for n, side in zip(grid, sides, strict=True))


def _row_major(places: Sequence[Tensor], sizes: tuple[int, ...], turning: bool = False) -> Tensor:
    """The row-major number of each place; `turning`, every second line of each axis runs the other way."""
    number = places[0]
    for place, n in zip(places[1:], sizes[1:], strict=True):
        number = number * n + (torch.where(number % 2 == 0, place, n - 1 - place) if turning else place)
    return number


class Route(NamedTuple):
    """A path through a sequence: `order` gathers the tokens along it, `rank` puts them back."""

    order: Tensor  # (length,)
    rank: Tensor  # (length,)


def route(path: ScanPath, layout: Layout, x: Tensor) -> Route:
    """The route of a path for `x`, (batch, length, ...), kept for each layout and device.

    Raises:
        ValueError: the layout's tokens are not as many as those of x, or its grid is empty or of another rank
            than the path's windows.
    """
    # A graph computes its own: a kept tensor could not be part of it. Nor may a fake tensor be kept.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return _build(path, layout, x.device)
    if x.shape[1] != layout.patches + len(layout.extras):
        raise ValueError(f"the layout {tuple(layout)} is not that of a sequence of {x.shape[1]} tokens")
    return _kept(path, layout, x.device)


def _build(path: ScanPath, layout: Layout, device: torch.device) -> Route:
    places = torch.arange(layout.patches, device=device)  # of the patches in the sequence
    for extra in layout.extras:
        places = places + (places >= extra)
    along = places[path.keys(layout.grid, device).flatten().argsort()]
    order = torch.arange(layout.patches + len(layout.extras), device=device).index_copy(0, places, along)
    return Route(order, order.argsort())


@lru_cache(maxsize=256)
def _kept(path: ScanPath, layout: Layout, device: torch.device) -> Route:
    path.check_rank(layout.grid)
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass
        return _build(path, layout, device)


def parse_paths(paths: Sequence[str | ScanPath]) -> tuple[ScanPath, ...]:
    """The paths of one layer.

    Raises:
        ValueError: there are none, one is unknown, or one is there twice.
    """
    if isinstance(paths, str) or not paths:
        raise ValueError(f'paths must be a sequence such as ("row", "column"), got {paths!r}')
    parsed = tuple(path if isinstance(path, ScanPath) else ScanPath.parse(path) for path in paths)
    names = [path.name for path in parsed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f'paths: "{name}" is there twice; name it once, without ":forward" or ":backward", for both'
            )
    return parsed
