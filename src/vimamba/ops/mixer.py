"""The Mamba mixer between its two linear layers: convolution, projections, scan and gate of every direction.

One op, so that a backend can keep the activations of all the steps in cache, and so that training keeps only the
input and a state every `CHUNK` steps: the backward pass recomputes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_flags, check_number, check_shape, check_tensors, wide
from vimamba.ops.direction import WEIGHTS, Direction, flat
from vimamba.ops.sizes import FLOPS_OF_UPDATE

operators.define(
    "mixer",
    "(Tensor xz, Tensor[] weights, int[] reverse, float scale, Tensor? gates, bool save_states, str backend)"
    " -> (Tensor, Tensor)",
)
operators.define(
    "mixer_backward",
    "(Tensor dout, Tensor xz, Tensor[] weights, Tensor states, int[] reverse, float scale, str backend)"
    " -> (Tensor, Tensor[])",
)


def mixer(
    xz: Tensor,
    directions: Sequence[Direction],
    scale: float = 1.0,
    gates: Tensor | None = None,
    *,
    skip: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mix the tokens along every direction and sum (arXiv 2401.09417, algorithm 1, lines 7 to 19).

    For each direction: c = silu(conv(x)); dt, B, C = split(x_proj c); y = scan(c, dt_proj dt, A, B, C, D). The
    result is scale * sum(y) * silu(z), or with gates g scale * sum(g y) * silu(z).

    Args:
        xz: (batch, length, 2 * dim): the input and the gate side by side, as the input projection gives them.
        directions: one or more, each with weights of its own, running either way.
        scale: 1 for the sum of the directions, 1 / len(directions) for the mean.
        gates: (batch, length or 1, len(directions)), what each direction counts for each token or image.
        skip: where no gradient is wanted, do not compute a direction for the images whose gate is 0.
        backend: None (choose), "reference", "torch", "cpu", "triton" or one registered with `ops.backends.register`.

    Returns:
        (batch, length, dim) in xz's type.

    Raises:
        ValueError: xz or the gates do not fit the weights.
    """
    backends.check(backend)
    check_flags(skip=skip)
    check_number("scale", scale)
    _check(xz, directions, gates)
    dtype = wide(xz.dtype)
    weights, reverse = flat(directions)
    weights = [w if w.dtype == dtype else w.to(dtype) for w in weights]
    save_states = backends.differentiates(xz, *weights)
    if gates is not None:
        gates = gates.to(dtype)
        values = not (save_states or backends.differentiates(gates))
        skips = skip and values
        if not values or (skips and not backends.trait("skips_closed_gates", backend, xz.device, xz.dtype)):
            return _one_by_one(xz, directions, scale, gates, skips, backend)
    run = _operator.forward(backend, xz)
    return run(xz, weights, reverse, scale, gates, save_states, backend or "")[0]


def frozen_backward(
    dout: Tensor, xz: Tensor, directions: Sequence[Direction], scale: float = 1.0, gates: Tensor | None = None
) -> Tensor | None:
    """The gradient of the mixer's x with what chooses held constant: delta, B, C, z and the sigmoids of its SiLUs.

    Args:
        dout: the gradient of what `mixer` gives, (batch, length, dim), in xz's type.
        xz, directions, scale, gates: as `mixer` takes them; they have been checked.

    Returns:
        (batch, length, dim) in xz's type; None where no backend has a kernel for it.
    """
    weights, reverse = flat(directions)
    dtype = wide(xz.dtype)
    gates = None if gates is None else gates.to(dtype)
    backend = backends.resolve("", xz.device, xz.dtype)
    return backend.mixer_frozen_backward(dout, xz, [w.to(dtype) for w in weights], reverse, scale, gates)


def _check(xz: Tensor, directions: Sequence[Direction], gates: Tensor | None) -> None:
    if not isinstance(directions, Sequence) or not directions:
        raise ValueError(f"directions must be a sequence of one Direction or more, got {directions!r}")
    check_tensors("mixer", {"xz": xz}, {"gates": gates})
    if xz.dim() != 3 or xz.shape[1] == 0:
        raise ValueError(f"xz must have shape (batch, length, 2 * dim) with at least one step, got {tuple(xz.shape)}")
    batch, length, width = xz.shape
    for i, direction in enumerate(directions):
        if not isinstance(direction, Direction):
            raise ValueError(f"directions[{i}] must be a Direction, got {type(direction).__name__}")
        names = [f"directions[{i}].{field}" for field in Direction._fields]
        check_tensors("mixer", {"xz": xz, **dict(zip(names, direction.weights, strict=False))})
        _check_direction(names, direction, directions[0])
    dim = directions[0].conv_weight.shape[0]
    if width != 2 * dim:
        raise ValueError(
            f"xz must have shape (batch, length, 2 * dim) = (batch, length, {2 * dim}), got {tuple(xz.shape)}"
        )
    if gates is not None and (
        gates.dim() != 3 or gates.shape[1] not in (1, length) or gates.shape[::2] != (batch, len(directions))
    ):
        raise ValueError(
            f"gates must have shape (batch, length or 1, directions) = ({batch}, {length} or 1, "
            f"{len(directions)}), got {tuple(gates.shape)}"
        )


def _check_direction(names: Sequence[str], direction: Direction, first: Direction) -> None:
    """One direction's sizes; all have the first one's channels, states, rank and width of convolution."""
    conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = direction.weights
    if conv.dim() not in (2, 3) or 0 in conv.shape or (conv.dim() == 3 and conv.shape[1] != 1):
        raise ValueError(f"{names[0]} must have shape (dim, width) or (dim, 1, width), got {tuple(conv.shape)}")
    dim = conv.shape[0]
    for name, weight, axes in ((names[3], dt_proj, "(dim, rank)"), (names[5], A_log, "(dim, state)")):
        if weight.dim() != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
            raise ValueError(f"{name} must have shape {axes} with dim = {dim}, got {tuple(weight.shape)}")
    for i, (weight, of_first) in enumerate(zip(direction.weights, first.weights, strict=True)):
        if weight.shape != of_first.shape:
            raise ValueError(
                f"{names[i]} must have the first direction's shape {tuple(of_first.shape)}, got {tuple(weight.shape)}"
            )
    check_shape(names[2], x_proj, (dt_proj.shape[1] + 2 * A_log.shape[1], dim), "(rank + 2 * state, dim)")
    for i, vector in ((1, conv_bias), (4, dt_bias), (6, D)):
        check_shape(names[i], vector, (dim,), "(dim,)")


def _one_by_one(
    xz: Tensor, directions: Sequence[Direction], scale: float, gates: Tensor, skip: bool, backend: str | None
) -> Tensor:
    """The sum of the mixers of single directions, each times its gate: the gates have gradients, or are closed and to
    be skipped by a backend that does not."""
    total: Tensor | None = None
    for direction, gate in zip(directions, gates.to(xz.dtype).split(1, dim=-1), strict=True):
        images = gate[:, 0, 0].nonzero()[:, 0] if skip and gate.shape[1] == 1 else None
        if images is None or len(images) == len(xz):
            y = mixer(xz, [direction], scale, backend=backend) * gate
            total = y if total is None else total + y
        elif len(images):
            y = mixer(xz[images], [direction], scale, backend=backend) * gate[images]
            base = y.new_zeros(len(xz), *y.shape[1:]) if total is None else total
            total = base.index_add(0, images, y)
    return xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2) if total is None else total


def _forward(xz, weights, reverse, scale, gates, save_states, backend):
    chosen = backends.resolve(backend, xz.device, xz.dtype)
    return chosen.mixer_forward(xz, weights, reverse, scale, gates, save_states)


@torch.library.register_fake("vimamba::mixer")
def _forward_fake(xz, weights, reverse, scale, gates, save_states, backend):
    batch, length, width = xz.shape
    A_log, count = weights[5], len(reverse)
    saved = backends.resolve(backend, xz.device, xz.dtype).saved_states(length)
    states = (count, batch, saved, *A_log.shape) if save_states else (count, 0)
    return xz.new_empty(batch, length, width // 2), A_log.new_empty(states)


def _backward(dout, xz, weights, states, reverse, scale, backend):
    chosen = backends.resolve(backend, xz.device, xz.dtype)
    return chosen.mixer_backward(dout, xz, weights, reverse, states, scale)


@torch.library.register_fake("vimamba::mixer_backward")
def _backward_fake(dout, xz, weights, states, reverse, scale, backend):
    return xz.new_empty(xz.shape), [torch.empty_like(w) for w in weights]


def _setup_context(ctx, inputs, output):
    xz, weights, ctx.reverse, ctx.scale, _, save_states, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(xz, *weights, output[1] if save_states else None)


def _backward_rule(ctx, dout, _dstates):
    if dout is None:
        return (None,) * 7
    xz, *weights, states = ctx.saved_tensors
    if states is None:  # a graph that was exported for its values alone
        states = torch.ops.vimamba.mixer(xz, weights, ctx.reverse, ctx.scale, None, True, ctx.backend)[1]
    dxz, dweights = _operator.backward(dout)(dout, xz, weights, states, ctx.reverse, ctx.scale, ctx.backend)
    return dxz, dweights, None, None, None, None, None


_operator = operators.Differentiable("mixer", _forward, _backward, _setup_context, _backward_rule)


@register_flop_formula(torch.ops.vimamba.mixer)
def mixer_flops(xz_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """Convolution and projections at two operations a weight and step, those of every state update."""
    batch, length, _ = xz_shape
    total = 0
    for i in range(0, len(weight_shapes), WEIGHTS):
        conv, _, x_proj, dt_proj, _, A_log, _ = weight_shapes[i : i + WEIGHTS]
        linear = sum(math.prod(shape) for shape in (conv, x_proj, dt_proj))
        total += batch * length * (2 * linear + FLOPS_OF_UPDATE * A_log[0] * A_log[1])
    return total
