"""The end of the mixer on the GPU: sum of the directions, scale and gate.

Layout: tokens x channels, channels contiguous; a program owns a flat block of the output. Parallel axis: elements.
Bytes for one element: R + 1 reads and 1 write. Operations: 1 MUFU.EX2, 1 MUFU.RCP, R + 3 FMUL and FADD.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimamba.ops.triton.elementwise import sigmoid

BLOCK = 1024


@triton.jit
def gate_kernel(
    y, z, out, total, dim, length, z_sb, z_sl, scale, DIRECTIONS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < total
    token, d = index // dim, index % dim
    gate = tl.load(z + (token // length) * z_sb + (token % length) * z_sl + d, mask=exists, other=0.0)
    gate = gate.to(tl.float32)
    value = tl.load(y + index, mask=exists, other=0.0).to(tl.float32)
    for r in tl.static_range(1, DIRECTIONS):
        value += tl.load(y + r * tl.cast(total, tl.int64) + index, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + index, (value * scale * gate * sigmoid(gate)).to(out.dtype.element_ty), mask=exists)


def gate(y_RBLD: Tensor, z_BLD: Tensor, scale: float) -> Tensor:
    """scale * sum(y) * silu(z), in y's type; y contiguous, z with contiguous channels."""
    directions, _, length, dim = y_RBLD.shape
    out = torch.empty_like(y_RBLD[0])
    total = out.numel()
    if total:
        with torch.cuda.device_of(out):
            gate_kernel[(triton.cdiv(total, BLOCK),)](
                y=y_RBLD, z=z_BLD, out=out, total=total, dim=dim, length=length, z_sb=z_BLD.stride(0),
                z_sl=z_BLD.stride(1), scale=scale, DIRECTIONS=directions, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return out
