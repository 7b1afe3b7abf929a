"""Memory for time: projections of long sequences that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONG = 2048
"""Tokens from which on a projection is computed again, not kept: a user can make a batch smaller, not an image."""


def projection_recomputed(
    linear: nn.Linear, x_BLE: Tensor, projected: Tensor
) -> AbstractContextManager[torch.autograd.graph.saved_tensors_hooks | None]:
    """Within it, autograd keeps no `projected`, which is `linear` of `x_BLE`, if the sequence is long.

    The input is kept by the linear layer's own gradient already. Compiled graphs choose for themselves what to keep.
    """
    if x_BLE.shape[1] < LONG or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    dtype, x_BLE = projected.dtype, x_BLE.detach()
    place = (projected.data_ptr(), projected.shape, projected.stride())

    def project() -> Tensor:
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        with torch.autocast(x_BLE.device.type, enabled=False):
            return F.linear(x_BLE.to(dtype), linear.weight.detach().to(dtype), bias)

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        return project if (kept.data_ptr(), kept.shape, kept.stride()) == place else kept

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
