"""The selective scan: the public function, its torch.library registration, its gradient, its dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_flags, check_shape, check_tensors, wide
from vimamba.ops.sizes import FLOPS_OF_UPDATE

operators.define(
    "selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " bool delta_softplus, bool reverse, bool save_states, str backend) -> (Tensor, Tensor, Tensor)",
)
operators.define(
    "selective_scan_backward",
    "(Tensor dout, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? delta_bias, Tensor states, bool delta_softplus, bool reverse, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state space recurrence over the last axis (arXiv 2312.00752, equation 2a and algorithm 2).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = C_t h_t + D u_t;  the result is y silu(z).
    State and accumulation are float32 (float64 for float64 input). Any strides are taken; channels as the
    contiguous axis, a transposed (batch, length, dim) tensor, is the fast layout and is never copied.

    Args:
        u: input, (batch, dim, length), float32, bfloat16, float16 or float64.
        delta: step size before bias and softplus, same shape and type as u.
        A: (dim, state), real; negative for a stable recurrence.
        B: (batch, state, length), (batch, groups, state, length) or constant (dim, state).
        C: like B.
        D: skip connection, (dim,).
        z: gate, same shape and type as u.
        delta_bias: (dim,), added to delta before the softplus.
        delta_softplus: apply softplus to delta.
        return_last_state: also return the state after the last step, (batch, dim, state), float32.
        reverse: run from the last step to the first; results stay in place.
        backend: None (choose), "reference", "torch", "cpu", "triton" or one registered with `ops.backends.register`.

    Returns:
        (batch, dim, length) in u's type, or that and the last state. First derivatives only.

    Raises:
        ValueError: a shape, type or device does not fit; the message names the argument.
    """
    backends.check(backend)
    check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state, reverse=reverse)
    required = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    check_tensors("selective_scan", required, {"D": D, "z": z, "delta_bias": delta_bias})
    u, delta, B, C, z = _under_autocast(u, delta, B, C, z)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    dtype = wide(u.dtype)
    A, D, delta_bias = A.to(dtype), _to(D, dtype), _to(delta_bias, dtype)
    B, C = (m.to(dtype) if m.dim() == 2 else m[:, None] if m.dim() == 3 else m for m in (B, C))
    save_states = backends.differentiates(u, delta, A, B, C, D, z, delta_bias)
    run = _operator.forward(backend, u)
    out, last_state, _ = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states, backend or "")
    return (out, last_state) if return_last_state else out


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _under_autocast(u: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast the neighbours of the scan may differ in type: bring all to the widest of them."""
    if not backends.autocasts(u.device):
        return (u, *others)
    dtype = u.dtype
    for t in others:
        if t is not None and t.dim() > 2 and t.is_floating_point():
            dtype = torch.promote_types(dtype, t.dtype)
    return (u.to(dtype), *(t if t is None or t.dim() == 2 else t.to(dtype) for t in others))


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3:
        raise ValueError(f"u must have shape (batch, dim, length), got {tuple(u.shape)}")
    batch, dim, length = u.shape
    if length == 0 or dim == 0:
        raise ValueError(f"u must have at least one channel and one step, got shape {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"A must have shape (dim, state) = ({dim}, state), got {tuple(A.shape)}")
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None and tensor.shape != u.shape:
            raise ValueError(f"{name} must have u's shape {tuple(u.shape)}, got {tuple(tensor.shape)}")
    check_shape("D", D, (dim,), "(dim,)")
    check_shape("delta_bias", delta_bias, (dim,), "(dim,)")
    for name, matrix in (("B", B), ("C", C)):
        _check_matrix(name, matrix, batch, dim, length, A.shape[1])
    for name, tensor in (("delta", delta), ("z", z), ("B", B), ("C", C)):
        if tensor is not None and tensor.dim() > 2 and tensor.dtype != u.dtype:
            raise ValueError(f"{name} must have u's type {u.dtype}, got {tensor.dtype}")


def _check_matrix(name: str, matrix: Tensor, batch: int, dim: int, length: int, state: int) -> None:
    shape = tuple(matrix.shape)
    if matrix.dim() == 2:
        fits = shape == (dim, state)
    elif matrix.dim() == 3:
        fits = shape == (batch, state, length)
    else:
        fits = matrix.dim() == 4 and (shape[0], *shape[2:]) == (batch, state, length)
        if fits and (shape[1] == 0 or dim % shape[1]):
            raise ValueError(f"{name} has {shape[1]} groups, which do not divide u's {dim} channels")
    if not fits:
        raise ValueError(
            f"{name} must have shape (batch, state, length) = ({batch}, {state}, {length}), "
            f"(batch, groups, state, length) or (dim, state) = ({dim}, {state}), got {shape}"
        )


_MATRICES = (2, 3, 4)  # the gradients of A, B and C are contiguous; the others have their tensors' layout


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states, backend):
    chosen = backends.resolve(backend, u.device, u.dtype)
    return chosen.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states)


@torch.library.register_fake("vimamba::selective_scan")
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states, backend):
    batch, dim, length = u.shape
    saved = backends.resolve(backend, u.device, u.dtype).saved_states(length)
    states = (batch, saved, dim, A.shape[1]) if save_states else (0,)
    return torch.empty_like(u), A.new_empty(batch, dim, A.shape[1]), A.new_empty(states)


def _backward(dout, dlast, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse, backend):
    chosen = backends.resolve(backend, u.device, u.dtype)
    grads = chosen.scan_backward(dout, dlast, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse)
    return tuple(A.new_empty(0) if g is None else g.contiguous() if i in _MATRICES else g for i, g in enumerate(grads))


@torch.library.register_fake("vimamba::selective_scan_backward")
def _backward_fake(dout, dlast, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse, backend):
    given = (u, delta, A, B, C, D, z, delta_bias)
    return tuple(
        A.new_empty(0) if t is None else t.new_empty(t.shape) if i in _MATRICES else torch.empty_like(t)
        for i, t in enumerate(given)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, save_states, ctx.backend = inputs
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*tensors, output[2] if save_states else None)
    ctx.set_materialize_grads(False)


def _backward_rule(ctx, dout, dlast, _dstates):
    *tensors, states = ctx.saved_tensors
    options = ctx.delta_softplus, ctx.reverse
    if states is None:  # a graph that was exported for its values alone
        states = torch.ops.vimamba.selective_scan(*tensors, *options, True, ctx.backend)[2]
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    grads = _operator.backward(dout)(dout, dlast, *tensors, states, *options, ctx.backend)
    return *(g if given else None for g, given in zip(grads, ctx.given, strict=True)), None, None, None, None


_operator = operators.Differentiable("selective_scan", _forward, _backward, _setup_context, _backward_rule)


@register_flop_formula(torch.ops.vimamba.selective_scan)
def scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs) -> int:
    """Those of every state update."""
    batch, dim, length = u_shape
    return FLOPS_OF_UPDATE * batch * dim * length * A_shape[1]
