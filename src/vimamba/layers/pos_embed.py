"""Position embeddings: interpolating learned ones, and fixed two-dimensional sine and cosine ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vimamba.layers.tokens import class_positions, insert_tokens, split_tokens


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], class_token: str) -> Tensor:
    """Interpolate a position embedding (1, length, dim) from one grid to another; class tokens keep their own."""
    # To ask a graph of any size whether its grid is this one would fix it. Interpolating equal grids changes nothing.
    if statically_known_true(new[0] == old[0]) and statically_known_true(new[1] == old[1]):
        return pos_embed
    patches, classes = split_tokens(pos_embed, class_positions(class_token, old[0] * old[1]))
    maps = patches.float().transpose(1, 2).unflatten(2, old)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # PyTorch 2.15 cannot compile the derivative of interpolate for sizes that vary.
        rows, columns = (_bicubic(o, n, maps.device) for o, n in zip(old, new, strict=True))
        maps = rows @ maps @ columns.t()
    else:
        maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    resized = maps.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return insert_tokens(resized, classes, class_positions(class_token, new[0] * new[1]))


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix (new, old) of antialiased bicubic interpolation along one axis."""
    scale = old / new
    centres = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * scale
    places = torch.arange(old, device=device, dtype=torch.float32) + 0.5
    t = ((places - centres[:, None]) / max(scale, 1.0)).abs()  # Keys' kernel, a = -0.5
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def sincos_pos_embed(
    dim: int, grid: tuple[int, int], trained: tuple[int, int], device: torch.device, theta: float = 10000.0
) -> Tensor:
    """Sines and cosines of each patch's row and column, (1, rows * columns, dim), as MAE and MoCo v3.

    Args:
        dim: channels, divisible by 4: sine and cosine of the row, sine and cosine of the column.
        grid: rows and columns.
        trained: the grid that positions are scaled to, so that finer grids stay in the trained range.
        device: where.
        theta: base of the frequencies.
    """
    frequencies = theta ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows, columns = (
        (torch.arange(n, device=device) * (reach / n))[:, None] * frequencies
        for n, reach in zip(grid, trained, strict=True)
    )
    per_row = torch.cat([rows.sin(), rows.cos()], -1)[:, None].expand(-1, grid[1], -1)
    per_column = torch.cat([columns.sin(), columns.cos()], -1)[None].expand(grid[0], -1, -1)
    return torch.cat([per_row, per_column], -1).flatten(0, 1)[None]
