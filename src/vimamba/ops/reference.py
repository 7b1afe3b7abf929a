"""The backend "reference": plain PyTorch, one step at a time, the truth that every backend is tested against.

Each function takes the arguments of its public namesake, is differentiable by autograd, and computes in
float32 (float64 for float64 input) whatever the input type. Shapes: as in `backends.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.ops.arguments import widen
from vimamba.ops.backends import Backend
from vimamba.ops.direction import Direction, directions_of


def _per_channel(matrix: Tensor, dim: int, length: int) -> Tensor:
    """B or C in any accepted form, as (batch or 1, dim, state, length)."""
    if matrix.dim() == 2:
        return widen(matrix)[None, :, :, None].expand(1, -1, -1, length)
    grouped = matrix[:, None] if matrix.dim() == 3 else matrix
    return widen(grouped).repeat_interleave(dim // grouped.shape[1], dim=1)


def selective_scan(
    u_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    D_D: Tensor | None = None,
    z_BDL: Tensor | None = None,
    delta_bias_D: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t and y_t = C_t h_t + D u_t (arXiv 2312.00752, section 3)."""
    u, delta, A = widen(u_BDL), widen(delta_BDL), widen(A_DN)
    batch, dim, length = u.shape
    if delta_bias_D is not None:
        delta = delta + widen(delta_bias_D)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B_BDNL, C_BDNL = _per_channel(B, dim, length), _per_channel(C, dim, length)
    # Taken apart once: the gradient of an index is as large as the whole, at every step.
    inputs, deltas, Bs, Cs = (x.unbind(-1) for x in (delta * u, delta, B_BDNL, C_BDNL))
    h_BDN = u.new_zeros(batch, dim, A.shape[1])
    y_BD: list[Tensor] = [h_BDN[..., 0]] * length
    for t in reversed(range(length)) if reverse else range(length):
        h_BDN = torch.exp(deltas[t][..., None] * A) * h_BDN + inputs[t][..., None] * Bs[t]
        y_BD[t] = (h_BDN * Cs[t]).sum(-1)
    y = torch.stack(y_BD, dim=-1)
    if D_D is not None:
        y = y + widen(D_D)[:, None] * u
    if z_BDL is not None:
        y = y * F.silu(widen(z_BDL))
    out = y.to(u_BDL.dtype)
    return (out, h_BDN) if return_last_state else out


def causal_conv1d(
    x_BDL: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Each output sees its own token and the width - 1 before it, or after it with `reverse`."""
    x, weight = widen(x_BDL), widen(weight_DW)
    if reverse:
        x = x.flip(-1)
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    bias = None if bias_D is None else widen(bias_D)
    y = F.conv1d(padded, weight[:, None].to(x.dtype), bias, groups=weight.shape[0])
    if reverse:
        y = y.flip(-1)
    return (F.silu(y) if activation == "silu" else y).to(x_BDL.dtype)


def rms_norm(
    x: Tensor,
    weight_E: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The normalised sum of `x` and `residual`, and that sum itself."""
    total = widen(x) if residual is None else widen(x) + widen(residual)
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * widen(weight_E)
    return normed.to(out_dtype or x.dtype), total


def mixer(
    xz_BLE: Tensor, directions: Sequence[Direction], scale: float = 1.0, gates_BLR: Tensor | None = None
) -> Tensor:
    """Convolution, projections, scan and gate of every direction, summed (arXiv 2401.09417, algorithm 1)."""
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    total: Tensor | None = None
    for r, direction in enumerate(directions):
        c_BDL = causal_conv1d(
            x_BDL, direction.conv_weight.flatten(1), direction.conv_bias, "silu", reverse=direction.conv_reverse
        )
        rank, state = direction.dt_proj_weight.shape[1], direction.A_log.shape[1]
        x_dbl = direction.x_proj_weight.to(c_BDL.dtype) @ c_BDL
        dt_BRL, B_BNL, C_BNL = x_dbl.split([rank, state, state], dim=1)
        delta_BDL = direction.dt_proj_weight.to(c_BDL.dtype) @ dt_BRL
        y = selective_scan(
            c_BDL,
            delta_BDL,
            direction.decay_rates,
            B_BNL,
            C_BNL,
            direction.D,
            z_BDL,
            direction.dt_bias,
            True,
            reverse=direction.scan_reverse,
        )
        assert isinstance(y, Tensor)
        if gates_BLR is not None:
            y = y * gates_BLR[:, None, :, r]
        total = y if total is None else total + y
    assert total is not None
    return (total * scale).transpose(1, 2)


class Reference(Backend):
    """The functions above."""

    name = "reference"
    differentiable = True

    def saved_states(self, length: int) -> int:
        return 0

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
        out, last = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, reverse=reverse)
        return out, last, A.new_empty(0)

    def conv_forward(self, x, weight, bias, silu, reverse):
        return causal_conv1d(x, weight, bias, "silu" if silu else None, reverse=reverse)

    def norm_forward(self, x, residual, weight, eps, out_dtype):
        normed, total = rms_norm(x, weight, residual, eps, out_dtype=out_dtype)
        return normed, total, torch.rsqrt(total.square().mean(-1) + eps)

    def mixer_forward(self, xz, weights, reverse, scale, gates, save_states):
        return mixer(xz, directions_of(weights, reverse), scale, gates), xz.new_empty(len(reverse), 0)


BACKEND = Reference()
