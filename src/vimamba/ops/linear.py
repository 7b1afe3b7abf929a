"""Linear layers: a product that is faster than the library's where our kernels are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vimamba.errors import UserError
from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_shape, check_tensors, widen
from vimamba.ops.blocks import exports_as_one

operators.define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, in float32 on a CPU by the kernels of the "cpu" backend.

    They pack the weight anew at each call, so nothing can become stale, and share one layout with the mixer's own
    projections. Measured against it: `python benchmarks/linear.py`. bfloat16 and float16, also autocast's, are
    multiplied in float32 and rounded once where the CPU has no instructions for them: PyTorch takes 8 times as long.

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
    if same_types and exports_as_one(x):
        return torch.ops.vimamba.linear(x, weight, bias)
    if backends.untraced(x):
        dtype, recorded = backends.compute_dtype(x), backends.differentiates(x, weight, bias)
        if backends.products_are_slow(x.device, dtype):
            if same_types or (backends.autocasts(x.device) and weight.dtype != torch.float64):
                return (_Linear.apply if recorded else _product)(x, weight, bias, dtype)
        elif same_types and dtype == x.dtype and backends.resolve("", x.device, dtype).has_linear(x):
            return (_Linear.apply if recorded else _product)(x, weight, bias, None)
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, lower: torch.dtype | None) -> Tensor:
    """By the kernels where they take it; for a `lower` type, which PyTorch multiplies slowly, in float32."""
    if lower is not None:
        with backends.without_autocast(x.device):
            return _product(widen(x), widen(weight), None if bias is None else widen(bias), None).to(lower)
    backend = backends.resolve("", x.device, x.dtype)
    return (backend.linear if backend.has_linear(x) else F.linear)(x, weight, bias)


def _exported(x, weight, bias):
    return _product(x, weight, bias, x.dtype if backends.products_are_slow(x.device, x.dtype) else None)


operators.implement("linear", _exported)
operators.first_derivatives_only("linear")


@torch.library.register_fake("vimamba::linear")
def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in 8-bit integers, for its values: weights of one scale for each output feature, inputs of one for
    each row, found as they come (dynamic quantisation), sums in 32 bits.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), int8.
        scales: (out_features,), float32: what an integer of the weight stands for.
        bias: (out_features,), float32, or None.

    Returns:
        (..., out_features), in x's type.

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
        UserError: a gradient is wanted.
    """
    check_tensors("quantized_linear", {"x": x, "scales": scales}, {"bias": bias})
    if weight.dim() != 2 or weight.dtype != torch.int8 or weight.device != x.device:
        raise ValueError(
            f"weight must be (out_features, in_features) int8 on {x.device}, got {tuple(weight.shape)} {weight.dtype}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have shape (..., in_features) = (..., {weight.shape[1]}), got {tuple(x.shape)}")
    for name, tensor in (("scales", scales), ("bias", bias)):
        check_shape(name, tensor, weight.shape[:1], "(out_features,)")
    if backends.differentiates(x):
        raise UserError("8-bit integers have no gradient: train before vimamba.quantize, or use torch.no_grad")
    backend = backends.resolve("", x.device, torch.float32)
    run = backend if backends.untraced(x) else backends.load("torch")
    return run.quantized_linear(x, weight, scales, bias)


class _Linear(Function):
    """A product in float32 with its gradient; that of the weight is a product over the rows, PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lower: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.lower = lower is not None
        return _product(x, weight, bias, lower)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.lower:
            return _gradients(ctx.needs_input_grad, dout, x, weight)
        with backends.without_autocast(dout.device):
            return _gradients(ctx.needs_input_grad, widen(dout), None if x is None else widen(x), widen(weight))


def _gradients(wanted: Sequence[bool], dout: Tensor, x: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, wants_weight, wants_bias, _ = wanted
    dout_MN = dout.flatten(0, -2)
    return (
        linear(dout, weight.t()) if wants_x else None,
        dout_MN.t() @ x.flatten(0, -2) if wants_weight else None,
        dout_MN.sum(0) if wants_bias else None,
        None,
    )
