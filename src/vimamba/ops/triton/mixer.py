"""The fused mixer on the GPU: every step runs for all directions in one launch.

Forward: convolution (x is read once), x_proj and dt_proj (batched matrix products), scan (with dt_proj's bias and
softplus inside), sum and gate. Backward computes the convolution and the projections again and needs only the input
and the states every 64 steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.ops.direction import CONV_REVERSE, SCAN_REVERSE, WEIGHTS
from vimamba.ops.triton import conv, gate, pack, scan


class _Weights(NamedTuple):
    """The directions' weights side by side; the projections in the input's type, the rest in float32."""

    conv_RDW: Tensor
    conv_bias_RD: Tensor
    x_proj_RED: Tensor
    dt_proj_RDK: Tensor
    dt_bias_RD: Tensor
    A_RDN: Tensor
    D_RD: Tensor
    conv_reverse_mask: int
    scan_reverse_mask: int


def _stack(flat: list[Tensor], reverse: list[int], dtype: torch.dtype) -> _Weights:
    """One launch for the weights of a type, where a torch.stack for each, with the casts, would be ten in all."""
    of_directions = [flat[i : i + WEIGHTS] for i in range(0, len(flat), WEIGHTS)]
    projections = (2, 3)
    stacked = [
        weight.new_empty((len(reverse), *weight.shape), dtype=dtype if i in projections else torch.float32)
        for i, weight in enumerate(of_directions[0])
    ]
    for chosen in (projections, tuple(i for i in range(WEIGHTS) if i not in projections)):
        torch._foreach_copy_(
            [stacked[i][r] for r in range(len(reverse)) for i in chosen],
            [weights[i] for weights in of_directions for i in chosen],
        )
    conv_w, conv_b, x_proj, dt_proj, dt_bias, A_log, D = stacked
    masks = (sum(bool(bits & which) << r for r, bits in enumerate(reverse)) for which in (CONV_REVERSE, SCAN_REVERSE))
    A_RDN = A_log.exp_().neg_()
    return _Weights(conv_w.flatten(2), conv_b, x_proj, dt_proj, dt_bias, A_RDN, D, *masks)


def _matrices(bc_RME: Tensor, batch: int, length: int, state: int) -> Tensor:
    """B and C side by side, (R, batch * length, 2 * state), seen as (R, batch, 1, length, 2, state)."""
    return bc_RME.unflatten(1, (batch, length)).unflatten(-1, (2, state)).unsqueeze(2)


class _Activations(NamedTuple):
    """What the scan of every direction is fed, and dt, from which delta was made."""

    c_RBLD: Tensor
    dt_RMK: Tensor
    scan: scan.Scan


def _activations(xz_BLE: Tensor, weights: _Weights, z_RBDL: Tensor | None, scale: float) -> _Activations:
    batch, length, width = xz_BLE.shape
    dim, tokens, state = width // 2, batch * length, weights.A_RDN.shape[2]
    directions, _, rank = weights.dt_proj_RDK.shape
    x_BDL = xz_BLE[..., :dim].transpose(1, 2)
    c_RBLD = xz_BLE.new_empty(directions, batch, length, dim)
    conv.forward(
        x_BDL, weights.conv_RDW, weights.conv_bias_RD, c_RBLD.transpose(2, 3), True, weights.conv_reverse_mask
    )  # fmt: skip
    x_dbl_RME = torch.bmm(c_RBLD.view(directions, tokens, dim), weights.x_proj_RED.transpose(1, 2))
    dt_RMK = x_dbl_RME[..., :rank]
    delta_RBLD = torch.bmm(dt_RMK, weights.dt_proj_RDK.transpose(1, 2)).view(c_RBLD.shape)
    B_RBGNL, C_RBGNL = _matrices(x_dbl_RME[..., rank:], batch, length, state).permute(4, 0, 1, 2, 5, 3)
    inputs = scan.Scan(
        c_RBLD.transpose(2, 3), delta_RBLD.transpose(2, 3), weights.A_RDN, B_RBGNL, C_RBGNL, None, None, weights.D_RD,
        z_RBDL, weights.dt_bias_RD, 1, True, weights.scan_reverse_mask, scale,
    )  # fmt: skip
    return _Activations(c_RBLD, dt_RMK, inputs)


def _channels_last(xz_BLE: Tensor) -> Tensor:
    return xz_BLE if xz_BLE.stride(-1) == 1 else xz_BLE.contiguous()


def mixer_forward(
    xz_BLE: Tensor, weights: list[Tensor], reverse: list[int], scale: float, save_states: bool
) -> tuple[Tensor, Tensor]:
    """The mixed tokens (batch, length, dim) and the states (R, batch, chunks, dim, state), or (R, 0) if not saved."""
    xz_BLE = _channels_last(xz_BLE)
    a = _activations(xz_BLE, _stack(weights, reverse, xz_BLE.dtype), None, 1.0)
    y_RBLD = torch.empty_like(a.c_RBLD)
    _, states = scan.forward(a.scan, y_RBLD.transpose(2, 3), save_states)
    return gate.gate(y_RBLD, xz_BLE[..., xz_BLE.shape[-1] // 2 :], scale), states


def _weight_gradient(dout_RME: Tensor, input_RMD: Tensor, batch: int) -> Tensor:
    """dout^T input of each direction in float32: a product for each image, which fills the machine where one for all
    tokens of so small a matrix does not (for 16 images of 6085 tokens it took an H100 1.1 ms, a sixth of a training
    step of Vim-Ti for the 48 of them).
    """
    dout, inputs = (t.unflatten(1, (batch, -1)).flatten(0, 1) for t in (dout_RME, input_RMD))
    return torch.bmm(dout.transpose(1, 2), inputs).unflatten(0, (-1, batch)).sum(1, dtype=torch.float32)


def mixer_backward(
    dout_BLD: Tensor, xz_BLE: Tensor, flat: list[Tensor], reverse: list[int], states_RBKDN: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of xz and, direction after direction, of its seven weights."""
    xz_BLE, dout_BLD = _channels_last(xz_BLE), _channels_last(dout_BLD)
    batch, length, width = xz_BLE.shape
    dim, tokens, count = width // 2, batch * length, len(reverse)
    weights = _stack(flat, reverse, xz_BLE.dtype)
    z_RBDL = xz_BLE[..., dim:].transpose(1, 2).expand(count, -1, -1, -1)
    a = _activations(xz_BLE, weights, z_RBDL, scale)
    dc_RBLD, ddelta_RBLD, dz_RBLD = (torch.empty_like(a.c_RBLD) for _ in range(3))
    grads = scan.backward(
        a.scan, dout_BLD.transpose(1, 2).expand(count, -1, -1, -1), None, states_RBKDN,
        dc_RBLD.transpose(2, 3), ddelta_RBLD.transpose(2, 3), dz_RBLD.transpose(2, 3),
    )  # fmt: skip
    assert grads.dbc_PRBGSMN is not None
    assert grads.dD_RD is not None
    assert grads.dbias_RD is not None
    ddelta_RMD, c_RMD = ddelta_RBLD.view(count, tokens, dim), a.c_RBLD.view(count, tokens, dim)
    ddt_weight = _weight_gradient(ddelta_RMD, a.dt_RMK, batch)
    state, rank = weights.A_RDN.shape[2], weights.dt_proj_RDK.shape[2]
    dx_dbl_RME = c_RMD.new_empty(count, tokens, rank + 2 * state)
    dx_dbl_RME[..., :rank] = torch.bmm(ddelta_RMD, weights.dt_proj_RDK)
    pack.unpack(grads.dbc_PRBGSMN, _matrices(dx_dbl_RME[..., rank:], batch, length, state), weights.scan_reverse_mask)
    dx_weight = _weight_gradient(dx_dbl_RME, c_RMD, batch)
    dc_RBLD.view(count, tokens, dim).baddbmm_(dx_dbl_RME, weights.x_proj_RED)

    dxz_BLE = xz_BLE.new_empty(batch, length, width)
    dconv_weight, dconv_bias = conv.backward(
        dc_RBLD.transpose(2, 3), xz_BLE[..., :dim].transpose(1, 2), weights.conv_RDW, weights.conv_bias_RD,
        dxz_BLE[..., :dim].transpose(1, 2), True, weights.conv_reverse_mask,
    )  # fmt: skip
    torch.sum(dz_RBLD, 0, out=dxz_BLE[..., dim:])
    stacked = (
        dconv_weight.view(count, *flat[0].shape), dconv_bias, dx_weight, ddt_weight,
        grads.dbias_RD, grads.dA_RDN * weights.A_RDN, grads.dD_RD,
    )  # fmt: skip
    return dxz_BLE, [gradient[r] for r in range(count) for gradient in stacked]
