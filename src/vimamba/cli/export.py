"""vimamba export: write a trained model for use without Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from vimamba.cli import terminal
from vimamba.cli.parsing import add_options, take
from vimamba.errors import require
from vimamba.export import export_onnx, load_source


@dataclasses.dataclass
class ExportOptions:
    """What to write, and of what.

    Args:
        format: onnx (ONNX Runtime)
        output: file to write
        checkpoint: weights of the model, where it is given by its name: .safetensors or a PyTorch file
        model_args: keyword arguments of that model, or of vimamba.load_hustvl for a checkpoint of the official code
        img_size: height and width of the images, or one number; the model's own if not given
        dynamic_size: take images of any size from half the model's own up
        with_preprocessing: take uint8 RGB (batch, height, width, 3) that has its size, and give probabilities
        portable: use standard operators only, for other runtimes than ONNX Runtime
    """

    format: Literal["onnx"]
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


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", help="a run's folder, a checkpoint of the official code, or the name of a model")
    parser.add_argument("--config", action="config")
    add_options(parser, ExportOptions)


def run(parser: ArgumentParser, options: Namespace) -> int:
    what = take(ExportOptions, options)
    terminal.quiet_libraries()
    with terminal.console(stderr=True).status("exporting"):
        found = export_onnx(
            load_source(options.source, what.checkpoint, what.model_args), what.output, img_size=what.img_size,
            dynamic_size=what.dynamic_size, with_preprocessing=what.with_preprocessing, portable=what.portable,
        )  # fmt: skip
    size = Path(what.output).stat().st_size
    terminal.console().print(f"{what.output} ({size / 1e6:.1f} MB): {found}", markup=False)
    return 0
