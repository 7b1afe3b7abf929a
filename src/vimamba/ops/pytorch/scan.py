"""The selective scan in vectorised PyTorch.

It goes through time in chunks. Within a chunk the decays exp(delta A) and the inputs delta B u of all its steps
are computed at once, time-major so that each step is one contiguous block of (batch, dim, state); the recurrence is
then one fused multiply-add on such a block for each step. No product of decays is ever formed, so nothing can
overflow that does not in the plain loop. Batches are taken in slices that keep a chunk within the cache.

Layout: T time within a chunk, G groups, P channels in a group (D = G P); the rest as in `backends.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.ops.arguments import widen
from vimamba.ops.sizes import CHUNK

_CACHED_ELEMENTS = {"cpu": 2**20}
_DEVICE_ELEMENTS = 2**26


class _Inputs(NamedTuple):
    """The scan's inputs for one slice of the batch, time-major and in the wide type."""

    u_LBD: Tensor
    raw_LBD: Tensor  # delta before the softplus
    delta_LBD: Tensor
    A_GPN: Tensor
    B: Tensor  # (L, B, G, 1, N) or constant (G, P, N)
    C: Tensor


def _time_major(matrix: Tensor, rows: slice, groups: int) -> Tensor:
    if matrix.dim() == 2:
        return matrix.reshape(groups, -1, matrix.shape[1])
    wide = widen(matrix[rows]).permute(3, 0, 1, 2).unsqueeze(3)
    return wide if groups == matrix.shape[1] else wide.repeat_interleave(groups // matrix.shape[1], dim=2)


def _groups(B: Tensor, C: Tensor) -> int:
    """The number of groups that serves both B and C."""
    return math.lcm(*(m.shape[1] for m in (B, C) if m.dim() == 4))


def _inputs(u, delta, A, B, C, delta_bias, delta_softplus: bool, rows: slice) -> _Inputs:
    groups = _groups(B, C)
    raw = widen(delta[rows]).permute(2, 0, 1)
    if delta_bias is not None:
        raw = raw + delta_bias
    steps = F.softplus(raw) if delta_softplus else raw
    A_GPN = A.reshape(groups, -1, A.shape[1])
    u_LBD = widen(u[rows]).permute(2, 0, 1)
    return _Inputs(u_LBD, raw, steps, A_GPN, _time_major(B, rows, groups), _time_major(C, rows, groups))


def _slices(batch: int, dim: int, state: int, device: torch.device) -> Iterator[slice]:
    budget = _CACHED_ELEMENTS.get(device.type, _DEVICE_ELEMENTS)
    size = max(1, budget // (CHUNK * dim * state))
    return (slice(i, min(i + size, batch)) for i in range(0, batch, size))


def _chunks(length: int, reverse: bool) -> list[slice]:
    """Stretches of at most CHUNK steps in the order of the recurrence."""
    if reverse:
        return [slice(max(hi - CHUNK, 0), hi) for hi in range(length, 0, -CHUNK)]
    return [slice(lo, min(lo + CHUNK, length)) for lo in range(0, length, CHUNK)]


def _at(matrix: Tensor, chunk: slice) -> Tensor:
    return matrix if matrix.dim() == 3 else matrix[chunk]


def _states(x: _Inputs, chunk: slice, h_BGPN: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The decays and states of every step of a chunk that starts from `h_BGPN`, and the state after it."""
    delta = x.delta_LBD[chunk].unflatten(2, x.A_GPN.shape[:2])
    delta_u = (x.delta_LBD[chunk] * x.u_LBD[chunk]).unflatten(2, x.A_GPN.shape[:2])
    decay_TBGPN = (delta[..., None] * x.A_GPN).exp_()
    h_TBGPN = delta_u[..., None] * _at(x.B, chunk)
    steps = list(zip(decay_TBGPN.unbind(0), h_TBGPN.unbind(0), strict=True))
    for decay, h in reversed(steps) if reverse else steps:
        h_BGPN = torch.addcmul(h, decay, h_BGPN, out=h)
    return decay_TBGPN, h_TBGPN, h_BGPN


def _contract_state(left_TBGPN: Tensor, right: Tensor) -> Tensor:
    """Sum over the state of a (T, B, G, P, N) with B or C: (T, B, D)."""
    if right.dim() == 3:
        return torch.einsum("tbgpn,gpn->tbgp", left_TBGPN, right).flatten(2)
    return torch.matmul(left_TBGPN, right.transpose(-1, -2)).squeeze(-1).flatten(2)


def _output(h_TBGPN: Tensor, C: Tensor, D: Tensor | None, u_TBD: Tensor) -> Tensor:
    y_TBD = _contract_state(h_TBGPN, C)
    return y_TBD if D is None else y_TBD.addcmul_(D, u_TBD)


def scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
    """See `vimamba.selective_scan`."""
    batch, dim, length = u.shape
    chunks = _chunks(length, reverse)
    out = torch.empty_like(u)
    last = A.new_zeros(batch, dim, A.shape[1])
    states = A.new_empty((batch, len(chunks), *A.shape) if save_states else 0)
    for rows in _slices(batch, dim, A.shape[1], u.device):
        x = _inputs(u, delta, A, B, C, delta_bias, delta_softplus, rows)
        h_BGPN = last[rows].unflatten(1, x.A_GPN.shape[:2])
        for k, chunk in enumerate(chunks):
            if save_states:
                states[rows, k] = h_BGPN.flatten(1, 2)
            _, h_TBGPN, h_BGPN = _states(x, chunk, h_BGPN, reverse)
            y_TBD = _output(h_TBGPN, _at(x.C, chunk), D, x.u_LBD[chunk])
            if z is not None:
                y_TBD *= F.silu(widen(z[rows, :, chunk])).permute(2, 0, 1)
            out[rows, :, chunk] = y_TBD.permute(1, 2, 0)
            # The chunk's states die here; the last one lives on as a copy that does not hold the whole chunk.
            h_BGPN = h_BGPN.clone()
        last[rows] = h_BGPN.flatten(1, 2)
    return out, last, states


def _adjoints(
    dy_TBD: Tensor, C: Tensor, decay_TBGPN: Tensor, carry_BGPN: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of every state of a chunk, from `carry_BGPN` that flows in after it, and what flows on before it."""
    g_TBGPN = dy_TBD.unflatten(2, decay_TBGPN.shape[2:4])[..., None] * C
    steps = list(zip(decay_TBGPN.unbind(0), g_TBGPN.unbind(0), strict=True))
    for decay, g in steps if reverse else reversed(steps):
        if carry_BGPN is not None:
            g += carry_BGPN
        carry_BGPN = decay * g
    assert carry_BGPN is not None
    return g_TBGPN, carry_BGPN


def _gate_gradient(dout_TBD: Tensor, y_TBD: Tensor, z_TBD: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and z, where out = y silu(z)."""
    gate = torch.sigmoid(z_TBD)
    return dout_TBD * z_TBD * gate, dout_TBD * y_TBD * gate * (1 + z_TBD * (1 - gate))


def scan_backward(dout, dlast, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
    """See `vimamba.selective_scan`."""
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
    dA, dD, dbias = torch.zeros_like(A), None if D is None else torch.zeros_like(D), A.new_zeros(A.shape[0])
    dB, dC = (torch.zeros_like(m, memory_format=torch.contiguous_format) for m in (B, C))
    chunks = list(enumerate(_chunks(u.shape[2], reverse)))
    for rows in _slices(u.shape[0], A.shape[0], A.shape[1], u.device):
        x = _inputs(u, delta, A, B, C, delta_bias, delta_softplus, rows)
        group = x.A_GPN.shape[:2]
        carry = None if dlast is None else dlast[rows].unflatten(1, group)
        for k, chunk in reversed(chunks):
            here = (rows, slice(None), chunk)
            start = states[rows, k].unflatten(1, group)
            decay_TBGPN, h_TBGPN, _ = _states(x, chunk, start, reverse)
            C_chunk, u_TBD, delta_TBD = _at(x.C, chunk), x.u_LBD[chunk], x.delta_LBD[chunk]
            dy_TBD = widen(dout[here]).permute(2, 0, 1)
            if z is not None and dz is not None:
                z_TBD = widen(z[here]).permute(2, 0, 1)
                dy_TBD, dz_TBD = _gate_gradient(dy_TBD, _output(h_TBGPN, C_chunk, D, u_TBD), z_TBD)
                dz[here] = dz_TBD.permute(1, 2, 0)
            g_TBGPN, carry = _adjoints(dy_TBD, C_chunk, decay_TBGPN, carry, reverse)
            before = [h_TBGPN[1:], start[None]] if reverse else [start[None], h_TBGPN[:-1]]
            q_TBGPN = torch.cat(before).mul_(decay_TBGPN).mul_(g_TBGPN)  # the gradient of delta A
            gB_TBD = _contract_state(g_TBGPN, _at(x.B, chunk))
            draw_TBD = _contract_state(q_TBGPN, x.A_GPN).addcmul_(gB_TBD, u_TBD)
            if delta_softplus:
                raw_TBD = x.raw_LBD[chunk]
                draw_TBD *= torch.where(raw_TBD > 20, 1.0, torch.sigmoid(raw_TBD))
            du_TBD = gB_TBD * delta_TBD
            if D is not None and dD is not None:
                du_TBD.addcmul_(D, dy_TBD)
                dD += (dy_TBD * u_TBD).sum((0, 1))
            du[here], ddelta[here] = du_TBD.permute(1, 2, 0), draw_TBD.permute(1, 2, 0)
            dbias += draw_TBD.sum((0, 1))
            dA += torch.einsum("tbgpn,tbgp->gpn", q_TBGPN, delta_TBD.unflatten(2, group)).flatten(0, 1)
            _add_matrix_grad(dB, g_TBGPN, (delta_TBD * u_TBD).unflatten(2, group), rows, chunk)
            _add_matrix_grad(dC, h_TBGPN, dy_TBD.unflatten(2, group), rows, chunk)
    return du, ddelta, dA, dB, dC, dD, dz, None if delta_bias is None else dbias


def _add_matrix_grad(grad: Tensor, left_TBGPN: Tensor, right_TBGP: Tensor, rows: slice, chunk: slice) -> None:
    """Write the gradient of a variable B or C for one chunk, or add to that of a constant one."""
    if grad.dim() == 2:
        grad += torch.einsum("tbgpn,tbgp->gpn", left_TBGPN, right_TBGP).flatten(0, 1)
        return
    per_group = torch.matmul(right_TBGP[..., None, :], left_TBGPN).squeeze(-2)
    per_group = per_group.unflatten(2, (grad.shape[1], -1)).sum(3)
    grad[rows, :, :, chunk] = per_group.permute(1, 2, 3, 0)
