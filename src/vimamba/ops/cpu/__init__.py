"""The backend "cpu": C++ kernels behind the operators vimamba_cpu.*.

The kernels of scan and convolution take activations of any strides. The operators of the forward passes allocate their
outputs; for those of the backward passes this file does, and sums partial gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vimamba.ops.backends import Backend
from vimamba.ops.block_weights import BlockWeights, flat_blocks
from vimamba.ops.cpu import library
from vimamba.ops.pytorch import conv

_FEW_ROWS = 16
"""Fewer rows are not worth packing the weight of a linear layer for (benchmarks/linear.py)."""


class CPU(Backend):
    """The kernels in the instruction set that `library` has chosen."""

    name = "cpu"
    skips_closed_gates = True
    fuses_blocks = True

    def __str__(self) -> str:
        return f"{self.name} ({library.instruction_set()})"

    def unavailable(self, device: torch.device | None = None) -> str | None:
        if device is not None and device.type != "cpu":
            return f"the CPU kernels take CPU tensors, not {device.type}"
        return library.UNAVAILABLE

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.bfloat16)

    def scan_forward(self, *arguments):
        return torch.ops.vimamba_cpu.scan_forward(*arguments)

    def scan_backward(
        self,
        dout_BDL: Tensor,
        dlast_BDN: Tensor | None,
        u_BDL: Tensor,
        delta_BDL: Tensor,
        A_DN: Tensor,
        B: Tensor,
        C: Tensor,
        D_D: Tensor | None,
        z_BDL: Tensor | None,
        delta_bias_D: Tensor | None,
        states_BKDN: Tensor,
        delta_softplus: bool,
        reverse: bool,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of u, delta, A, B, C, D, z and delta_bias; None where the input was None."""
        batch, dim, _ = u_BDL.shape
        parts = torch.ops.vimamba_cpu.scan_backward_parts(u_BDL, B, C)
        du_BDL, ddelta_BDL = torch.empty_like(u_BDL), torch.empty_like(delta_BDL)
        dz_BDL = None if z_BDL is None else torch.empty_like(z_BDL)
        dA_BDN = A_DN.new_empty(batch, *A_DN.shape)
        dB, dC = (_projection_gradient(x, batch, parts) for x in (B, C))
        dD_BD = None if D_D is None else D_D.new_empty(batch, dim)
        dbias_BD = None if delta_bias_D is None else delta_bias_D.new_empty(batch, dim)
        torch.ops.vimamba_cpu.scan_backward(
            *(dout_BDL, _contiguous(dlast_BDN)),
            *(u_BDL, delta_BDL, A_DN, B, C, D_D, z_BDL, delta_bias_D),
            *(states_BKDN.contiguous(), delta_softplus, reverse, parts),
            *(du_BDL, ddelta_BDL, dA_BDN, dB, dC, dD_BD, dz_BDL, dbias_BD),
        )
        return (
            du_BDL,
            ddelta_BDL,
            dA_BDN.sum(0),
            _sum_projection_gradient(dB, B),
            _sum_projection_gradient(dC, C),
            None if dD_BD is None else dD_BD.sum(0),
            dz_BDL,
            None if dbias_BD is None else dbias_BD.sum(0),
        )

    def conv_forward(
        self, x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool
    ) -> Tensor:
        if weight_DW.shape[1] > torch.ops.vimamba_cpu.max_width():
            return conv.conv_forward(x_BDL, weight_DW, bias_D, silu, reverse)
        return torch.ops.vimamba_cpu.conv_forward(x_BDL, weight_DW, bias_D, silu, reverse)

    def conv_backward(
        self, dy_BDL: Tensor, x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of x, the weight and the bias."""
        if weight_DW.shape[1] > torch.ops.vimamba_cpu.max_width():
            return conv.conv_backward(dy_BDL, x_BDL, weight_DW, bias_D, silu, reverse)
        dx_BDL = torch.empty_like(x_BDL)
        parts = torch.get_num_threads()
        dweight_SDW = weight_DW.new_zeros(parts, *weight_DW.shape)
        dbias_SD = None if bias_D is None else bias_D.new_zeros(parts, *bias_D.shape)
        torch.ops.vimamba_cpu.conv_backward(
            *(dy_BDL, x_BDL, weight_DW.contiguous(), _contiguous(bias_D), silu, reverse),
            *(dx_BDL, dweight_SDW, dbias_SD),
        )
        return dx_BDL, dweight_SDW.sum(0), None if dbias_SD is None else dbias_SD.sum(0)

    def norm_forward(self, *arguments):
        return torch.ops.vimamba_cpu.norm_forward(*arguments)

    def norm_backward(
        self, dnormed: Tensor, dresidual: Tensor | None, residual_out: Tensor, weight_E: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x + residual (float32) and of the weight."""
        dsum = torch.empty_like(residual_out, memory_format=torch.contiguous_format)
        dweight_SE = weight_E.new_zeros(torch.get_num_threads(), *weight_E.shape)
        torch.ops.vimamba_cpu.norm_backward(
            dnormed.contiguous(),
            _contiguous(dresidual),
            residual_out.contiguous(),
            weight_E.contiguous(),
            rstd.contiguous(),
            *(dsum, dweight_SE),
        )
        return dsum, dweight_SE.sum(0)

    def has_linear(self, x: Tensor) -> bool:
        """The kernel has to pack the weight, and needs wide vectors."""
        enough = x.numel() >= _FEW_ROWS * max(1, x.shape[-1])
        return x.dtype == torch.float32 and library.wide_vectors and enough

    def linear(self, *arguments):
        return torch.ops.vimamba_cpu.linear(*arguments)

    def quantized_linear(self, x: Tensor, *arguments) -> Tensor:
        return torch.ops.vimamba_cpu.quantized_linear(x.float(), *arguments).to(x.dtype)

    def mixer_forward(self, *arguments):
        return torch.ops.vimamba_cpu.mixer_forward(*arguments)

    def mixer_backward(
        self,
        dout_BLD: Tensor,
        xz_BLE: Tensor,
        weights: Sequence[Tensor],
        reverse: Sequence[int],
        states: Tensor,
        scale: float,
    ) -> tuple[Tensor, list[Tensor]]:
        """Fused, unless half of the threads would wait for want of sequences, or the convolution is too wide."""
        if _fuses_backward(dout_BLD, weights, reverse):
            dxz_SBLE, grads = torch.ops.vimamba_cpu.mixer_backward(dout_BLD, xz_BLE, weights, reverse, states, scale)
            return _sum_slices(dxz_SBLE), grads
        return super().mixer_backward(dout_BLD, xz_BLE, weights, reverse, states, scale)

    def mixer_frozen_backward(
        self,
        dout_BLD: Tensor,
        xz_BLE: Tensor,
        weights: Sequence[Tensor],
        reverse: Sequence[int],
        scale: float,
        gates: Tensor | None,
    ) -> Tensor | None:
        """Fused, or None: as `mixer_backward`."""
        if not _fuses_backward(dout_BLD, weights, reverse):
            return None
        dx_SBLD = torch.ops.vimamba_cpu.mixer_frozen_backward(dout_BLD, xz_BLE, weights, reverse, scale, gates)
        return _sum_slices(dx_SBLD)

    def blocks(
        self, stream: Tensor, weights: Sequence[BlockWeights], scale: float, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """With bfloat16 activations in that type, else in float32.

        The weights are packed once and remembered, but for so many rows that packing them each time takes no time
        beside the products, and what is remembered would be memory for nothing.
        """
        bf16, count = dtype == torch.bfloat16, len(weights[0].directions)
        given, reverse = flat_blocks(weights)
        if stream.shape[0] * stream.shape[1] >= _MANY_ROWS:
            return torch.ops.vimamba_cpu.block_forward(stream, given, [], reverse, count, scale, eps, bf16)
        fingerprints = torch.ops.vimamba_cpu.block_fingerprints(given, count, bf16)
        kept = _PACKED.setdefault(weights[0].norm, {})
        packed = kept.get((bf16, len(weights)))
        if packed is None or not torch.equal(packed[0], fingerprints):
            packed = fingerprints, torch.ops.vimamba_cpu.block_pack(given, count, bf16)
            kept[bf16, len(weights)] = packed
        first = given[: len(given) // len(weights)]
        return torch.ops.vimamba_cpu.block_forward(stream, first, packed[1], reverse, count, scale, eps, bf16)

    def exported_blocks(self, *arguments):
        return torch.ops.vimamba_cpu.remembered_blocks(*arguments)


_MANY_ROWS = 4096
"""Packing takes as long as the products of about 20 rows."""
_PACKED = WeakIdKeyDictionary()
"""Packed weights of runs of blocks and their fingerprints, by the first block's norm: its type and the run's length.

A hint and no more: what does not have the weights' fingerprints is not used.
"""

BACKEND = CPU()


def _fuses_backward(dout_BLD: Tensor, weights: Sequence[Tensor], reverse: Sequence[int]) -> bool:
    narrow = weights[0].shape[-1] <= torch.ops.vimamba_cpu.max_width()
    return narrow and 2 * len(dout_BLD) * len(reverse) >= torch.get_num_threads() and dout_BLD.numel() > 0


def _sum_slices(slices: Tensor) -> Tensor:
    return slices[0] if len(slices) == 1 else slices.sum(0)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _projection_gradient(x: Tensor, batch: int, parts: int) -> Tensor:
    """Room for the gradient of B or C, float32: (parts, B, G, L, N), or (B, D, N) if it is constant."""
    if x.dim() == 2:
        return x.new_empty(batch, *x.shape)
    _, groups, state, length = x.shape
    allocate = x.new_empty if parts == 1 or groups == 1 else x.new_zeros  # a part has not every group's channels
    return allocate((parts, batch, groups, length, state), dtype=torch.float32)


def _sum_projection_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    total = gradient.sum(0) if x.dim() == 2 or gradient.shape[0] > 1 else gradient[0]
    return total if x.dim() == 2 else total.transpose(2, 3).to(x.dtype)
