"""vimamba export: write a trained model for use without Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.data.image_data import ImageData
from vimamba.data.sources import open_data
from vimamba.errors import require
from vimamba.export import Source, export_aoti, export_int8, export_onnx, export_pt2, export_web, load_source
from vimamba.export.check import Comparison
from vimamba.export.onnx import Operator
from vimamba.inference.evaluation import open_for_eval
from vimamba.quiet import quiet_libraries
from vimamba.tasks.find import find_task


@dataclasses.dataclass
class ExportOptions:
    """What to write, and of what.

    Args:
        format: onnx (ONNX Runtime and others), pt2 (a program of torch.export), aoti (AOTInductor's machine code) or
            web (a folder of a page that runs the model in the browser)
        output: file to write, of web a folder
        checkpoint: weights of the model, where it is given by its name: .safetensors or a PyTorch file
        model_args: keyword arguments of that model, or of vimamba.load_hustvl for a checkpoint of the official code
        img_size: height and width of the images, or one number; the model's own if not given
        dynamic_size: take images of any size from half the model's own up, of dense models (of onnx) any over 32 pixels
        with_preprocessing: take uint8 RGB (batch, height, width, 3) that has its size, and give probabilities
        portable: of onnx, write opset 18, which other runtimes than ONNX Runtime know
        operator: of onnx, what computes the scan: a loop of standard operators (stock); the operator of a library for
            ONNX Runtime, whose file vimamba.onnx_library() names (vimamba), the fastest; ONNX Runtime's own
            LinearAttention (microsoft); or that of opset 27 (standard)
        int8: of onnx, multiply matrices in 8-bit integers; --data says what is measured before and after
        data: images to check with, as eval takes them; built-in digits if not given
        runtime: of web, folder with onnxruntime-web's files, to be copied; the page loads them from a CDN if not given
    """

    format: Literal["onnx", "pt2", "aoti", "web"]
    output: str
    checkpoint: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    img_size: int | tuple[int, int] | None = None
    dynamic_size: bool = False
    with_preprocessing: bool = False
    portable: bool = False
    operator: Operator = "stock"
    int8: bool = False
    data: str | None = None
    runtime: str | None = None

    def __post_init__(self) -> None:
        sides = (self.img_size,) if isinstance(self.img_size, int) else self.img_size or (1,)
        require(min(sides) >= 1, f"--img_size is {self.img_size}; it must be at least 1")
        for name in ("portable", "int8"):
            require(self.format == "onnx" or not getattr(self, name), f"--{name}: is for --format onnx")
        require(not (self.portable and self.int8), "--int8: goes without --portable")
        require(self.operator == "stock" or self.format == "onnx", "--operator: is for --format onnx")
        require(
            self.operator == "stock" or not (self.portable or self.int8),
            "--operator: goes without --portable and --int8",
        )
        require(self.data is not None or not self.int8, "--int8: give --data, images with their classes")
        web = self.format == "web"
        require(web or self.runtime is None, f"--runtime: is for --format web, not {self.format}")
        for name in ("dynamic_size", "with_preprocessing"):
            require(not (web and getattr(self, name)), f"--{name}: --format web chooses it; leave it out")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint of the official code, or the name of a model")
    parser.add_argument("--config", action="config")
    add_options(parser, ExportOptions)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what = take(ExportOptions, options)
    quiet_libraries()
    source = load_source(options.source, what.checkpoint, what.model_args)
    data = None if what.data is None else images_of(source, options.source, what.data)
    with terminal.console(stderr=True).status("exporting"):
        found = write(source, what, data)
    output = Path(what.output)
    size = sum(file.stat().st_size for file in ([*output.iterdir()] if output.is_dir() else [output]))
    terminal.console().print(f"{what.output} ({size / 1e6:.1f} MB): {found}", markup=False)
    return 0


def images_of(source: Source, run: str, name: str) -> ImageData:
    """The images that `--data` names, those that a run held out where they are its own."""
    task = find_task(source.task)
    if source.of_run:
        return open_for_eval(Path(run), task, name)[0]
    return open_data(name, 1.0, 0, None, source=task.source(), strict=False)


def write(source: Source, what: ExportOptions, data: ImageData | None) -> Comparison:
    """Write the file; how it compares with the model in PyTorch."""
    graph: dict[str, Any] = {
        "img_size": what.img_size, "dynamic_size": what.dynamic_size, "with_preprocessing": what.with_preprocessing,
    }  # fmt: skip
    if what.int8 and data is not None:
        return export_int8(source, what.output, data, **graph)
    samples = None if data is None else data.val
    if what.format == "onnx":
        return export_onnx(
            source, what.output, **graph, portable=what.portable, operator=what.operator, samples=samples
        )
    if what.format == "web":
        return export_web(source, what.output, img_size=what.img_size, runtime=what.runtime, samples=samples)
    return {"pt2": export_pt2, "aoti": export_aoti}[what.format](source, what.output, **graph, samples=samples)
