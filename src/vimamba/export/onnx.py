"""ONNX files that stock ONNX Runtime runs, or any runtime."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vimamba.data.samples import Samples
from vimamba.errors import UserError, one_line, require
from vimamba.export.check import Comparison
from vimamba.export.detection import OUTPUTS
from vimamba.export.lowering import DECOMPOSITIONS, LOWERINGS
from vimamba.export.source import Source, load_source
from vimamba.export.writing import Graph, export
from vimamba.ops.cpu.library import onnx_library

Operator = Literal["stock", "vimamba", "microsoft", "standard"]
TOLERANCE = 1e-4
OF_CASCADES = 1e-3  # in PyTorch too an image changed by 1e-7, its rounding, moves the boxes of a fresh one by 3e-4
WRITTEN = 21  # the last opset that every torch.onnx here writes
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    source: Source | str | os.PathLike[str], path: str | os.PathLike[str], *,
    img_size: int | tuple[int, int] | None = None, dynamic_size: bool = False, with_preprocessing: bool = False,
    portable: bool = False, operator: Operator = "stock", samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a model as an ONNX file, once its outputs have been held against PyTorch's.

    The graph's input is `images` and its output `logits`, or `probabilities`; a detector's are `boxes`, `labels`,
    `scores` and, where the model has them, `masks`, of one image. Any other batch may be of any size.

    Args:
        source: what `load_source` gives or takes.
        path: of the file; weights of more than 2 GB lie beside it under its name with ".data" at the end.
        img_size, dynamic_size, with_preprocessing: as of `Graph`.
        portable: as "stock", in opset 18.
        operator: what computes the scan: "stock", a loop of standard operators; "vimamba", the operator of our library
            for ONNX Runtime (`vimamba.onnx_library()`); "microsoft", ONNX Runtime's LinearAttention; or "standard",
            that of opset 27.
        samples: images to check with; built-in digits if not given.

    Raises:
        UserError: a package is missing, the model cannot be exported like that, the file cannot be written, or the
            outputs differ.
    """
    for name in PACKAGES:
        require(find_spec(name) is not None, f"`format` onnx needs the package {name}: pip install 'vimamba[export]'")
    source = load_source(source)
    known = source.task != "detect" or portable or operator != "standard"
    require(known, "`operator` standard: ONNX Runtime has no RoiAlign of that opset; leave it out for a detector")
    lowered = LOWERINGS["portable" if portable else operator]
    load = functools.partial(session, library=onnx_library() if operator == "vimamba" else None)

    def write(program: ExportedProgram, metadata: dict[str, str], partial: Path) -> None:
        given = len(program.graph_signature.user_outputs)
        single = ["probabilities" if with_preprocessing else "logits"]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                program.run_decompositions(DECOMPOSITIONS), (), dynamo=True, verbose=False,
                opset_version=min(lowered.opset, WRITTEN), input_names=["images"],
                output_names=single if given == 1 else OUTPUTS[:given],
            )  # fmt: skip
        assert found is not None
        lowered.lower(found.model)
        found.model.metadata_props.update(metadata)
        outputs: Any = found.model.graph.outputs if given > 1 else ()
        for output in outputs:
            output.shape = type(output.shape)(["objects", *list(output.shape)[1:]])
        found.save(partial)

    graph = Graph(img_size, dynamic_size, with_preprocessing)
    model: Any = source.model
    cascades = source.task == "detect" and len(model.heads.stages) > 1
    tolerance = OF_CASCADES if cascades else TOLERANCE
    return export(source, path, graph, write, load, tolerance, samples)


def session(path: Path, library: str | None = None) -> Any:
    """A function from images to the output of an ONNX file, or a tuple of several, on as many threads as PyTorch has.

    Args:
        path: of the file.
        library: of operators that it needs.

    Raises:
        UserError: this version of ONNX Runtime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        if library is not None:
            options.register_custom_ops_library(library)
        running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base but this
        found = f"onnxruntime {onnxruntime.__version__} cannot run the file ({one_line(error)})"
        raise UserError(f"`format` onnx: {found}; upgrade it, or give `portable`") from error

    def run(images: Tensor) -> Any:
        outputs = tuple(map(torch.from_numpy, running.run(None, {"images": images.contiguous().numpy()})))
        return outputs if len(outputs) > 1 else outputs[0]

    return run
