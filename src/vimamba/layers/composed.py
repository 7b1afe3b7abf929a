"""The mixer's directions from their modules, each called: for modules that were replaced or are hooked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.layers.intact import intact
from vimamba.ops import causal_conv1d, selective_scan


class Modules(NamedTuple):
    """One direction: its modules and weights, and which way its convolution and its scan run."""

    conv1d: nn.Module | None  # None: only the SiLU
    x_proj: nn.Module
    dt_proj: nn.Module
    A_log: Tensor  # (dim, state)
    D: Tensor  # (dim,)
    conv_reverse: bool
    scan_reverse: bool


def mixer(xz_BLE: Tensor, directions: Sequence[Modules], scale: float, gates: Tensor | None) -> Tensor:
    """`ops.mixer`, with the modules called: whatever stands in their place, or around the call, takes part.

    Under a gate that is 0 a direction is computed all the same: what its modules do may be wanted.
    """
    x_BDL, z_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)
    total: Tensor | None = None
    for i, direction in enumerate(directions):
        y = _scan(x_BDL, z_BDL, direction).transpose(1, 2)
        y = y if gates is None else y * gates[..., i : i + 1].to(y.dtype)
        total = y if total is None else total + y
    assert total is not None
    return total * scale


def _scan(x_BDL: Tensor, z_BDL: Tensor, way: Modules) -> Tensor:
    c_BDL = _convolve(x_BDL, way)
    state = way.A_log.shape[1]
    x_dbl_BLE = way.x_proj(c_BDL.transpose(1, 2))
    dt_BLR, B_BLN, C_BLN = x_dbl_BLE.split([x_dbl_BLE.shape[-1] - 2 * state, state, state], dim=-1)
    delta_BLD = way.dt_proj(dt_BLR)  # its bias included
    A_log = way.A_log if way.A_log.dtype == torch.float64 else way.A_log.float()
    y = selective_scan(
        c_BDL, delta_BLD.transpose(1, 2).to(c_BDL.dtype), -A_log.exp(),
        B_BLN.transpose(1, 2).to(c_BDL.dtype), C_BLN.transpose(1, 2).to(c_BDL.dtype), way.D, z_BDL.to(c_BDL.dtype),
        delta_softplus=True, reverse=way.scan_reverse,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y


def _convolve(x_BDL: Tensor, way: Modules) -> Tensor:
    conv = way.conv1d
    if conv is None:
        return F.silu(x_BDL)
    if isinstance(conv, nn.Conv1d) and intact(conv, nn.Conv1d):
        return causal_conv1d(x_BDL, conv.weight.flatten(1), conv.bias, activation="silu", reverse=way.conv_reverse)
    length = x_BDL.shape[-1]
    c_BDL = conv(x_BDL.flip(-1) if way.conv_reverse else x_BDL)[..., :length]  # padded at both ends
    return F.silu(c_BDL.flip(-1) if way.conv_reverse else c_BDL)
