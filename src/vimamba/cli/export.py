"""vimamba export: write a trained model for use without Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.errors import require
from vimamba.export import Source, export_aoti, export_onnx, export_pt2, load_source
from vimamba.export.check import Comparison


@dataclasses.dataclass
class ExportOptions:
    """What to write, and of what.

    Args:
        format: onnx (ONNX Runtime and others), pt2 (a program of torch.export) or aoti (AOTInductor's machine code)
        output: file to write
        checkpoint: weights of the model, where it is given by its name: .safetensors or a PyTorch file
        model_args: keyword arguments of that model, or of vimamba.load_hustvl for a checkpoint of the official code
        img_size: height and width of the images, or one number; the model's own if not given
        dynamic_size: take images of any size from half the model's own up
        with_preprocessing: take uint8 RGB (batch, height, width, 3) that has its size, and give probabilities
        portable: of onnx, use standard operators only, for other runtimes than ONNX Runtime
    """

    format: Literal["onnx", "pt2", "aoti"]
    output: str
    checkpoint: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    img_size: int | tuple[int, int] | None = None
    dynamic_size: bool = False
    with_preprocessing: bool = False
    portable: bool = False

    def __post_init__(self) -> None:
        sides = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or (1,)
        require(min(sides) >= 1, f"--img_size is {self.img_size}; it must be at least 1")
        require(self.format == "onnx" or not self.portable, f"--portable: is for --format onnx, not {self.format}")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint of the official code, or the name of a model")
    parser.add_argument("--config", action="config")
    add_options(parser, ExportOptions)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what = take(ExportOptions, options)
    terminal.quiet_libraries()
    with terminal.console(stderr=True).status("exporting"):
        found = write(load_source(options.source, what.checkpoint, what.model_args), what)
    size = Path(what.output).stat().st_size
    terminal.console().print(f"{what.output} ({size / 1e6:.1f} MB): {found}", markup=False)
    return 0


def write(source: Source, what: ExportOptions) -> Comparison:
    """Write the file; how it compares with the model in PyTorch."""
    graph: dict[str, Any] = {
        "img_size": what.img_size, "dynamic_size": what.dynamic_size, "with_preprocessing": what.with_preprocessing,
    }  # fmt: skip
    if what.format == "onnx":
        return export_onnx(source, what.output, **graph, portable=what.portable)
    return {"pt2": export_pt2, "aoti": export_aoti}[what.format](source, what.output, **graph)
