"""Launching the selective scan: the backend functions `scan_forward` and `scan_backward`, and what the mixer shares.

Inside, a scan has a leading axis R of directions (1 for the public op): each with its own u, delta, B, C and weights,
run by one launch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vimamba.ops import sizes
from vimamba.ops.triton import pack, tiling
from vimamba.ops.triton.scan_backward import scan_backward_kernel
from vimamba.ops.triton.scan_forward import scan_forward_kernel
from vimamba.ops.triton.scan_segments import carry_kernel, segment_kernel

CARRY_BLOCK = 128
AHEAD = 2
"""Steps before which the forward scan loads u and delta: the latency of memory is 700 cycles, a step of a warp 270, and
more than one warp at work."""
CONTIGUOUS = 1
"""A stride that the kernels take at run time all the same: known to be 1, it would change how they are compiled."""
LANES_FIRST = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether this Triton's compiler spreads a tile over threads from its first axis; from 3.7 on it is the last."""


class Scan(NamedTuple):
    """The inputs of a scan over R directions; B and C either vary along the sequence or are constant (dim, state)."""

    u_RBDL: Tensor
    delta_RBDL: Tensor
    A_RDN: Tensor
    B_RBGNL: Tensor | None
    C_RBGNL: Tensor | None
    B_DN: Tensor | None
    C_DN: Tensor | None
    D_RD: Tensor | None
    z_RBDL: Tensor | None
    bias_RD: Tensor | None
    groups: int
    softplus: bool
    reverse_mask: int
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(directions, batch, dim, length, state)"""
        return *self.u_RBDL.shape, self.A_RDN.shape[-1]


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a machine of one for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def threads_of_warp(device: torch.device) -> int:
    """32, or 64 on AMD's data-centre cards."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """The kernels' x_sr, x_sb and x_sl of each (R, B, D, L) tensor x: of directions, batch and length; 0 if absent."""
    return {
        f"{name}_s{axis}": 0 if tensor is None else tensor.stride(i)
        for name, tensor in tensors.items()
        for axis, i in (("r", 0), ("b", 1), ("l", 3))
    }


def channels_last(tensor: Tensor | None) -> Tensor | None:
    """The same (batch, dim, length) with contiguous channels; copied if they are not."""
    if tensor is None or tensor.stride(1) == 1:
        return tensor
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def forward(scan: Scan, out_RBDL: Tensor, save_states: bool) -> tuple[Tensor, Tensor]:
    """Fill `out_RBDL`; the last state (R, batch, dim, state) and the states every `CHUNK` steps, or an empty tensor."""
    R, batch, dim, length, state = scan.sizes
    u = scan.u_RBDL
    n_states = sizes.chunks(length) if save_states else 0
    last = u.new_zeros((R, batch, dim, state), dtype=torch.float32)
    states = last.new_empty((R, batch, n_states, dim, state) if save_states else (R, 0))
    if u.numel() == 0:
        return last, states
    group_dim = dim // scan.groups
    tile = tiling.forward_tiling(R * batch, scan.groups, group_dim, length, state, processors(u.device))
    segments = tile.segments(length)
    blocks = triton.cdiv(group_dim, tile.lanes * tile.sets)
    bc = pack.pack(scan.B_RBGNL, scan.C_RBGNL, scan.groups, scan.reverse_mask)
    carry = last.new_empty((R, batch, segments, dim, state) if segments > 1 else (0,))
    decay = last.new_empty((R, batch, segments, dim) if segments > 1 else (0,))

    def run(chosen: int, summary: bool) -> None:
        """The first `chosen` segments."""
        save, has_z = (save_states, scan.z_RBDL is not None) if not summary else (False, False)
        scan_forward_kernel[(R * batch * chosen * scan.groups * blocks,)](
            u=u, delta=scan.delta_RBDL, z=scan.z_RBDL, out=out_RBDL, A=scan.A_RDN, bc=bc, B_const=scan.B_DN,
            C_const=scan.C_DN, D=scan.D_RD, bias=scan.bias_RD, states=states, carry=carry, decay=decay, last=last,
            **strides(u=u, delta=scan.delta_RBDL, z=scan.z_RBDL, out=out_RBDL), **_work(scan, group_dim, blocks),
            segments=chosen, n_segments=segments, segment_length=tile.segment, n_states=n_states,
            **_constants(scan) | {"HAS_Z": has_z}, BLOCK_N=tile.block_n, LANES=tile.lanes, SETS=tile.sets,
            UNROLL=tile.unroll, AHEAD=max(1, AHEAD // tile.unroll), CHUNK=sizes.CHUNK, HAS_D=scan.D_RD is not None,
            CONST_B=scan.B_DN is not None, CONST_C=scan.C_DN is not None,
            EVEN=group_dim % (tile.lanes * tile.sets) == 0, SAVE_STATES=save, HAS_CARRY=segments > 1 and not summary,
            SUMMARY=summary, num_warps=tile.warps(threads_of_warp(u.device)),
        )  # fmt: skip

    with torch.cuda.device_of(u):
        if segments > 1:
            run(segments - 1, summary=True)
            _pass_on(scan, carry, decay, None, forward=True)
        run(segments, summary=False)
    return last, states


def _work(scan: Scan, group_dim: int, blocks: int) -> dict[str, object]:
    """What a program finds its share by."""
    _, batch, _, length, _ = scan.sizes
    return {
        "channel_stride": CONTIGUOUS, "batch": batch, "groups": scan.groups, "group_dim": group_dim,
        "blocks_per_group": blocks, "length": length, "reverse_mask": scan.reverse_mask, "scale": scan.scale,
    }  # fmt: skip


def _constants(scan: Scan) -> dict[str, object]:
    return {
        "N": scan.A_RDN.shape[-1], "SOFTPLUS": scan.softplus, "HAS_Z": scan.z_RBDL is not None,
        "HAS_BIAS": scan.bias_RD is not None,
    }  # fmt: skip


def _tile(tile: tiling.BackwardTiling, group_dim: int) -> dict[str, object]:
    """The constants of the kernels that walk backwards."""
    return {
        "BLOCK_N": tile.block_n, "CHANNELS": tile.channels, "LANES": tile.lanes, "LANES_FIRST": LANES_FIRST,
        "UNROLL": tile.unroll, "EVEN": group_dim % (tile.channels * tile.lanes) == 0, "num_warps": 1,
    }  # fmt: skip


def _carries(
    scan: Scan, bc_RBGSMN: Tensor | None, tile: tiling.BackwardTiling, dout_RBDL: Tensor, dlast_RBDN: Tensor | None
) -> Tensor:
    """The gradient of the state that enters every segment at its end."""
    R, batch, dim, length, state = scan.sizes
    segments = tile.segments(length)
    group_dim = dim // scan.groups
    blocks = triton.cdiv(group_dim, tile.channels * tile.lanes)
    summary = dout_RBDL.new_empty((R, batch, segments, dim, state), dtype=torch.float32)
    decay = summary.new_empty((R, batch, segments, dim))
    segment_kernel[(R * batch * (segments - 1) * scan.groups * blocks,)](
        dout=dout_RBDL, delta=scan.delta_RBDL, z=scan.z_RBDL, A=scan.A_RDN, bc=bc_RBGSMN, C_const=scan.C_DN,
        bias=scan.bias_RD, summary=summary, decay=decay,
        **strides(dout=dout_RBDL, delta=scan.delta_RBDL, z=scan.z_RBDL),
        **_work(scan, group_dim, blocks), state_stride=CONTIGUOUS, n_segments=segments, segment_length=tile.segment,
        **_constants(scan), **_tile(tile, group_dim), CONST_C=scan.C_DN is not None,
    )  # fmt: skip
    _pass_on(scan, summary, decay, dlast_RBDN, forward=False)
    return summary


def _pass_on(scan: Scan, summary_RBSDN: Tensor, decay_RBSD: Tensor, initial_RBDN: Tensor | None, forward: bool) -> None:
    """Replace the segments' summaries with what enters them, from the first or from the last."""
    _, batch, segments, dim, state = summary_RBSDN.shape
    total = summary_RBSDN[:, :, 0].numel()
    carry_kernel[(triton.cdiv(total, CARRY_BLOCK),)](
        summary=summary_RBSDN, decay=decay_RBSD, A=scan.A_RDN, initial=initial_RBDN, total=total,
        state_size=dim * state, n_segments=segments, batch=batch, N=state, BLOCK=CARRY_BLOCK,
        HAS_INITIAL=initial_RBDN is not None, FORWARD=forward, num_warps=4,
    )  # fmt: skip


class Gradients(NamedTuple):
    """Of a scan's inputs; those of the weights in float32, None where the input was None."""

    dbc_PRBGSMN: Tensor | None
    """In parts to be summed, each packed (see `pack`)."""
    dA_RDN: Tensor
    dB_DN: Tensor | None
    dC_DN: Tensor | None
    dD_RD: Tensor | None
    dbias_RD: Tensor | None


def backward(
    scan: Scan,
    dout_RBDL: Tensor,
    dlast_RBDN: Tensor | None,
    states_RBKDN: Tensor,
    du_RBDL: Tensor,
    ddelta_RBDL: Tensor,
    dz_RBDL: Tensor | None,
) -> Gradients:
    """Fill `du_RBDL`, `ddelta_RBDL` and `dz_RBDL`; the other gradients."""
    R, batch, dim, length, state = scan.sizes
    u = scan.u_RBDL
    group_dim = dim // scan.groups
    tile = tiling.backward_tiling(R * batch, scan.groups, group_dim, length, state, processors(u.device))
    segments = tile.segments(length)
    blocks = triton.cdiv(group_dim, tile.channels * tile.lanes)
    programs = R * batch * segments * scan.groups * blocks
    make = torch.empty if u.numel() else torch.zeros

    def partial(present: bool, *tail: int) -> Tensor | None:
        shape = (R, batch, segments, dim, *tail)
        return make(shape, dtype=torch.float32, device=u.device) if present else None

    dA, dD, dbias = partial(True, state), partial(scan.D_RD is not None), partial(scan.bias_RD is not None)
    dB, dC = partial(scan.B_DN is not None, state), partial(scan.C_DN is not None, state)
    # The blocks of a group add to one row of dB and dC: by atomics, in any order, or each to a part of its own.
    atomic = blocks > 1 and not torch.are_deterministic_algorithms_enabled()
    bc, dbc = pack.pack(scan.B_RBGNL, scan.C_RBGNL, scan.groups, scan.reverse_mask), None
    if bc is not None:
        dbc = bc.new_zeros(1, *bc.shape) if atomic else bc.new_empty(blocks, *bc.shape)
    if u.numel():
        scratch = u.new_empty(
            programs * (sizes.CHUNK // tile.unroll) * tile.channels * tile.lanes * tile.block_n, dtype=torch.float32
        )
        with torch.cuda.device_of(u):
            carry = dlast_RBDN if segments == 1 else _carries(scan, bc, tile, dout_RBDL, dlast_RBDN)
            scan_backward_kernel[(programs,)](
                u=u, delta=scan.delta_RBDL, z=scan.z_RBDL, dout=dout_RBDL, A=scan.A_RDN, bc=bc, B_const=scan.B_DN,
                C_const=scan.C_DN, D=scan.D_RD, bias=scan.bias_RD, states=states_RBKDN, carry=carry, scratch=scratch,
                du=du_RBDL, ddelta=ddelta_RBDL, dz=dz_RBDL, dA=dA, dbc=dbc, dB_const=dB, dC_const=dC, dD=dD,
                dbias=dbias,
                **strides(u=u, delta=scan.delta_RBDL, z=scan.z_RBDL, dout=dout_RBDL),
                **strides(du=du_RBDL, ddelta=ddelta_RBDL, dz=dz_RBDL),
                **_work(scan, group_dim, blocks), state_stride=CONTIGUOUS, n_segments=segments,
                segment_length=tile.segment, n_states=states_RBKDN.shape[2],
                dbc_part=0 if dbc is None else dbc.stride(0),
                **_constants(scan), **_tile(tile, group_dim), CHUNK=sizes.CHUNK, HAS_D=dD is not None,
                CONST_B=dB is not None, CONST_C=dC is not None, HAS_CARRY=carry is not None, ATOMIC=atomic,
            )  # fmt: skip

    def total(parts: Tensor | None) -> Tensor | None:
        return None if parts is None else parts.sum((1, 2))

    dA_RDN = total(dA)
    assert dA_RDN is not None
    dB_DN, dC_DN = (None if m is None else m.sum((0, 1, 2)) for m in (dB, dC))
    return Gradients(dbc, dA_RDN, dB_DN, dC_DN, total(dD), total(dbias))


def _single(
    u_BDL: Tensor, delta_BDL: Tensor, A_DN: Tensor, B: Tensor, C: Tensor, D_D: Tensor | None, z_BDL: Tensor | None,
    bias_D: Tensor | None, softplus: bool, reverse: bool,
) -> Scan:  # fmt: skip
    """The arguments of the public op as a scan of one direction."""
    B_own, C_own = (None if m.dim() == 2 else m[None] for m in (B, C))
    groups = math.lcm(*(m.shape[2] for m in (B_own, C_own) if m is not None))
    u, delta, z = (channels_last(t) for t in (u_BDL, delta_BDL, z_BDL))
    assert u is not None
    assert delta is not None
    return Scan(
        u[None], delta[None], A_DN[None].contiguous(), B_own, C_own,
        B.contiguous() if B.dim() == 2 else None, C.contiguous() if C.dim() == 2 else None,
        None if D_D is None else D_D[None].contiguous(), None if z is None else z[None],
        None if bias_D is None else bias_D[None].contiguous(), groups, softplus, int(reverse), 1.0,
    )  # fmt: skip


def _like(inside_RBDL: Tensor, given_BDL: Tensor) -> Tensor:
    """The kernel's result in the layout of the tensor that the caller gave."""
    result = inside_RBDL[0]
    return result if given_BDL.stride(1) == 1 else torch.empty_like(given_BDL).copy_(result)


def scan_forward(
    u_BDL: Tensor, delta_BDL: Tensor, A_DN: Tensor, B: Tensor, C: Tensor, D_D: Tensor | None, z_BDL: Tensor | None,
    delta_bias_D: Tensor | None, delta_softplus: bool, reverse: bool, save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the last state and the states before every chunk; see `vimamba.selective_scan`."""
    scan = _single(u_BDL, delta_BDL, A_DN, B, C, D_D, z_BDL, delta_bias_D, delta_softplus, reverse)
    out_RBDL = torch.empty_like(scan.u_RBDL)
    last, states = forward(scan, out_RBDL, save_states)
    return _like(out_RBDL, u_BDL), last[0], states[0]


def scan_backward(
    dout_BDL: Tensor, dlast_BDN: Tensor | None, u_BDL: Tensor, delta_BDL: Tensor, A_DN: Tensor, B: Tensor, C: Tensor,
    D_D: Tensor | None, z_BDL: Tensor | None, delta_bias_D: Tensor | None, states_BKDN: Tensor, delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z and delta_bias."""
    scan = _single(u_BDL, delta_BDL, A_DN, B, C, D_D, z_BDL, delta_bias_D, delta_softplus, reverse)
    du, ddelta = torch.empty_like(scan.u_RBDL), torch.empty_like(scan.delta_RBDL)
    dz = None if scan.z_RBDL is None else torch.empty_like(scan.z_RBDL)
    dlast = None if dlast_BDN is None else dlast_BDN[None].float().contiguous()
    dout = channels_last(dout_BDL)
    assert dout is not None
    grads = backward(scan, dout[None], dlast, states_BKDN[None].contiguous(), du, ddelta, dz)
    dB, dC = _matrix_gradients(grads, B, C, scan)
    return (
        _like(du, u_BDL), _like(ddelta, delta_BDL), grads.dA_RDN[0], dB, dC,
        None if grads.dD_RD is None else grads.dD_RD[0],
        None if dz is None or z_BDL is None else _like(dz, z_BDL),
        None if grads.dbias_RD is None else grads.dbias_RD[0],
    )  # fmt: skip


def _matrix_gradients(grads: Gradients, B: Tensor, C: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
    """The gradients of B and C in their own shapes and types."""
    found = [grads.dB_DN, grads.dC_DN]
    if grads.dbc_PRBGSMN is not None:
        _, batch, _, length, state = scan.sizes
        direct = B.dtype == C.dtype and B.dim() == C.dim() and B.shape[1] == C.shape[1]
        both_RBGLMN = B.new_empty(
            (1, batch, scan.groups, length, 2, state), dtype=B.dtype if direct else torch.float32
        )  # fmt: skip
        pack.unpack(grads.dbc_PRBGSMN, both_RBGLMN, scan.reverse_mask)
        for index, matrix in enumerate((B, C)):
            if matrix.dim() == 4:
                own_BGLN = both_RBGLMN[0, ..., index, :]
                if matrix.shape[1] != scan.groups:
                    own_BGLN = own_BGLN.unflatten(1, (matrix.shape[1], -1)).sum(2)
                found[index] = own_BGLN.transpose(2, 3).to(matrix.dtype)
    dB, dC = found
    assert dB is not None
    assert dC is not None
    return dB, dC
