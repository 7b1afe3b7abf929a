"""Depthwise causal convolution and SiLU on the GPU, for one or more directions that read the same input.

Layout: channels contiguous. Forward: a program owns a tile of ROWS tokens x BLOCK channels for all directions; x comes
from memory once and its shifted copies from L1. Backward: a program walks ROWS tokens of BLOCK channels with the
last W inputs and gradients in registers, so that each row is read once and the pre-activation recomputed once.
Parallel axis: tiles of tokens x channel blocks x batch.
Bytes for one element: forward 1 read and R writes, backward 1 + R reads and 1 write.
Operations for one element and direction: W FFMA and 2 MUFU forward, 3 W FFMA and 2 MUFU backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimamba.ops.triton.elementwise import both, sigmoid

BLOCK = 128
FORWARD_ROWS = 16
BACKWARD_ROWS = 32


@triton.jit
def conv_forward_kernel(
    x, weight, bias, y,
    x_sb, x_sd, x_sl, y_sr, y_sb, y_sd, y_sl, length, dim, n_tiles, n_blocks,
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    d = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    t = ((pid // n_blocks) % n_tiles) * ROWS + tl.arange(0, ROWS)
    b = (pid // (n_blocks * n_tiles)).to(tl.int64)
    exists = d < dim
    x_columns = x + b * x_sb + d.to(tl.int64)[None, :] * x_sd
    y_columns = y + b * y_sb + d.to(tl.int64)[None, :] * y_sd
    for r in tl.static_range(DIRECTIONS):
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + r * dim + d, mask=exists, other=0.0)[None, :]
        for w in tl.static_range(WIDTH):
            if (REVERSE_MASK >> r) & 1:
                source = t + (WIDTH - 1 - w)
            else:
                source = t - (WIDTH - 1 - w)
            tap = tl.load(weight + (r * dim + d) * WIDTH + w, mask=exists, other=0.0)
            mask = (source >= 0)[:, None] & (source < length)[:, None] & exists[None, :]
            value = tl.load(x_columns + source.to(tl.int64)[:, None] * x_sl, mask=mask, other=0.0)
            total += tap[None, :] * value.to(tl.float32)
        if SILU:
            total = total * sigmoid(total)
        here = y_columns + r * y_sr + t.to(tl.int64)[:, None] * y_sl
        tl.store(here, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & exists[None, :])


@triton.jit
def shifted(window, value, SIZE: tl.constexpr):
    """The window of the last SIZE values, without its oldest and with `value`."""
    moved = ()
    for k in tl.static_range(SIZE - 1):
        moved = moved + (window[k + 1],)
    return moved + (value,)


@triton.jit
def weighted(window, taps, SIZE: tl.constexpr, FLIP: tl.constexpr):
    """The sum of a window's values by `taps`, the last of them on the newest value, or with FLIP on the oldest."""
    total = window[0] * taps[SIZE - 1 if FLIP else 0]
    for k in tl.static_range(1, SIZE):
        total += window[k] * taps[SIZE - 1 - k if FLIP else k]
    return total


@triton.jit
def conv_backward_kernel(
    dy, x, weight, bias, dx, parts,
    dy_sr, dy_sb, dy_sd, dy_sl, x_sb, x_sd, x_sl, dx_sb, dx_sd, dx_sl, length, dim, n_tiles, n_blocks,
    DIRECTIONS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    d = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    begin = ((pid // n_blocks) % n_tiles) * ROWS
    b = (pid // (n_blocks * n_tiles)).to(tl.int64)
    exists = d < dim
    d64 = d.to(tl.int64)
    x_columns, dx_columns = x + b * x_sb + d64 * x_sd, dx + b * dx_sb + d64 * dx_sd
    dy_columns = dy + b * dy_sb + d64 * dy_sd
    zero = tl.zeros([BLOCK], tl.float32)

    window = ()
    for k in tl.static_range(WIDTH):
        source = begin - WIDTH + k
        row = x_columns + tl.cast(source, tl.int64) * x_sl
        window = window + (
            tl.load(row, mask=both(exists, (source >= 0) & (source < length)), other=0.0).to(tl.float32),
        )
    taps = ()
    gradients = ()
    sums = ()
    for r in tl.static_range(DIRECTIONS):
        taps_r = ()
        none = ()
        for w in tl.static_range(WIDTH):
            taps_r = taps_r + (tl.load(weight + (r * dim + d) * WIDTH + w, mask=exists, other=0.0),)
            none = none + (zero,)
        taps = taps + (taps_r,)
        gradients = gradients + (none,)
        sums = sums + (none + (zero,),)

    # At token i a later-looking direction is ready for the gradient of token i - (W - 1) too.
    for i in range(begin, begin + ROWS + WIDTH - 1):
        row = x_columns + tl.cast(i, tl.int64) * x_sl
        window = shifted(window, tl.load(row, mask=both(exists, i < length), other=0.0).to(tl.float32), WIDTH)
        emitted = i - (WIDTH - 1)
        total = zero
        new_gradients = ()
        new_sums = ()
        for r in tl.static_range(DIRECTIONS):
            at = emitted if (REVERSE_MASK >> r) & 1 else i
            inside = (at >= 0) & (at < length)
            here = dy_columns + r * dy_sr + tl.cast(at, tl.int64) * dy_sl
            gradient = tl.load(here, mask=both(exists, inside), other=0.0).to(tl.float32)
            if SILU:
                before = weighted(window, taps[r], WIDTH, (REVERSE_MASK >> r) & 1)
                if HAS_BIAS:
                    before += tl.load(bias + r * dim + d, mask=exists, other=0.0)
                s = sigmoid(before)
                # Outside the sequence the gradient is 0, whatever the window holds there.
                gradient = tl.where(inside, gradient * s * (1.0 + before * (1.0 - s)), 0.0)
            gradients_r = shifted(gradients[r], gradient, WIDTH)
            total += weighted(gradients_r, taps[r], WIDTH, 1 - ((REVERSE_MASK >> r) & 1))
            new_gradients = new_gradients + (gradients_r,)
            counted = tl.where((at >= begin) & (at < begin + ROWS), gradient, 0.0)
            sums_r = ()
            for w in tl.static_range(WIDTH):
                sums_r = sums_r + (sums[r][w] + counted * window[WIDTH - 1 - w if (REVERSE_MASK >> r) & 1 else w],)
            new_sums = new_sums + (sums_r + (sums[r][WIDTH] + counted,),)
        gradients = new_gradients
        sums = new_sums
        mask = both(exists, (emitted >= begin) & (emitted < length))
        tl.store(dx_columns + tl.cast(emitted, tl.int64) * dx_sl, total.to(dx.dtype.element_ty), mask=mask)

    part = parts + (pid // n_blocks).to(tl.int64) * (DIRECTIONS * (WIDTH + 1)) * dim
    for r in tl.static_range(DIRECTIONS):
        for w in tl.static_range(WIDTH + 1):
            tl.store(part + (r * (WIDTH + 1) + w) * dim + d, sums[r][w], mask=exists)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The kernels' strides of each (B, D, L) or (R, B, D, L) tensor x: x_sr, x_sb, x_sd and x_sl."""
    return {
        f"{name}_s{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("rbdl"[-tensor.dim() :], tensor.stride(), strict=True)
    }


def forward(
    x_BDL: Tensor, weight_RDW: Tensor, bias_RD: Tensor | None, y_RBDL: Tensor, silu: bool, reverse_mask: int
) -> None:
    """Fill `y_RBDL` with the convolution of `x_BDL` by every direction's weights."""
    batch, dim, length = x_BDL.shape
    if x_BDL.numel() == 0:
        return
    tiles, blocks = triton.cdiv(length, FORWARD_ROWS), triton.cdiv(dim, BLOCK)
    with torch.cuda.device_of(x_BDL):
        conv_forward_kernel[(batch * tiles * blocks,)](
            x=x_BDL, weight=weight_RDW, bias=bias_RD, y=y_RBDL, **_strides(x=x_BDL, y=y_RBDL),
            length=length, dim=dim, n_tiles=tiles, n_blocks=blocks,
            DIRECTIONS=weight_RDW.shape[0], WIDTH=weight_RDW.shape[2], ROWS=FORWARD_ROWS, BLOCK=BLOCK,
            REVERSE_MASK=reverse_mask, HAS_BIAS=bias_RD is not None, SILU=silu, num_warps=4,
        )  # fmt: skip


def backward(
    dy_RBDL: Tensor, x_BDL: Tensor, weight_RDW: Tensor, bias_RD: Tensor | None, dx_BDL: Tensor, silu: bool,
    reverse_mask: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `dx_BDL`, the sum over directions; the gradients of the weights (R, dim, width) and biases (R, dim)."""
    batch, dim, length = x_BDL.shape
    directions, _, width = weight_RDW.shape
    if x_BDL.numel() == 0:
        return torch.zeros_like(weight_RDW), weight_RDW.new_zeros(directions, dim)
    tiles, blocks = triton.cdiv(length, BACKWARD_ROWS), triton.cdiv(dim, BLOCK)
    parts = x_BDL.new_empty((batch * tiles, directions, width + 1, dim), dtype=torch.float32)
    with torch.cuda.device_of(x_BDL):
        conv_backward_kernel[(batch * tiles * blocks,)](
            dy=dy_RBDL, x=x_BDL, weight=weight_RDW, bias=bias_RD, dx=dx_BDL, parts=parts,
            **_strides(dy=dy_RBDL, x=x_BDL, dx=dx_BDL), length=length, dim=dim, n_tiles=tiles, n_blocks=blocks,
            DIRECTIONS=directions, WIDTH=width, ROWS=BACKWARD_ROWS, BLOCK=BLOCK,
            REVERSE_MASK=reverse_mask, HAS_BIAS=bias_RD is not None, SILU=silu, num_warps=1,
        )  # fmt: skip
    sums_RWD = parts.sum(0)
    return sums_RWD[:, :-1].transpose(1, 2).contiguous(), sums_RWD[:, -1].contiguous()


def conv_forward(x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """The convolution along the last axis; see `vimamba.causal_conv1d`."""
    y_BDL = torch.empty_like(x_BDL)
    bias = None if bias_D is None else bias_D[None].contiguous()
    forward(x_BDL, weight_DW[None].contiguous(), bias, y_BDL[None], silu, int(reverse))
    return y_BDL


def conv_backward(
    dy_BDL: Tensor, x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, the weight and the bias."""
    dx_BDL = torch.empty_like(x_BDL)
    bias = None if bias_D is None else bias_D[None].contiguous()
    dweight, dbias = backward(
        dy_BDL[None], x_BDL, weight_DW[None].contiguous(), bias, dx_BDL, silu, int(reverse)
    )  # fmt: skip
    return dx_BDL, dweight[0], None if bias_D is None else dbias[0]
