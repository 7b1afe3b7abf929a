"""The Mamba mixer between its two linear layers: convolution, projections, scan and gate of every direction.

One op, so that a backend can keep the activations of all the steps in cache, and so that training keeps only the
input and a state every `CHUNK` steps: the backward pass recomputes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimamba.ops import backends, reference
from vimamba.ops.selective_scan import saved_chunks

torch.library.define(
    "vimamba::mixer",
    "(Tensor xz, Tensor[] weights, bool[] conv_reverse, bool[] scan_reverse, float scale, Tensor? gates,"
    " bool save_states, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "vimamba::mixer_backward",
    "(Tensor dout, Tensor xz, Tensor[] weights, Tensor states, bool[] conv_reverse, bool[] scan_reverse,"
    " float scale, str backend) -> (Tensor, Tensor[])",
)


class Direction(NamedTuple):
    """The weights of one direction of the mixer, and which way its convolution and its scan run."""

    conv_weight: Tensor  # (dim, width), or (dim, 1, width) as torch.nn.Conv1d keeps it
    conv_bias: Tensor  # (dim,)
    x_proj_weight: Tensor  # (rank + 2 * state, dim)
    dt_proj_weight: Tensor  # (dim, rank)
    dt_bias: Tensor  # (dim,)
    A_log: Tensor  # (dim, state), the logarithm of -A
    D: Tensor  # (dim,)
    conv_reverse: bool = False
    scan_reverse: bool = False

    @property
    def decay_rates(self) -> Tensor:
        """A (dim, state), in float32 or more whatever the type of A_log."""
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[:7]


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
        directions: one or more, each with its own weights and sense.
        scale: 1 for the sum of the directions, 1 / len(directions) for the mean.
        gates: (batch, length or 1, len(directions)), what each direction counts for each token or image.
        skip: where no gradient is wanted, do not compute a direction for the images whose gate is 0.
        backend: None (choose), "reference", "torch", "cpu" or "triton".

    Returns:
        (batch, length, dim) in xz's type.

    Raises:
        ValueError: xz or the gates do not fit the weights.
    """
    backends.check(backend)
    dim = directions[0].conv_weight.shape[0]
    if xz.dim() != 3 or xz.shape[-1] != 2 * dim:
        raise ValueError(
            f"xz must have shape (batch, length, 2 * dim) = (batch, length, {2 * dim}), got {tuple(xz.shape)}"
        )
    if gates is not None and (
        gates.dim() != 3 or gates.shape[1] not in (1, xz.shape[1]) or gates.shape[::2] != (len(xz), len(directions))
    ):
        raise ValueError(
            f"gates must have shape (batch, length or 1, directions) = ({len(xz)}, {xz.shape[1]} or 1, "
            f"{len(directions)}), got {tuple(gates.shape)}"
        )
    if backend == "reference":
        return reference.mixer(xz, directions, scale, gates)
    wide = torch.float64 if xz.dtype == torch.float64 else torch.float32
    weights = [w if w.dtype == wide else w.to(wide) for d in directions for w in d.weights]
    save_states = torch.is_grad_enabled() and any(t.requires_grad for t in (xz, *weights))
    if gates is not None:
        gates = gates.to(wide)
        differentiable = torch.is_grad_enabled() and (save_states or gates.requires_grad)
        if differentiable or not hasattr(backends.resolve(backend or "", xz.device, xz.dtype), "mixer_takes_gates"):
            return _one_by_one(xz, directions, scale, gates, skip and not differentiable, backend)
    run = _forward if backends.values_only(xz) else torch.ops.vimamba.mixer
    out, _ = run(
        xz,
        weights,
        [d.conv_reverse for d in directions],
        [d.scan_reverse for d in directions],
        scale,
        gates,
        save_states,
        backend or "",
    )
    return out


def _one_by_one(
    xz: Tensor, directions: Sequence[Direction], scale: float, gates: Tensor, skip: bool, backend: str | None
) -> Tensor:
    """The sum of the mixers of single directions, each times its gate, for backends that weigh no directions."""
    total: Tensor | None = None
    for way, gate in zip(directions, gates.to(xz.dtype).split(1, dim=-1), strict=True):
        images = gate[:, 0, 0].nonzero()[:, 0] if skip and gate.shape[1] == 1 else None
        if images is None or len(images) == len(xz):
            y = mixer(xz, [way], scale, backend=backend) * gate
            total = y if total is None else total + y
        elif len(images):
            y = mixer(xz[images], [way], scale, backend=backend) * gate[images]
            base = y.new_zeros(len(xz), *y.shape[1:]) if total is None else total
            total = base.index_add(0, images, y)
    return xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2) if total is None else total


def _directions(weights: list[Tensor], conv_reverse: list[bool], scan_reverse: list[bool]) -> list[Direction]:
    sets = (weights[i : i + 7] for i in range(0, len(weights), 7))
    return [Direction._make((*w, c, s)) for w, c, s in zip(sets, conv_reverse, scan_reverse, strict=True)]


class _Activations(NamedTuple):
    """What one direction feeds to its scan, and the rank of its step size."""

    c_BDL: Tensor
    x_dbl_BLE: Tensor
    delta_BDL: Tensor
    B_BGNL: Tensor
    C_BGNL: Tensor
    dt_BLR: Tensor


def _activations(module: ModuleType, x_BDL: Tensor, way: Direction) -> _Activations:
    c_BDL = module.conv_forward(x_BDL, way.conv_weight.flatten(1), way.conv_bias, True, way.conv_reverse)
    x_dbl_BLE = F.linear(c_BDL.transpose(1, 2), way.x_proj_weight.to(c_BDL.dtype))
    rank, state = way.dt_proj_weight.shape[1], way.A_log.shape[1]
    dt_BLR, B_BLN, C_BLN = x_dbl_BLE.split([rank, state, state], dim=-1)
    delta_BLD = F.linear(dt_BLR, way.dt_proj_weight.to(c_BDL.dtype))
    B_BGNL, C_BGNL = B_BLN.transpose(1, 2)[:, None], C_BLN.transpose(1, 2)[:, None]
    return _Activations(c_BDL, x_dbl_BLE, delta_BLD.transpose(1, 2), B_BGNL, C_BGNL, dt_BLR)


def _composed_forward(
    module: ModuleType, xz_BLE: Tensor, directions: list[Direction], scale: float, save_states: bool
) -> tuple[Tensor, Tensor]:
    """The mixer from a backend's separate ops."""
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    total, states = None, []
    for way in directions:
        a = _activations(module, x_BDL, way)
        y, _, saved = module.scan_forward(
            a.c_BDL, a.delta_BDL, way.decay_rates, a.B_BGNL, a.C_BGNL, way.D, z_BDL, way.dt_bias, True,
            way.scan_reverse, save_states,
        )  # fmt: skip
        total = y if total is None else total.add_(y)
        states.append(saved)
    assert total is not None
    return total.mul_(scale).transpose(1, 2), torch.stack(states)


def _composed_backward(
    module: ModuleType,
    dout_BLD: Tensor,
    xz_BLE: Tensor,
    directions: list[Direction],
    states: Tensor,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the mixer from a backend's separate ops; the forward activations are computed again."""
    dxz_BLE = torch.empty_like(xz_BLE)
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    dx_BDL, dz_BDL = dxz_BLE.transpose(1, 2).chunk(2, dim=1)
    dout_BDL = (dout_BLD * scale).transpose(1, 2)
    grads: list[Tensor] = []
    for i, (way, saved) in enumerate(zip(directions, states, strict=True)):
        a, A_DN = _activations(module, x_BDL, way), way.decay_rates
        dc, ddelta, dA, dB, dC, dD, dz, ddt_bias = module.scan_backward(
            dout_BDL, None, a.c_BDL, a.delta_BDL, A_DN, a.B_BGNL, a.C_BGNL, way.D, z_BDL, way.dt_bias, saved,
            True, way.scan_reverse,
        )  # fmt: skip
        dz_BDL.add_(dz) if i else dz_BDL.copy_(dz)
        ddelta_ML = ddelta.transpose(1, 2).flatten(0, 1)
        ddt_MR = ddelta_ML @ way.dt_proj_weight.to(ddelta.dtype)
        ddt_weight = (a.dt_BLR.flatten(0, 1).t() @ ddelta_ML).t().contiguous()
        dx_dbl_ME = torch.cat(
            [ddt_MR, *(g[:, 0].transpose(1, 2).flatten(0, 1).to(ddt_MR.dtype) for g in (dB, dC))], dim=-1
        )
        c_MD = a.c_BDL.transpose(1, 2).flatten(0, 1)
        dx_weight = dx_dbl_ME.t() @ c_MD
        dc_MD = dc.transpose(1, 2).flatten(0, 1).addmm_(dx_dbl_ME, way.x_proj_weight.to(dx_dbl_ME.dtype))
        dc_BDL = dc_MD.view(dout_BLD.shape).transpose(1, 2)
        dx, dconv_weight, dconv_bias = module.conv_backward(
            dc_BDL, x_BDL, way.conv_weight.flatten(1), way.conv_bias, True, way.conv_reverse
        )
        dx_BDL.add_(dx) if i else dx_BDL.copy_(dx)
        wide = A_DN.dtype
        grads += [
            dconv_weight.view_as(way.conv_weight),
            dconv_bias,
            dx_weight.to(wide),
            ddt_weight.to(wide),
            ddt_bias,
            dA * A_DN,
            dD,
        ]
    return dxz_BLE, grads


def _forward(xz, weights, conv_reverse, scan_reverse, scale, gates, save_states, backend):
    module = backends.resolve(backend, xz.device, xz.dtype)
    directions = _directions(weights, conv_reverse, scan_reverse)
    if gates is not None:
        return module.mixer_forward(xz, directions, scale, save_states, gates)
    if hasattr(module, "mixer_forward"):
        return module.mixer_forward(xz, directions, scale, save_states)
    return _composed_forward(module, xz, directions, scale, save_states)


torch.library.impl("vimamba::mixer", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("vimamba::mixer")
def _forward_fake(xz, weights, conv_reverse, scan_reverse, scale, gates, save_states, backend):
    batch, length, width = xz.shape
    A_log = weights[5]
    count = len(scan_reverse)
    states = (count, batch, saved_chunks(length), *A_log.shape) if save_states else (count, 0)
    return xz.new_empty(batch, length, width // 2), A_log.new_empty(states)


@torch.library.impl("vimamba::mixer_backward", "CompositeExplicitAutograd")
def _backward(dout, xz, weights, states, conv_reverse, scan_reverse, scale, backend):
    module = backends.resolve(backend, xz.device, xz.dtype)
    directions = _directions(weights, conv_reverse, scan_reverse)
    if hasattr(module, "mixer_backward"):
        return module.mixer_backward(dout, xz, directions, states, scale)
    return _composed_backward(module, dout, xz, directions, states, scale)


@torch.library.register_fake("vimamba::mixer_backward")
def _backward_fake(dout, xz, weights, states, conv_reverse, scan_reverse, scale, backend):
    return xz.new_empty(xz.shape), [torch.empty_like(w) for w in weights]


def _setup_context(ctx, inputs, output):
    xz, weights, ctx.conv_reverse, ctx.scan_reverse, ctx.scale, _, save_states, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    if save_states:
        ctx.save_for_backward(xz, *weights, output[1])


def _backward_rule(ctx, dout, _dstates):
    if dout is None:
        return (None,) * 8
    xz, *weights, states = ctx.saved_tensors
    dxz, dweights = torch.ops.vimamba.mixer_backward(
        dout, xz, weights, states, ctx.conv_reverse, ctx.scan_reverse, ctx.scale, ctx.backend
    )
    return dxz, dweights, None, None, None, None, None, None


torch.library.register_autograd("vimamba::mixer", _backward_rule, setup_context=_setup_context)
backends.first_derivatives_only("vimamba::mixer_backward")


@register_flop_formula(torch.ops.vimamba.mixer)
def mixer_flops(xz_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """Convolution and projections at two operations a weight and step, the scan at nine a state update."""
    batch, length, _ = xz_shape
    total = 0
    for i in range(0, len(weight_shapes), 7):
        conv, _, x_proj, dt_proj, _, A_log, _ = weight_shapes[i : i + 7]
        linear = sum(math.prod(shape) for shape in (conv, x_proj, dt_proj))
        total += batch * length * (2 * linear + 9 * A_log[0] * A_log[1])
    return total
