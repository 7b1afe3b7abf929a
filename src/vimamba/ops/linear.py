"""Linear layers: a product that is faster than the library's where our kernels are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.ops import backends


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, in float32 inference on a CPU by the kernels of the "cpu" backend.

    They pack the weight anew at each call, so nothing can become stale, and share one layout with the mixer's own
    projections. Measured against it: `python benchmarks/linear.py`.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features).
    """
    if backends.values_only(x) and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        module = backends.resolve("", x.device, x.dtype)
        same_types = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
        if same_types and hasattr(module, "linear") and module.linear_pays(x):
            return module.linear(x, weight, bias)
    return F.linear(x, weight, bias)
