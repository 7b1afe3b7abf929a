"""Memory for time: what the backward pass of a long sequence computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LONG = 2048
"""Tokens from which on it pays: a user can make a batch smaller, not an image."""


def is_long(x_BLE: Tensor) -> bool:
    """Whether a training step over `x_BLE` should compute again; compiled graphs choose for themselves."""
    real = (
        isinstance(x_BLE, Tensor) and type(x_BLE) is Tensor and not x_BLE.is_meta and not torch.compiler.is_compiling()
    )
    return real and torch.is_grad_enabled() and x_BLE.shape[1] >= LONG


def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which autograd keeps no `tensor` (nor a reshaped view) but calls `compute` for it, if contiguous."""
    place, size, rows = tensor.data_ptr(), tensor.numel(), tensor.is_contiguous()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        same = rows and kept.data_ptr() == place and kept.numel() == size and kept.is_contiguous()
        return kept.shape if same else kept

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else compute().reshape(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.no_grad()(unpack))
