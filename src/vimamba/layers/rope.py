"""Two-dimensional rotary position embedding of the token stream (arXiv 2104.09864; as in EVA-02)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vimamba.layers.options import check_number
from vimamba.layers.tokens import insert_tokens

torch.fx.wrap("_angles")  # a symbolic trace calls it as it is


def _rotate_pairs(x: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def _angles(frequencies: Tensor, pretrain_grid: int, grid: tuple[int, int], positions: tuple[int, ...]) -> Tensor:
    rows, columns = (
        (torch.arange(n, device=frequencies.device) / n * pretrain_grid)[:, None] * frequencies for n in grid
    )
    per_row = rows.repeat_interleave(2, dim=-1)[:, None].expand(-1, grid[1], -1)
    per_column = columns.repeat_interleave(2, dim=-1)[None].expand(grid[0], -1, -1)
    angles = torch.cat([per_row, per_column], dim=-1).flatten(0, 1)[None]
    return insert_tokens(angles, angles.new_zeros(1, len(positions), angles.shape[-1]), positions)


class Rope(nn.Module):
    """Rotate channel pairs of every patch token by its row (first half of the channels) and column (second half).

    Args:
        dim: token channels, divisible by 4.
        pretrain_grid: rows and columns that positions are scaled to, so that finer grids stay in the trained range.
        theta: base of the frequencies.
        device: of the frequencies, which are float32.
    """

    def __init__(self, dim: int, pretrain_grid: int = 14, theta: float = 10000.0, device: Any = None) -> None:
        super().__init__()
        self.frequencies: Tensor
        if dim % 4:
            raise ValueError(f"rope needs embed_dim divisible by 4, got {dim}")
        check_number("rope_grid", pretrain_grid, above=True)
        self.pretrain_grid = pretrain_grid
        half = dim // 2
        frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def angles(self, grid: tuple[int, int], positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (1, length, dim), for a grid with unrotated tokens at `positions`."""
        angles = _angles(self.frequencies, self.pretrain_grid, grid, positions)
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the angles to (batch, length, dim), in x's type."""
        cos, sin = angles
        return (x * cos + _rotate_pairs(x) * sin).to(x.dtype)
