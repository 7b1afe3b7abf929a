"""A linear layer that multiplies 8-bit integers; `vimamba.quantize` puts it in the place of others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimamba.ops import quantized_linear
from vimamba.ops.sizes import INTEGER_MAX


class QuantizedLinear(nn.Module):
    """A linear layer with weights of 8 bits, one scale for each output feature; see `ops.quantized_linear`.

    Args:
        linear: the layer whose weights are rounded.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1)
        scales = torch.where(largest > 0, largest / INTEGER_MAX, 1.0)
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in x's type; no gradient."""
        bias = None if self.bias is None else self.bias.float()
        return quantized_linear(x, self.weight, self.scales.float(), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"
