"""Where class and register tokens stand among the patch tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASS_TOKENS = {"none": 0, "head": 1, "middle": 1, "double": 2}


def class_positions(class_token: str, patches: int) -> tuple[int, ...]:
    """The places of the class tokens in a sequence with `patches` patch tokens (arXiv 2401.09417, table 5)."""
    return {"none": (), "head": (0,), "middle": (patches // 2,), "double": (0, patches + 1)}[class_token]


class Layout(NamedTuple):
    """What a sequence consists of: patches in row order, and the places of the tokens that are not patches, rising."""

    grid: tuple[int, int]
    extras: tuple[int, ...] = ()


def with_token(layout: Layout, position: int) -> Layout:
    """The layout after one more token has been put in at `position`."""
    moved = (extra + (extra >= position) for extra in layout.extras)
    return Layout(layout.grid, tuple(sorted((*moved, position))))


class Places(NamedTuple):
    """The places of class and register tokens in the whole sequence."""

    classes: tuple[int, ...]
    registers: tuple[int, ...]

    @property
    def extras(self) -> tuple[int, ...]:
        """All of them, rising; merged by comparing, since a compiled graph's symbols cannot be sorted."""
        merged = list(self.registers)
        for i, place in enumerate(self.classes):
            merged.insert(i + sum(register < place for register in self.registers), place)
        return tuple(merged)


def token_places(class_token: str, patches: int, num_registers: int = 0) -> Places:
    """Class tokens where `class_positions` says; registers spread evenly (arXiv 2405.14858), each in mid-stretch."""
    classes = class_positions(class_token, patches)
    length = patches + len(classes)
    before = [(2 * i + 1) * length // (2 * num_registers) for i in range(num_registers)]  # tokens in front of each
    registers = tuple(tokens + i for i, tokens in enumerate(before))
    return Places(tuple(at + sum(tokens <= at for tokens in before) for at in classes), registers)


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
