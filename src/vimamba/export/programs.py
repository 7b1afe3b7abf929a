"""Programs of torch.export, and what AOTInductor compiles of them, for PyTorch without Python.

Both call the operators vimamba::*, which the library of CPU kernels defines: `vimamba.ops.cpu.library.PATH`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from vimamba.data.samples import Samples
from vimamba.errors import UserError, one_line, require
from vimamba.export.check import Comparison
from vimamba.export.source import Source, load_source
from vimamba.export.writing import Graph, export
from vimamba.ops.cpu import library

TOLERANCE = 1e-5


def export_pt2(
    source: Source | str | os.PathLike[str], path: str | os.PathLike[str], *,
    img_size: int | tuple[int, int] | None = None, dynamic_size: bool = False, with_preprocessing: bool = False,
    samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a model as a program that `torch.export.load` reads, checked; arguments and errors as of `export_onnx`.

    What must be known of the model lies in the archive as extra/NAME.
    """

    def write(program: ExportedProgram, metadata: dict[str, str], partial: Path) -> None:
        torch.export.save(program, partial, extra_files=dict(metadata))

    source, graph = checked(source, dynamic_size), Graph(img_size, dynamic_size, with_preprocessing, joined=True)
    return export(source, path, graph, write, lambda file: torch.export.load(file).module(), TOLERANCE, samples)


def export_aoti(
    source: Source | str | os.PathLike[str], path: str | os.PathLike[str], *,
    img_size: int | tuple[int, int] | None = None, dynamic_size: bool = False, with_preprocessing: bool = False,
    samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a model as a package of machine code, for this kind of CPU; arguments and errors as of `export_onnx`.

    A C++ program runs it with libtorch and the library of CPU kernels, see examples/cpp. What must be known of the
    model is the package's metadata.
    """
    path = Path(path)
    require(path.suffix == ".pt2", f"`output` {path}: AOTInductor's packages are called something.pt2")
    missing = library.UNAVAILABLE
    require(missing is None, f"`format` aoti: {missing}")
    known = checked(source, dynamic_size)

    def write(program: ExportedProgram, metadata: dict[str, str], partial: Path) -> None:
        try:
            # Channels last, of a batch whose length depends on data, inductor mixes up the channels of convolutions.
            configs = {"aot_inductor.metadata": metadata, "layout_optimization": known.task != "detect"}
            torch._inductor.aoti_compile_and_package(program, package_path=str(partial), inductor_configs=configs)
        except RuntimeError as error:  # no compiler for one
            raise UserError(f"`format` aoti: the model cannot be compiled ({one_line(error)})") from error

    graph = Graph(img_size, dynamic_size, with_preprocessing, joined=True)
    return export(known, path, graph, write, _package, TOLERANCE, samples)


def checked(source: Source | str | os.PathLike[str], dynamic_size: bool) -> Source:
    """What can be written as a program: torch.export's have assertions that some sizes of it would not meet.

    Raises:
        UserError: it cannot.
    """
    source = load_source(source)
    require(
        source.task == "classification" or not dynamic_size,
        "`dynamic_size`: of a model that segments or detects is for `format` onnx; leave it out",
    )
    return source


def _package(path: Path) -> Any:
    return torch._inductor.aoti_load_package(str(path))
