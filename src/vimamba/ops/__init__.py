"""The ops of Vision Mamba: one contract each, a reference twin, and several backends."""

from vimamba.ops.blocks import BlockWeights, blocks
from vimamba.ops.causal_conv1d import causal_conv1d
from vimamba.ops.direction import Direction
from vimamba.ops.linear import linear, quantized_linear
from vimamba.ops.mixer import mixer
from vimamba.ops.rms_norm import rms_norm
from vimamba.ops.selective_scan import selective_scan

__all__ = [
    "BlockWeights",
    "Direction",
    "blocks",
    "causal_conv1d",
    "linear",
    "mixer",
    "quantized_linear",
    "rms_norm",
    "selective_scan",
]
