"""What every public op asks of its arguments; what does not fit is named in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_tensors(op: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Raise ValueError unless these are real floating-point tensors on the device of the first, or None where optional.

    Raises:
        NotImplementedError: a tensor carries a forward-mode derivative, which the ops would lose without a word.
    """
    first = next(iter(required))
    for name, tensor in (required | {k: v for k, v in (optional or {}).items() if v is not None}).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype.is_complex:
            raise ValueError(f"{name} is {tensor.dtype}, but {op} is real: complex {name} is not supported")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.device != required[first].device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {required[first].device}")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op} has no forward-mode derivative (jvp): use reverse mode, as backward() does"
            )


def check_shape(name: str, tensor: Tensor | None, sizes: Sequence[int], axes: str) -> None:
    """Raise ValueError unless a tensor has these sizes, called `axes` in the message, or is None."""
    if tensor is not None and tensor.shape != tuple(sizes):
        raise ValueError(f"{name} must have shape {axes} = {tuple(sizes)}, got {tuple(tensor.shape)}")


def check_flags(**flags: Any) -> None:
    """Raise ValueError unless all are True or False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, int, torch.SymBool)):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: Any, low: float = -math.inf) -> None:
    """Raise ValueError unless it is a finite number that is not below `low`."""
    if torch.compiler.is_compiling():  # the number may be a symbol
        return
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        at_least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} must be a finite number{at_least}, got {value!r}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of states, sums and weights beside activations of `dtype`: float64 stays, the others are float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """A tensor in that type."""
    return tensor.to(wide(tensor.dtype))
