"""Trained models out of Python: ONNX files, programs of torch.export, packages of AOTInductor."""

from vimamba.export.onnx import export_onnx
from vimamba.export.source import Source, load_source

__all__ = ["Source", "export_onnx", "load_source"]
