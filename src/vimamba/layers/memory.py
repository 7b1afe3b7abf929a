"""Memory for time: what the backward pass of a long sequence computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RECOMPUTE = ("long", "always", "never")
LONG = 2048
"""Tokens from which on "long" computes again: a user can make a batch smaller, not an image."""


def recomputes(x_BLE: Tensor, recompute: str) -> bool:
    """Whether a training step over `x_BLE` should compute again.

    Compiled graphs choose for themselves, and checkpointing or offloading around it has a say over all that is kept:
    of nested hooks only the innermost are asked.
    """
    real = type(x_BLE) is Tensor and not x_BLE.is_meta and not torch.compiler.is_compiling()
    if not real or not torch.is_grad_enabled() or recompute == "never":
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    alone = hooks is None or getattr(hooks[0], "__module__", "") == __name__
    return alone and (recompute == "always" or x_BLE.shape[1] >= LONG)


def recomputed(tensor: Tensor, compute: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which autograd keeps no `tensor` (nor a reshaped view) but calls `compute` for it, if contiguous.

    PyTorch's selective checkpointing keeps as little and takes as long, but lets a graph run backward only once.
    """
    place, size, rows = tensor.data_ptr(), tensor.numel(), tensor.is_contiguous()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        same = rows and kept.data_ptr() == place and kept.numel() == size and kept.is_contiguous()
        return kept.shape if same else kept

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else compute().reshape(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.no_grad()(unpack))
