"""Linear layers: a product that is faster than the library's where our kernels are."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vimamba.ops import backends
from vimamba.ops.arguments import check_shape, check_tensors


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, in float32 on a CPU by the kernels of the "cpu" backend.

    They pack the weight anew at each call, so nothing can become stale, and share one layout with the mixer's own
    projections. Measured against it: `python benchmarks/linear.py`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    check_tensors("linear", {"x": x, "weight": weight}, {"bias": bias})
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have shape (..., in_features) = (..., {weight.shape[1]}), got {tuple(x.shape)}")
    check_shape("bias", bias, weight.shape[:1], "(out_features,)")
    same_types = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    if same_types and backends.untraced(x) and not backends.autocasts(x.device):
        backend = backends.resolve("", x.device, x.dtype)
        if backend.has_linear(x):
            return (_Linear.apply if backends.differentiates(x, weight, bias) else backend.linear)(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(Function):
    """The kernel's product with its gradient; that of the weight is a product over the rows, PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return backends.resolve("", x.device, x.dtype).linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dout_MN = dout.flatten(0, -2)
        return (
            linear(dout, weight.t()) if wants_x else None,
            dout_MN.t() @ x.flatten(0, -2) if wants_weight else None,
            dout_MN.sum(0) if wants_bias else None,
        )
