"""The backend "triton": GPU kernels compiled at run time, with no toolkit, for NVIDIA and AMD.

`tiling` decides how the work is cut up, and one file a kernel holds the kernels and their launches. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from vimamba.ops.backends import Backend

AVAILABLE = importlib.util.find_spec("triton") is not None

if AVAILABLE:
    from vimamba.ops.triton import conv, mixer, norm, scan


class Triton(Backend):
    """The kernels of this folder; without Triton it can but say so."""

    name = "triton"

    def supports(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.float32, torch.bfloat16, torch.float16)

    def unavailable(self, device: torch.device | None = None) -> str | None:
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

    def scan_forward(self, *arguments):
        return scan.scan_forward(*arguments)

    def scan_backward(self, *arguments):
        return scan.scan_backward(*arguments)

    def conv_forward(self, *arguments):
        return conv.conv_forward(*arguments)

    def conv_backward(self, *arguments):
        return conv.conv_backward(*arguments)

    def norm_forward(self, *arguments):
        return norm.norm_forward(*arguments)

    def norm_backward(self, *arguments):
        return norm.norm_backward(*arguments)

    def mixer_forward(self, xz, weights, reverse, scale, gates, save_states):
        if gates is not None:  # the kernel that sums the directions does not weigh them
            return super().mixer_forward(xz, weights, reverse, scale, gates, save_states)
        return mixer.mixer_forward(xz, weights, reverse, scale, save_states)

    def mixer_backward(self, *arguments):
        return mixer.mixer_backward(*arguments)


BACKEND = Triton()
