"""Gates: how much each direction of a mixer counts, for each image or each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEVELS = ("image", "token")


class DirectionGate(nn.Module):
    """A learned weight between 0 and 1 for every direction; those of all directions sum to 1, equal at the start.

    A model therefore starts out with the mean of its directions: weights trained with `merge="mean"` give the output
    they gave. As the sum stays, closing one gate opens another; a layer's scale cannot take the place of a choice.

    Args:
        dim: token channels.
        directions: how many there are.
        level: "image" (from the mean of the tokens) or "token".
    """

    def __init__(self, dim: int, directions: int, level: str = "image") -> None:
        super().__init__()
        self.level = level
        self.threshold = 0.0
        """In evaluation, a direction whose gate for an image is under this is not computed."""
        self.latest: Tensor | None = None
        """The gates of the latest forward pass, for the sparsity loss and for looking at."""
        self.proj = nn.Linear(dim, directions)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Normalised tokens (batch, length, dim) to gates (batch, length or 1, directions)."""
        pooled = x_BLE.mean(1, keepdim=True) if self.level == "image" else x_BLE
        gates = self.proj(pooled).float().softmax(-1)
        if self.training:
            self.latest = gates
        elif not torch.compiler.is_compiling():  # an exported graph has nowhere to keep them
            self.latest = gates.detach()
        return gates

    def indecision(self) -> Tensor | None:
        """The entropy of the latest gates, from 0 (one direction alone) to 1 (all alike); None before any."""
        if self.latest is None:
            return None
        return torch.special.entr(self.latest).sum(-1).mean() / math.log(self.latest.shape[-1])
