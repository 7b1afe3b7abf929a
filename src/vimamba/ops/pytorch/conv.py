"""The causal convolution as a sum of shifted copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.ops.arguments import widen


def _shift(x_BDL: Tensor, steps: int) -> Tensor:
    """Move along time by `steps` (negative: towards the start), filling with zeros."""
    return F.pad(x_BDL, (steps, -steps)) if abs(steps) < x_BDL.shape[-1] else torch.zeros_like(x_BDL)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    past, width = -1 if reverse else 1, weight.shape[1]
    y = x * weight[:, -1:]
    for back in range(1, width):
        y = y.addcmul_(_shift(x, past * back), weight[:, width - 1 - back, None])
    return y if bias is None else y.add_(bias[:, None])


def conv_forward(x, weight, bias, silu, reverse):
    """See `vimamba.ops.causal_conv1d`."""
    y = _convolve(widen(x), weight, bias, reverse)
    return (F.silu(y) if silu else y).to(x.dtype)


def conv_backward(dy, x, weight, bias, silu, reverse):
    """See `vimamba.ops.causal_conv1d`."""
    wide, grad = widen(x), widen(dy)
    if silu:
        raw = _convolve(wide, weight, bias, reverse)
        gate = torch.sigmoid(raw)
        grad = grad * gate * (1 + raw * (1 - gate))
    past, width = -1 if reverse else 1, weight.shape[1]
    shifted = [_shift(grad, -past * back) for back in reversed(range(width))]
    dx = sum(weight[:, k, None] * g for k, g in enumerate(shifted))
    dweight = torch.stack([(g * wide).sum((0, 2)) for g in shifted], dim=1)
    return dx.to(x.dtype), dweight, None if bias is None else grad.sum((0, 2))
