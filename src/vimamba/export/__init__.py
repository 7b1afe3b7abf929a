"""Trained models out of Python: ONNX files, programs of torch.export, packages of AOTInductor, pages."""

from vimamba.export.int8 import export_int8
from vimamba.export.onnx import export_onnx
from vimamba.export.programs import export_aoti, export_pt2
from vimamba.export.source import Source, load_source
from vimamba.export.web import export_web

__all__ = ["Source", "export_aoti", "export_int8", "export_onnx", "export_pt2", "export_web", "load_source"]
