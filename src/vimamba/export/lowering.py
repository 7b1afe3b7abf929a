"""The operators vimamba::* as PyTorch code of which torch.onnx knows every step.

Layouts: B batch, L length, D dim, N state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from vimamba.ops.direction import Direction, directions_of

STANDARD_OPSET = 27
"""The first with LinearAttention."""

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""u (B, L, D), delta (B, L, D), A (D, N), B and C (B, L, N) to the states read by C, (B, L, D)."""


def steps(u_BLD: Tensor, delta_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor) -> Tensor:
    """The scan in standard operators: a loop over the steps, of which nothing but the outputs leaves the cache.

    Channels are the last axis, along which every operator in the loop is vectorised: with (D, N) it takes twice as
    long, and larger steps, or decays computed before the loop, take longer too.
    """

    def step(h_BND: Tensor, v_B1D: Tensor, delta_B1D: Tensor, B_BN1: Tensor, C_B1N: Tensor, A_ND: Tensor) -> Any:
        h_BND = h_BND * (delta_B1D * A_ND).exp() + v_B1D * B_BN1
        return h_BND, C_B1N @ h_BND

    (batch, _, dim), state = u_BLD.shape, A_DN.shape[1]
    v_LB1D, delta_LB1D, C_LB1N = (x.transpose(0, 1)[:, :, None] for x in (delta_BLD * u_BLD, delta_BLD, C_BLN))
    B_LBN1 = B_BLN.transpose(0, 1)[..., None]
    start = u_BLD.new_zeros(batch, state, dim)
    _, y_LB1D = scan_op(step, [start], [v_LB1D, delta_LB1D, B_LBN1, C_LB1N], [A_DN.T])
    return y_LB1D[:, :, 0].transpose(0, 1)


def linear_attention(u_BLD: Tensor, delta_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor) -> Tensor:
    """The scan by ONNX Runtime's LinearAttention with the update rule "gated": every channel is a head that decays."""
    return _gated("com.microsoft::LinearAttention", 1, C_BLN, B_BLN, 1, u_BLD, delta_BLD, A_DN)


def standard_attention(u_BLD: Tensor, delta_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor) -> Tensor:
    """The same by the operator that opset 27 has, of which every head has a query and a key of its own."""
    dim = A_DN.shape[0]
    query_BLM, key_BLM = (x_BLN.repeat(1, 1, dim) for x_BLN in (C_BLN, B_BLN))
    return _gated("::LinearAttention", None, query_BLM, key_BLM, dim, u_BLD, delta_BLD, A_DN)


def _gated(
    operator: str,
    version: int | None,
    query: Tensor,
    key: Tensor,
    heads: int,
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
) -> Tensor:
    batch, _, dim = u_BLD.shape
    decay = (delta_BLD[..., None] * A_DN).flatten(2)
    return torch.onnx.ops.symbolic_multi_out(
        operator, (query, key, delta_BLD * u_BLD, None, decay),
        {"q_num_heads": heads, "kv_num_heads": dim, "scale": 1.0, "update_rule": "gated"},
        dtypes=(u_BLD.dtype,) * 2, shapes=(u_BLD.shape, (batch, dim, A_DN.shape[1], 1)), version=version,
    )[0]  # fmt: skip


def unfused(scan: Scan) -> Callable[..., Any]:
    """The mixer in operators of the runtime's, around a scan."""

    def mixer(xz_BLE, weights, reverse, scale, gates, save_states, backend):
        x_BLD, z_BLD = xz_BLE.chunk(2, dim=-1)
        total = None
        for r, direction in enumerate(directions_of(weights, reverse)):
            y = _one_direction(scan, x_BLD, direction)
            y = y if gates is None else y * gates[..., r : r + 1]
            total = y if total is None else total + y
        assert total is not None
        return (total if scale == 1.0 else total * scale) * F.silu(z_BLD), xz_BLE.new_empty(0)

    return mixer


def fused_mixer(xz_BLE, weights, reverse, scale, gates, save_states, backend):
    """The operator that `vimamba.onnx_library()` has for ONNX Runtime."""
    batch, length, width = xz_BLE.shape
    mixed_BLD = torch.onnx.ops.symbolic(
        "vimamba::Mixer", (xz_BLE, gates, *weights), {"reverse": [*reverse], "scale": float(scale)},
        dtype=xz_BLE.dtype, shape=(batch, length, width // 2), version=1,
    )  # fmt: skip
    return mixed_BLD, xz_BLE.new_empty(0)


class Lowering(NamedTuple):
    """What stands in a graph for a mixer, and the opset of the default domain."""

    mixer: Callable[..., Any]
    opset: int

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        """For `torch.export.ExportedProgram.run_decompositions`: the operators that a model's graph has."""
        return {
            torch.ops.vimamba.mixer.default: self.mixer, torch.ops.vimamba.rms_norm.default: _rms_norm,
            torch.ops.aten.adaptive_avg_pool2d.default: _pool, torch.ops.aten._adaptive_avg_pool2d.default: _pool,
        }  # fmt: skip


LOWERINGS = {
    "stock": Lowering(unfused(steps), 21),
    "vimamba": Lowering(fused_mixer, 21),
    "microsoft": Lowering(unfused(linear_attention), 21),
    "standard": Lowering(unfused(standard_attention), STANDARD_OPSET),
    "portable": Lowering(unfused(steps), 18),
}


def _one_direction(scan: Scan, x_BLD: Tensor, direction: Direction) -> Tensor:
    """Convolution, projections and scan; where it runs backwards the sequence is turned once, and turned back."""
    turned = direction.conv_reverse and direction.scan_reverse
    c_BLD = _conv(x_BLD.flip(1) if turned else x_BLD, direction, direction.conv_reverse and not turned)
    if direction.scan_reverse and not turned:
        c_BLD = c_BLD.flip(1)
    rank, state = direction.dt_proj_weight.shape[1], direction.A_log.shape[1]
    dt_BLR, B_BLN, C_BLN = F.linear(c_BLD, direction.x_proj_weight).split([rank, state, state], dim=-1)
    delta_BLD = _softplus(F.linear(dt_BLR, direction.dt_proj_weight, direction.dt_bias))
    y_BLD = scan(c_BLD, delta_BLD, direction.decay_rates, B_BLN, C_BLN) + direction.D * c_BLD
    return y_BLD.flip(1) if direction.scan_reverse else y_BLD


def _conv(x_BLD: Tensor, direction: Direction, reverse: bool) -> Tensor:
    """The causal convolution and SiLU; (B, L, D)."""
    weight_D1W = direction.conv_weight.flatten(1)[:, None]
    dim, _, width = weight_D1W.shape
    padded = F.pad(x_BLD.transpose(1, 2), (0, width - 1) if reverse else (width - 1, 0))
    weight_D1W = weight_D1W.flip(-1) if reverse else weight_D1W
    return F.silu(F.conv1d(padded, weight_D1W, direction.conv_bias, groups=dim)).transpose(1, 2)


def _softplus(x: Tensor) -> Tensor:
    """max(x, 0) + log(1 + w) with w = exp(-|x|): ONNX Runtime vectorises these, and not its Softplus.

    What 1 + w loses of a small w is put back, to the last bits of float32.
    """
    w = (-x.abs()).exp()
    more_than_one = 1 + w
    return x.relu() + (more_than_one.log() - (more_than_one - 1 - w))


def _pool(x_BCHW: Tensor, size: list[int]) -> Tensor:
    """Adaptive average pooling as two products with matrices of shares: torch.onnx's takes the size of the example."""
    rows, columns = (_shares(x_BCHW.shape[axis], count) for axis, count in zip((2, 3), size, strict=True))
    return rows @ x_BCHW @ columns.T


def _shares(length: Any, count: int) -> Tensor:
    """What each of so many parts of an axis takes from each place, (count, length)."""
    part, place = torch.arange(count)[:, None], torch.arange(length)
    begin, end = part * length // count, ((part + 1) * length + count - 1) // count
    inside = ((place >= begin) & (place < end)).float()
    return inside / inside.sum(1, keepdim=True)


def _rms_norm(x, weight, residual, eps, out_dtype, backend):
    total = x if residual is None else x + residual
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * rstd * weight, total, rstd[..., 0]
