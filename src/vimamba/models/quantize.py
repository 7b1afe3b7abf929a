"""Models whose projections multiply 8-bit integers."""

from __future__ import annotations

import copy

from torch import nn

from vimamba.errors import require
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.layers.quantized import QuantizedLinear

PROJECTIONS = ("in_proj", "out_proj")


def quantize(model: nn.Module) -> nn.Module:
    """A copy of a model, for inference on a CPU, whose mixers' input and output projections multiply 8-bit integers.

    Weights have a scale for each output feature, activations one for each token, found as they come: no data
    are needed. Convolutions, step sizes, scans, norms and the classifier stay as they are. On processors with AVX-512
    VNNI it is faster than float32; its speed, and what it costs in accuracy: `python benchmarks/quantize.py`.

        small = vimamba.quantize(model)
        logits = small(images)

    Args:
        model: any model with `BidirectionalMixer` in it; it stays as it is.

    Raises:
        UserError: there is no such layer in the model, or nothing left to quantise in those that there are.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    mixers = [module for module in copied.modules() if isinstance(module, BidirectionalMixer)]
    require(bool(mixers), f"{type(model).__name__} has no BidirectionalMixer whose projections could be quantised")
    done = 0
    for mixer in mixers:
        for name in PROJECTIONS:
            linear = getattr(mixer, name)
            if type(linear) is nn.Linear:
                setattr(mixer, name, QuantizedLinear(linear))
                done += 1
    require(done > 0, f"{type(model).__name__} has no projection that is a torch.nn.Linear: it is quantised already")
    return copied
