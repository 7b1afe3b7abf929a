"""Depthwise causal convolution with SiLU: the short mixing step in front of the scan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimamba.ops import backends, reference

torch.library.define(
    "vimamba::causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend) -> Tensor",
)
torch.library.define(
    "vimamba::causal_conv1d_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own short causal kernel; the signature of `causal_conv1d_fn`.

    Args:
        x: (batch, dim, length), any strides; channels contiguous is the fast layout.
        weight: (dim, width); the last column weighs the current step.
        bias: (dim,).
        activation: None or "silu".
        reverse: look at later steps instead, with the same weights.
        backend: None (choose), "reference", "torch", "cpu" or "triton".

    Returns:
        (batch, dim, length) in x's type.

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
    """
    backends.check(backend)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point (batch, dim, length), got {x.dtype} {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape (dim, width) = ({x.shape[1]}, width), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (dim,) = ({x.shape[1]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if backend == "reference":
        return reference.causal_conv1d(x, weight, bias, activation and "silu", reverse=reverse)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide)
    return torch.ops.vimamba.causal_conv1d(x, weight.to(wide), bias, activation is not None, reverse, backend or "")


@torch.library.impl("vimamba::causal_conv1d", "CompositeExplicitAutograd")
def _forward(x, weight, bias, silu, reverse, backend):
    return backends.resolve(backend, x.device, x.dtype).conv_forward(x, weight, bias, silu, reverse)


@torch.library.register_fake("vimamba::causal_conv1d")
def _forward_fake(x, weight, bias, silu, reverse, backend):
    return torch.empty_like(x)


@torch.library.impl("vimamba::causal_conv1d_backward", "CompositeExplicitAutograd")
def _backward(dy, x, weight, bias, silu, reverse, backend):
    module = backends.resolve(backend, x.device, x.dtype)
    dx, dweight, dbias = module.conv_backward(dy, x, weight, bias, silu, reverse)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


@torch.library.register_fake("vimamba::causal_conv1d_backward")
def _backward_fake(dy, x, weight, bias, silu, reverse, backend):
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(bias if bias is not None else weight[:0]),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.silu, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward_rule(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.vimamba.causal_conv1d_backward(
        dy, x, weight, bias, ctx.silu, ctx.reverse, ctx.backend
    )
    return dx, dweight, None if bias is None else dbias, None, None, None


torch.library.register_autograd("vimamba::causal_conv1d", _backward_rule, setup_context=_setup_context)
backends.first_derivatives_only("vimamba::causal_conv1d_backward")


@register_flop_formula(torch.ops.vimamba.causal_conv1d)
def conv_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """A multiplication and an addition for each tap."""
    batch, dim, length = x_shape
    return 2 * batch * dim * length * weight_shape[1]
