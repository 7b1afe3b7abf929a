"""Where class tokens stand among the patch tokens."""

from __future__ import annotations

import torch
from torch import Tensor

CLASS_TOKENS = {"none": 0, "head": 1, "middle": 1, "double": 2}


def class_positions(class_token: str, patches: int) -> tuple[int, ...]:
    """The places of the class tokens in a sequence with `patches` patch tokens (arXiv 2401.09417, table 5)."""
    return {"none": (), "head": (0,), "middle": (patches // 2,), "double": (0, patches + 1)}[class_token]


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
    return patches, x_BLE[:, list(positions)]
