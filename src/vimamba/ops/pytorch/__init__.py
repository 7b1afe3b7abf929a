"""The backend "torch": vectorised PyTorch, for where nothing compiled runs: any device, any floating type."""

from __future__ import annotations

from vimamba.ops.backends import Backend
from vimamba.ops.pytorch import conv, norm, scan


class PyTorch(Backend):
    """See the files of this folder, one an op."""

    name = "torch"
    scan_forward, scan_backward = staticmethod(scan.scan_forward), staticmethod(scan.scan_backward)
    conv_forward, conv_backward = staticmethod(conv.conv_forward), staticmethod(conv.conv_backward)
    norm_forward, norm_backward = staticmethod(norm.norm_forward), staticmethod(norm.norm_backward)


BACKEND = PyTorch()
