"""Gates: how much each direction of a mixer counts, for each image or each token."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vimamba.layers.options import check_choice

LEVELS = ("image", "token")


class _Collectors(threading.local):
    """The lists that the forward passes of this thread add their gates to."""

    def __init__(self) -> None:
        self.open: list[list[Tensor]] = []


_collectors = _Collectors()


@contextmanager
def collect_gates() -> Iterator[list[Tensor]]:
    """Collect the gates of the forward passes inside, one tensor a gated layer, in a list.

    In training they carry their gradient, for `gate_loss`. What the backward pass computes again is no forward pass.
    Data parallel replicas that run in threads of their own are not seen; processes are, each by its own.
    """
    gates: list[Tensor] = []
    _collectors.open.append(gates)
    try:
        yield gates
    finally:
        _collectors.open.pop()


class DirectionGate(nn.Module):
    """A learned weight between 0 and 1 for every direction; those of all directions sum to 1, equal at the start.

    A model therefore starts out with the mean of its directions: weights trained with `merge="mean"` give the output
    they gave. As the sum stays, closing one gate opens another; a layer's scale cannot take the place of a choice.

    Args:
        dim: token channels.
        directions: how many there are.
        level: "image" (from the mean of the tokens) or "token".
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        directions: int,
        level: str = "image",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("gate", level, LEVELS)
        self.level = level
        self.threshold = 0.0
        """In evaluation, a direction whose gate for an image is under this is not computed."""
        self.proj = nn.Linear(dim, directions, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All directions alike."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Normalised tokens (batch, length, dim) to gates (batch, length or 1, directions), in float32."""
        pooled = x_BLE.mean(1, keepdim=True) if self.level == "image" else x_BLE
        gates = self.proj(pooled).float().softmax(-1)
        _collect(gates)
        return gates


def _collect(gates: Tensor) -> None:
    # An exported graph has nowhere to keep them, a compiled one hands them out.
    if _collectors.open and isinstance(gates, Tensor) and not torch.compiler.is_exporting() and not _in_backward():
        for collected in _collectors.open:
            collected.append(gates)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def indecision(gates: Sequence[Tensor]) -> Tensor:
    """The mean entropy of the layers' gates, from 0 (one direction alone) to 1 (all alike)."""
    return torch.stack([torch.special.entr(g).sum(-1).mean() / math.log(g.shape[-1]) for g in gates]).mean()
