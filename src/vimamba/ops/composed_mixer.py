"""The mixer from a backend's separate ops, for backends that do not fuse it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.ops.direction import Direction

if TYPE_CHECKING:
    from vimamba.ops.backends import Backend


class _Activations(NamedTuple):
    """What one direction feeds to its scan, and the rank of its step size."""

    c_BDL: Tensor
    x_dbl_BLE: Tensor
    delta_BDL: Tensor
    B_BGNL: Tensor
    C_BGNL: Tensor
    dt_BLR: Tensor


def _activations(backend: Backend, x_BDL: Tensor, direction: Direction) -> _Activations:
    conv_weight_DW, conv_reverse = direction.conv_weight.flatten(1), direction.conv_reverse
    c_BDL = backend.conv_forward(x_BDL, conv_weight_DW, direction.conv_bias, True, conv_reverse)
    x_dbl_BLE = F.linear(c_BDL.transpose(1, 2), direction.x_proj_weight.to(c_BDL.dtype))
    rank, state = direction.dt_proj_weight.shape[1], direction.A_log.shape[1]
    dt_BLR, B_BLN, C_BLN = x_dbl_BLE.split([rank, state, state], dim=-1)
    delta_BLD = F.linear(dt_BLR, direction.dt_proj_weight.to(c_BDL.dtype))
    B_BGNL, C_BGNL = B_BLN.transpose(1, 2)[:, None], C_BLN.transpose(1, 2)[:, None]
    return _Activations(c_BDL, x_dbl_BLE, delta_BLD.transpose(1, 2), B_BGNL, C_BGNL, dt_BLR)


def forward(
    backend: Backend,
    xz_BLE: Tensor,
    directions: Sequence[Direction],
    scale: float,
    gates_BLR: Tensor | None,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """The mixed tokens (batch, length, dim) and the states (directions, batch, chunks, dim, state)."""
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    total, states = None, []
    for r, direction in enumerate(directions):
        a = _activations(backend, x_BDL, direction)
        y, _, saved = backend.scan_forward(
            a.c_BDL, a.delta_BDL, direction.decay_rates, a.B_BGNL, a.C_BGNL, direction.D, z_BDL, direction.dt_bias,
            True, direction.scan_reverse, save_states,
        )  # fmt: skip
        if gates_BLR is not None:
            y = y * gates_BLR[:, None, :, r].to(y.dtype)
        total = y if total is None else total.add_(y)
        states.append(saved)
    assert total is not None
    return total.mul_(scale).transpose(1, 2), torch.stack(states)


def backward(
    backend: Backend,
    dout_BLD: Tensor,
    xz_BLE: Tensor,
    directions: Sequence[Direction],
    states: Tensor,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the mixer from a backend's separate ops; the forward activations are computed again."""
    dxz_BLE = torch.empty_like(xz_BLE)
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    dx_BDL, dz_BDL = dxz_BLE.transpose(1, 2).chunk(2, dim=1)
    dout_BDL = (dout_BLD * scale).transpose(1, 2)
    grads: list[Tensor] = []
    for i, (direction, saved) in enumerate(zip(directions, states, strict=True)):
        a, A_DN = _activations(backend, x_BDL, direction), direction.decay_rates
        dc, ddelta, dA, dB, dC, dD, dz, ddt_bias = backend.scan_backward(
            dout_BDL, None, a.c_BDL, a.delta_BDL, A_DN, a.B_BGNL, a.C_BGNL, direction.D, z_BDL, direction.dt_bias,
            saved, True, direction.scan_reverse,
        )  # fmt: skip
        dz_BDL.add_(dz) if i else dz_BDL.copy_(dz)
        ddelta_ML = ddelta.transpose(1, 2).flatten(0, 1)
        ddt_MR = ddelta_ML @ direction.dt_proj_weight.to(ddelta.dtype)
        ddt_weight = (a.dt_BLR.flatten(0, 1).t() @ ddelta_ML).t().contiguous()
        dx_dbl_ME = torch.cat(
            [ddt_MR, *(g[:, 0].transpose(1, 2).flatten(0, 1).to(ddt_MR.dtype) for g in (dB, dC))], dim=-1
        )
        c_MD = a.c_BDL.transpose(1, 2).flatten(0, 1)
        dx_weight = dx_dbl_ME.t() @ c_MD
        dc_MD = dc.transpose(1, 2).flatten(0, 1).addmm_(dx_dbl_ME, direction.x_proj_weight.to(dx_dbl_ME.dtype))
        dc_BDL = dc_MD.view(dout_BLD.shape).transpose(1, 2)
        dx, dconv_weight, dconv_bias = backend.conv_backward(
            dc_BDL, x_BDL, direction.conv_weight.flatten(1), direction.conv_bias, True, direction.conv_reverse
        )
        dx_BDL.add_(dx) if i else dx_BDL.copy_(dx)
        wide = A_DN.dtype
        grads += [
            dconv_weight.view_as(direction.conv_weight),
            dconv_bias,
            dx_weight.to(wide),
            ddt_weight.to(wide),
            ddt_bias,
            dA * A_DN,
            dD,
        ]
    return dxz_BLE, grads
