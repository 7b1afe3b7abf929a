"""Depthwise causal convolution with SiLU: the short mixing step in front of the scan."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_flags, check_shape, check_tensors, wide

operators.define(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend) -> Tensor",
)
operators.define(
    "causal_conv1d_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own short causal kernel.

    The signature is `causal_conv1d_fn`'s. What vision models have no use for, sequences packed into one row (seq_idx)
    and states carried from one call to the next, is not there, and is refused.

    Args:
        x: (batch, dim, length), any strides.
        weight: (dim, width); the last column weighs the current step.
        bias: (dim,).
        seq_idx, initial_states, return_final_states, final_states_out: not supported; leave them out.
        activation: None, "silu" or "swish", which is the same.
        reverse: look at later steps instead, with the same weights.
        backend: None (choose), "reference", "torch", "cpu", "triton" or one registered with `ops.backends.register`.

    Returns:
        (batch, dim, length) in x's type.

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
        NotImplementedError: seq_idx or a state is given.
    """
    backends.check(backend)
    if isinstance(seq_idx, str):  # version 0.1 had no seq_idx, and the activation in its place
        warnings.warn(
            "causal_conv1d takes causal_conv1d_fn's arguments in its order: give activation by name",
            DeprecationWarning,
            stacklevel=2,
        )
        seq_idx, activation = None, seq_idx
    refused = {"seq_idx": seq_idx, "initial_states": initial_states, "final_states_out": final_states_out}
    for name, value in (refused | {"return_final_states": return_final_states or None}).items():
        if value is not None:
            raise NotImplementedError(
                f"causal_conv1d has no {name}: each row of the batch is one whole sequence that starts from nothing"
            )
    check_flags(reverse=reverse)
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    check_tensors("causal_conv1d", {"x": x, "weight": weight}, {"bias": bias})
    if x.dim() != 3:
        raise ValueError(f"x must have shape (batch, dim, length), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (dim, width) = ({x.shape[1]}, width), got {tuple(weight.shape)}")
    check_shape("bias", bias, (x.shape[1],), "(dim,)")
    dtype = wide(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    run = _operator.forward(backend, x)
    return run(x, weight.to(dtype), bias, activation is not None, reverse, backend or "")


def _forward(x, weight, bias, silu, reverse, backend):
    return backends.resolve(backend, x.device, x.dtype).conv_forward(x, weight, bias, silu, reverse)


@torch.library.register_fake("vimamba::causal_conv1d")
def _forward_fake(x, weight, bias, silu, reverse, backend):
    return torch.empty_like(x)


def _backward(dy, x, weight, bias, silu, reverse, backend):
    chosen = backends.resolve(backend, x.device, x.dtype)
    dx, dweight, dbias = chosen.conv_backward(dy, x, weight, bias, silu, reverse)
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
    dx, dweight, dbias = _operator.backward(dy)(dy, x, weight, bias, ctx.silu, ctx.reverse, ctx.backend)
    return dx, dweight, None if bias is None else dbias, None, None, None


_operator = operators.Differentiable("causal_conv1d", _forward, _backward, _setup_context, _backward_rule)


@register_flop_formula(torch.ops.vimamba.causal_conv1d)
def conv_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """A multiplication and an addition for each tap."""
    batch, dim, length = x_shape
    return 2 * batch * dim * length * weight_shape[1]
