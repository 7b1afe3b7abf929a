"""The CPU backend: C++ kernels (AVX-512, AVX2 or portable, chosen at run time) behind the operators vimamba_cpu.*.

The kernels of scan and convolution take activations of any strides; this file allocates the outputs and sums partial
gradients. VIMAMBA_CPU=avx512|avx2|portable forces an instruction set,
VIMAMBA_CPU_LIBRARY=FILE takes another build of the kernels, such as the sanitized one of `make test-sanitized`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vimamba.ops import chunked
from vimamba.ops.backends import CHUNK, chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

INSTRUCTION_SETS = ("portable", "avx2", "avx512")

mixer_takes_gates = True
_FEW_ROWS = 16
_wide_vectors = False
_LIBRARY = Path(os.environ.get("VIMAMBA_CPU_LIBRARY") or Path(__file__).parent / "_kernels.so").resolve()


def _load() -> str | None:
    """Load the library; the reason why it cannot be, or None."""
    if not _LIBRARY.exists():
        return "the CPU kernels were not built (no C++20 compiler when vimamba was installed)"
    try:
        torch.ops.load_library(str(_LIBRARY))
        chunk = torch.ops.vimamba_cpu.chunk()
    except (OSError, AttributeError) as error:  # the latter: a library that an earlier version left
        return f"the CPU kernels do not load, install vimamba again: {error}"
    if chunk != CHUNK:
        return f"the CPU kernels keep a state every {chunk} steps, this vimamba every {CHUNK}: install vimamba again"
    wanted = os.environ.get("VIMAMBA_CPU") or instruction_set()
    if wanted not in INSTRUCTION_SETS or not use_instruction_set(wanted):
        return f"VIMAMBA_CPU={wanted}: this machine runs {', '.join(instruction_sets())}"
    return None


def instruction_set() -> str:
    """The instruction set in use."""
    return INSTRUCTION_SETS[torch.ops.vimamba_cpu.instruction_set(-1)]


def use_instruction_set(name: str) -> bool:
    """Use `name` from now on, in the whole process; False if this machine cannot run it."""
    global _wide_vectors
    index = INSTRUCTION_SETS.index(name)
    used = torch.ops.vimamba_cpu.instruction_set(index)
    _wide_vectors = INSTRUCTION_SETS[used] != "portable"
    return used == index


def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run."""
    current = instruction_set()
    usable = [name for name in INSTRUCTION_SETS if use_instruction_set(name)]
    use_instruction_set(current)
    return usable


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels can be used (on `device`), else one sentence that says why not."""
    if device is not None and device.type != "cpu":
        return f"the CPU kernels take CPU tensors, not {device.type}"
    return _UNAVAILABLE


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take activations of this type."""
    return dtype in (torch.float32, torch.bfloat16)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def scan_forward(
    u_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    D_D: Tensor | None,
    z_BDL: Tensor | None,
    delta_bias_D: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, D, L), last_state (B, D, N), and if wanted the states before each chunk (B, K, D, N)."""
    batch, dim, length = u_BDL.shape
    state = A_DN.shape[1]
    out_BDL = torch.empty_like(u_BDL)
    last_BDN = A_DN.new_empty(batch, dim, state)
    states_BKDN = A_DN.new_empty((batch, chunks(length), dim, state) if save_states else (0,))
    torch.ops.vimamba_cpu.scan_forward(
        *(u_BDL, delta_BDL, *_weights(A_DN, B, C, D_D), z_BDL, _contiguous(delta_bias_D)),
        *(delta_softplus, reverse, out_BDL, last_BDN, states_BKDN if save_states else None),
    )
    return out_BDL, last_BDN, states_BKDN


def _weights(A_DN: Tensor, B: Tensor, C: Tensor, D_D: Tensor | None) -> tuple[Tensor | None, ...]:
    """The activations come as they are; what is read channel by channel is small and contiguous."""
    B, C = (m.contiguous() if m.dim() == 2 else m for m in (B, C))
    return A_DN.contiguous(), B, C, _contiguous(D_D)


def scan_backward(
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
        *(u_BDL, delta_BDL, *_weights(A_DN, B, C, D_D), z_BDL, _contiguous(delta_bias_D)),
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


def conv_forward(x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Depthwise causal convolution, and SiLU."""
    if weight_DW.shape[1] > torch.ops.vimamba_cpu.max_width():
        return chunked.conv_forward(x_BDL, weight_DW, bias_D, silu, reverse)
    y_BDL = torch.empty_like(x_BDL)
    torch.ops.vimamba_cpu.conv_forward(x_BDL, weight_DW.contiguous(), _contiguous(bias_D), silu, reverse, y_BDL)
    return y_BDL


def conv_backward(
    dy_BDL: Tensor, x_BDL: Tensor, weight_DW: Tensor, bias_D: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, the weight and the bias."""
    if weight_DW.shape[1] > torch.ops.vimamba_cpu.max_width():
        return chunked.conv_backward(dy_BDL, x_BDL, weight_DW, bias_D, silu, reverse)
    dx_BDL = torch.empty_like(x_BDL)
    parts = torch.get_num_threads()
    dweight_SDW = weight_DW.new_zeros(parts, *weight_DW.shape)
    dbias_SD = None if bias_D is None else bias_D.new_zeros(parts, *bias_D.shape)
    torch.ops.vimamba_cpu.conv_backward(
        *(dy_BDL, x_BDL, weight_DW.contiguous(), _contiguous(bias_D), silu, reverse),
        *(dx_BDL, dweight_SDW, dbias_SD),
    )
    return dx_BDL, dweight_SDW.sum(0), None if dbias_SD is None else dbias_SD.sum(0)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight_E: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x + residual (..., E), that sum in float32, and the reciprocal root mean squares."""
    x = x.contiguous()
    normed = torch.empty_like(x, dtype=out_dtype)
    total = torch.empty_like(x, dtype=torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    torch.ops.vimamba_cpu.norm_forward(x, _contiguous(residual), weight_E.contiguous(), eps, normed, total, rstd)
    return normed, total, rstd


def norm_backward(
    dnormed: Tensor, dresidual: Tensor | None, residual_out: Tensor, weight_E: Tensor, rstd: Tensor
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


def linear_pays(x: Tensor) -> bool:
    """Whether `linear` is faster than PyTorch's: it has to pack the weight, and needs wide vectors."""
    return x.dtype == torch.float32 and _wide_vectors and x.numel() >= _FEW_ROWS * max(1, x.shape[-1])


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """x (..., K) weight^T + bias."""
    out = x.new_empty(*x.shape[:-1], weight_NK.shape[0])
    torch.ops.vimamba_cpu.linear(x.contiguous(), weight_NK.contiguous(), _contiguous(bias_N), out)
    return out


def mixer_forward(
    xz_BLE: Tensor,
    weights: Sequence[Tensor],
    reverse: Sequence[int],
    scale: float,
    save_states: bool,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixer between its linear layers: out (B, L, D), and if wanted the states (directions, B, K, D, N).

    gates (B, L or 1, directions), float32, weigh the directions; one that is 0 for a whole image is not computed.
    """
    if xz_BLE.stride(2) != 1:
        xz_BLE = xz_BLE.contiguous()
    batch, length, width = xz_BLE.shape
    out_BLD = xz_BLE.new_empty(batch, length, width // 2)
    A_DN, count = weights[5], len(reverse)
    states = A_DN.new_empty((count, batch, chunks(length), *A_DN.shape) if save_states else (count, 0))
    torch.ops.vimamba_cpu.mixer_forward(
        xz_BLE,
        [weight.contiguous() for weight in weights],
        reverse,
        scale,
        _contiguous(gates),
        out_BLD,
        states if save_states else None,
    )
    return out_BLD, states


_UNAVAILABLE = _load()
