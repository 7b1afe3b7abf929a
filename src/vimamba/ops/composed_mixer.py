"""The mixer from a backend's separate ops, for backends that do not fuse it."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vimamba.ops.mixer import Direction


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


def forward(
    module: ModuleType, xz_BLE: Tensor, directions: Sequence[Direction], scale: float, save_states: bool
) -> tuple[Tensor, Tensor]:
    """The mixed tokens (batch, length, dim) and the states (directions, batch, chunks, dim, state)."""
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


def backward(
    module: ModuleType,
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
