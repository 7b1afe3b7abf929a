"""RMSNorm of a sum, and its gradient."""

from __future__ import annotations

import torch

from vimamba.ops.arguments import widen


def norm_forward(x, residual, weight, eps, out_dtype):
    """See `vimamba.ops.rms_norm`."""
    total = widen(x) + residual if residual is not None else widen(x).clone()
    rstd = torch.rsqrt(total.square().mean(-1) + eps)
    return (total * rstd.unsqueeze(-1) * weight).to(out_dtype), total, rstd


def norm_backward(dnormed, dtotal, total, weight, rstd):
    """See `vimamba.ops.rms_norm`."""
    rstd = rstd.unsqueeze(-1)
    unit = total * rstd
    grad = widen(dnormed)
    dunit = grad * weight
    dsum = (dunit - unit * (dunit * unit).mean(-1, keepdim=True)) * rstd
    return dsum if dtotal is None else dsum.add_(dtotal), (grad * unit).reshape(-1, grad.shape[-1]).sum(0)
