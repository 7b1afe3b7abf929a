"""Residual addition and RMS normalisation in one pass, the residual kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_number, check_shape, check_tensors, wide

operators.define(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType out_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
operators.define(
    "rms_norm_backward",
    "(Tensor dnormed, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd, str backend) -> (Tensor, Tensor)",
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum by its root mean square over the last axis.

    Args:
        x: (..., channels), the output of the previous block.
        weight: (channels,).
        residual: same shape as x, or None for the first block.
        eps: added to the mean square.
        out_dtype: type of the normalised output, x's by default.
        backend: None (choose), "reference", "torch", "cpu", "triton" or one registered with `ops.backends.register`.

    Returns:
        The normalised sum in `out_dtype`, and the sum itself in float32 (float64 for float64 input).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    backends.check(backend)
    check_tensors("rms_norm", {"x": x, "weight": weight}, {"residual": residual})
    check_number("eps", eps, low=0)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., channels) with at least one channel, got {tuple(x.shape)}")
    check_shape("weight", weight, x.shape[-1:], "(channels,)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating type, got {out_dtype}")
    dtype = wide(x.dtype)
    residual = None if residual is None else residual.to(dtype)
    run = _operator.forward(backend, x)
    normed, total, _ = run(x, weight.to(dtype), residual, eps, out_dtype or x.dtype, backend or "")
    return normed, total


def _forward(x, weight, residual, eps, out_dtype, backend):
    chosen = backends.resolve(backend, x.device, x.dtype, out_dtype)
    return chosen.norm_forward(x, residual, weight, eps, out_dtype)


@torch.library.register_fake("vimamba::rms_norm")
def _forward_fake(x, weight, residual, eps, out_dtype, backend):
    total = weight.new_empty(x.shape)
    return torch.empty_like(total, dtype=out_dtype), total, weight.new_empty(x.shape[:-1])


def _backward(dnormed, dtotal, total, weight, rstd, backend):
    chosen = backends.resolve(backend, total.device, total.dtype, dnormed.dtype)
    return chosen.norm_backward(dnormed, dtotal, total, weight, rstd)


@torch.library.register_fake("vimamba::rms_norm_backward")
def _backward_fake(dnormed, dtotal, total, weight, rstd, backend):
    return total.new_empty(total.shape), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, residual, _, _, ctx.backend = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.dtype, ctx.has_residual = x.dtype, residual is not None
    ctx.set_materialize_grads(False)


def _backward_rule(ctx, dnormed, dtotal, _drstd):
    total, weight, rstd = ctx.saved_tensors
    if dnormed is None:
        dsum, dweight = dtotal, None
    else:
        dsum, dweight = _operator.backward(dnormed)(dnormed, dtotal, total, weight, rstd, ctx.backend)
    dx = None if dsum is None else dsum.to(ctx.dtype)
    return dx, dweight, dsum if ctx.has_residual else None, None, None, None


_operator = operators.Differentiable("rms_norm", _forward, _backward, _setup_context, _backward_rule)
