"""Gates: how much each direction of a mixer counts, for each image or each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = ("image", "token")


class DirectionGate(nn.Module):
    """A learned weight between 0 and 1 for every direction, one half at the start.

    A mixer multiplies each direction by twice its gate, so that a model starts out with the mean of its directions:
    weights trained with `merge="mean"` give the output they gave.

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
        gates = torch.sigmoid(self.proj(pooled).float())
        if self.training:
            self.latest = gates
        elif not torch.compiler.is_compiling():  # an exported graph has nowhere to keep them
            self.latest = gates.detach()
        return gates
