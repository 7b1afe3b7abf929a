"""The ops in Triton: GPU kernels compiled at run time, with no toolkit, for NVIDIA and AMD.

`plan` decides how the work is cut up, one file a kernel holds the kernels, and the functions below are the
backend's. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

AVAILABLE = importlib.util.find_spec("triton") is not None

if AVAILABLE:
    from vimamba.ops.triton.conv import conv_backward, conv_forward
    from vimamba.ops.triton.mixer import mixer_backward, mixer_forward
    from vimamba.ops.triton.norm import norm_backward, norm_forward
    from vimamba.ops.triton.scan import scan_backward, scan_forward

__all__ = [
    "conv_backward",
    "conv_forward",
    "mixer_backward",
    "mixer_forward",
    "norm_backward",
    "norm_forward",
    "scan_backward",
    "scan_forward",
    "supports",
    "unavailable",
]


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels take tensors of this type."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels run (on `device`, where given), else one sentence that says why not."""
    if not AVAILABLE:
        return "Triton is not installed (pip install triton, or a PyTorch built for a GPU)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kind = device.type if device is not None else "cuda"
    if kind == "cpu":
        return None if interpreted else (
            "Triton kernels need a GPU; on CPU tensors they run only in Triton's interpreter, with the environment "
            "variable TRITON_INTERPRET=1 set before the import"
        )  # fmt: skip
    if kind != "cuda":
        return f"Triton kernels run on CUDA and ROCm devices, not on {kind!r}"
    if interpreted and device is None:
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton needs a GPU of compute capability 7.0 or later, and this one has {major}.{minor}"
    return None
