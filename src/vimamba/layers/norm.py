"""Normalisation in front of a block, which can be joined with the addition to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.layers.intact import intact, watched
from vimamba.layers.options import check_number
from vimamba.ops import rms_norm
from vimamba.ops.arguments import widen
from vimamba.ops.backends import compute_dtype

for _leaf in ("compute_dtype", "widen", "_rms_norm", "_layer_norm"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, None, eps, out_dtype=compute_dtype(x))[0]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    normed = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return normed.to(compute_dtype(x))


class RMSNorm(nn.Module):
    """Normalise by the root mean square over the channels, in float32.

    Args:
        dim: channels.
        eps: added to the mean square.
        device, dtype: of the weights.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_number("norm_eps", eps)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A weight of 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same, in x's type or autocast's."""
        return _rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, stream: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sum with the stream normalised, in `dtype`, and the sum, in float32: one pass over memory."""
        return rms_norm(x, self.weight, stream, self.eps, out_dtype=dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, in float32 (`rms_norm=False` in the official code)."""

    def __init__(self, dim: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None) -> None:
        check_number("norm_eps", eps)
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., dim) to the same, in x's type or autocast's."""
        return _layer_norm(input, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, stream: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sum with the stream normalised, in `dtype`, and the sum, in float32."""
        total = widen(x) if stream is None else stream + x
        return _layer_norm(total, self.weight, self.bias, self.eps).to(dtype), total


def add_norm(norm: nn.Module, x: Tensor, stream: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum with the stream normalised, in `dtype`, and the sum; joined, unless `norm` was replaced or is hooked."""
    if isinstance(norm, (RMSNorm, LayerNorm)) and intact(norm, RMSNorm, LayerNorm) and not watched(x):
        return norm.add(x, stream, dtype)
    total = widen(x) if stream is None else stream + x
    return norm(total).to(dtype), total


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
