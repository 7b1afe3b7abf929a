"""Positions of tokens on a grid of any rank: interpolated learned ones, fixed sines and cosines, rotations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vimamba.layers.grid import Layout, class_positions, insert_tokens, split_tokens
from vimamba.layers.options import check_number

torch.fx.wrap("rotary_angles")  # a symbolic trace calls it as it is


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, ...], new: tuple[int, ...], class_token: str) -> Tensor:
    """Interpolate a position embedding (1, length, dim) from one grid to another; class tokens keep their own."""
    # To ask a graph of any size whether its grid is this one would fix it. Interpolating equal grids changes nothing.
    if all(statically_known_true(n == o) for n, o in zip(new, old, strict=True)):
        return pos_embed
    patches, classes = split_tokens(pos_embed, class_positions(class_token, math.prod(old)))
    maps = patches.float().transpose(1, 2).unflatten(2, old)
    # PyTorch interpolates images only; 2.15 gives wrong numbers where the result is one column wide, and cannot compile
    # the derivative for sizes that vary.
    image = len(old) == 2 and not statically_known_true(new[1] == 1)
    if image and not (torch.compiler.is_compiling() and not torch.compiler.is_exporting()):
        maps = F.interpolate(maps, size=new, mode="bicubic", antialias=True)
    else:
        for axis, (o, n) in enumerate(zip(old, new, strict=True), start=2):
            maps = (maps.movedim(axis, -1) @ _bicubic(o, n, maps.device).t()).movedim(-1, axis)
    resized = maps.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return insert_tokens(resized, classes, class_positions(class_token, math.prod(new)))


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix (new, old) of antialiased bicubic interpolation along one axis."""
    scale = old / new
    centres = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * scale
    places = torch.arange(old, device=device, dtype=torch.float32) + 0.5
    t = ((places - centres[:, None]) / max(scale, 1.0)).abs()  # Keys' kernel, a = -0.5
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def check_divisible(option: str, dim: int, rank: int) -> None:
    """Raise ValueError unless `dim` channels divide into a sine and a cosine for each axis."""
    if dim % (2 * rank):
        raise ValueError(f"{option} needs embed_dim divisible by {2 * rank}, got {dim}")


def sincos_pos_embed(
    dim: int, grid: tuple[int, ...], trained: tuple[int, ...], device: torch.device, theta: float = 10000.0
) -> Tensor:
    """Sines and cosines of each patch's place along every axis, (1, patches, dim), as MAE and MoCo v3.

    Args:
        dim: channels, divisible by twice the rank: sine and cosine of the row, sine and cosine of the column ...
        grid: patches along each axis.
        trained: the grid that positions are scaled to, so that finer grids stay in the trained range.
        device: where.
        theta: base of the frequencies.
    """
    count = dim // (2 * len(grid))
    frequencies = theta ** -(torch.arange(count, device=device, dtype=torch.float32) / count)
    angles = [
        (torch.arange(n, device=device) * (reach / n))[:, None] * frequencies
        for n, reach in zip(grid, trained, strict=True)
    ]
    return _over_grid([torch.cat([angle.sin(), angle.cos()], -1) for angle in angles], grid)


def _over_grid(per_axis: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """What each place along an axis has, (n, channels) an axis, side by side for every patch: (1, patches, dim)."""
    rank = len(grid)
    spread = [
        values.view(*(n if other == axis else 1 for other in range(rank)), -1).expand(*grid, -1)
        for axis, (n, values) in enumerate(zip(grid, per_axis, strict=True))
    ]
    return torch.cat(spread, dim=-1).flatten(0, -2)[None]


def rotary_angles(x_BLE: Tensor, layout: Layout, trained: int, theta: float) -> Tensor:
    """The angles (1, length, dim) by which `Rope` turns the channel pairs of x; 0 for tokens that are not patches."""
    dtype = torch.float64 if x_BLE.dtype == torch.float64 else torch.float32
    part = x_BLE.shape[-1] // len(layout.grid)
    frequencies = theta ** -(torch.arange(0, part, 2, dtype=torch.float32, device=x_BLE.device) / part)
    per_axis = [
        (torch.arange(n, device=x_BLE.device) / n * trained)[:, None] * frequencies.to(dtype) for n in layout.grid
    ]
    angles = _over_grid([angle.repeat_interleave(2, dim=-1) for angle in per_axis], layout.grid)
    extras = layout.extras
    return insert_tokens(angles, angles.new_zeros(1, len(extras), angles.shape[-1]), extras)


class Rope:
    """Rotate the channel pairs of every patch token by its place (arXiv 2104.09864; as in EVA-02): a part of the
    channels for each axis, the first for rows.

    Args:
        dim: token channels, divisible by twice the rank.
        rank: axes of the grid.
        trained: length of an axis that positions are scaled to, so that finer grids stay in the trained range.
        theta: base of the frequencies.
    """

    def __init__(self, dim: int, rank: int = 2, trained: int = 14, theta: float = 10000.0) -> None:
        check_divisible("rope", dim, rank)
        check_number("rope_grid", trained, above=True)
        self.trained, self.theta = trained, theta

    def angles(self, x_BLE: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (1, length, dim), for x; computed anew, in float32 or more whatever the weights are."""
        angles = rotary_angles(x_BLE, layout, self.trained, self.theta)
        return angles.cos(), angles.sin()

    @staticmethod
    def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Apply the angles to (batch, length, dim), in x's type."""
        cos, sin = angles
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)
