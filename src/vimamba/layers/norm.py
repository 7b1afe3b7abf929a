"""Normalisation in front of a block, joined with the addition to the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.ops import rms_norm


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products around `x` run: autocast's, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """Add to the residual stream and normalise by the root mean square; the stream stays in float32.

    Args:
        dim: channels.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, length, dim) and the stream so far to the normalised sum and the sum."""
        return rms_norm(x, self.weight, residual, self.eps, out_dtype=compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    """The same with layer normalisation (`rms_norm=False` in the official code)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(batch, length, dim) and the stream so far to the normalised sum and the sum."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = x.to(wide) if residual is None else x.to(wide) + residual
        with torch.autocast(x.device.type, enabled=False):
            normed = F.layer_norm(total, self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return normed.to(compute_dtype(x)), total


class NoNorm(nn.Module):
    """Stands for a norm that was pruned: the sum with the residual stream, not normalised."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, length, dim) and the stream so far to the sum, twice."""
        total = x if residual is None else x + residual
        return total, total


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
