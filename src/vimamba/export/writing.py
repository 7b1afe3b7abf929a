"""What every format has in common: from a source to a traced graph, to a file that is checked and put in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vimamba.data.samples import Samples
from vimamba.data.transforms import MAX_SIDE
from vimamba.errors import UserError, one_line, require
from vimamba.export.check import Comparison, Exported, compare, example_images, require_objects
from vimamba.export.detection import DetectionOutputs
from vimamba.export.outputs import Outputs
from vimamba.export.source import Source
from vimamba.ops.blocks import traced_as_one
from vimamba_command import package_version

TASKS: dict[str, type[Outputs] | type[DetectionOutputs]] = {
    "classification": Outputs, "segment": Outputs, "detect": DetectionOutputs,
}  # fmt: skip
COARSEST = {"segment": 32, "detect": 64}  # stride of the last map of a dense model, pixels
UNLIKE = 13  # pixels: what holds of a size with this remainder, as of an odd number, holds of most

Write = Callable[[ExportedProgram, dict[str, str], Path], None]
"""A traced graph and what must be known of it to a file."""
Load = Callable[[Path], Exported]


@dataclasses.dataclass(frozen=True)
class Graph:
    """What an exported graph takes and gives; its batch may be of any size, but for a detector's, which is one image.

    Args:
        img_size: height and width of the images, pixels; the model's own if None.
        dynamic_size: take images of any size from half of that up, to segment or detect of any over 32 pixels.
        with_preprocessing: take uint8 RGB (batch, height, width, 3) that has its size, and give probabilities.
        joined: have a run of blocks as one operator, vimamba::blocks.
    """

    img_size: int | tuple[int, int] | None = None
    dynamic_size: bool = False
    with_preprocessing: bool = False
    joined: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """The axes of the images' height and width."""
        return (1, 2) if self.with_preprocessing else (2, 3)

    def trace(self, module: nn.Module, images: Tensor, task: str) -> ExportedProgram:
        """
        Raises:
            UserError: what the module computes depends on the size in a way that no graph can hold.
        """
        example, sizes = images[:2], {0: Dim("batch")}
        if task == "detect":
            example, sizes = images[:1], {}
        how: dict[str, Any] = {}
        if self.dynamic_size and task in COARSEST:
            # Maps are cut to the image's size, which torch.export asks about and cannot answer for all sizes.
            example, how = self._unlike(example, COARSEST[task]), {"prefer_deferred_runtime_asserts_over_guards": True}
        if self.dynamic_size:
            for axis, name in zip(self.sides, ("height", "width"), strict=True):
                least = COARSEST[task] + 1 if task in COARSEST else max(2, images.shape[axis] // 2)
                sizes[axis] = Dim(name, min=least, max=MAX_SIDE)
        joining = traced_as_one() if self.joined else contextlib.nullcontext()
        with torch.no_grad(), warnings.catch_warnings(), joining:
            warnings.simplefilter("ignore")
            try:
                return torch.export.export(module, (example,), dynamic_shapes=(sizes,), **how)
            except (ValueError, RuntimeError) as error:
                way_out = "; leave `dynamic_size` out" if self.dynamic_size else ""
                raise UserError(f"the model cannot be exported ({one_line(error)}){way_out}") from error

    def _unlike(self, images: Tensor, stride: int) -> Tensor:
        """Empty images about as large, of a size that is a multiple of nothing."""
        shape = [*images.shape]
        for axis in self.sides:
            shape[axis] = max(stride, shape[axis] // stride * stride) + UNLIKE
        return images.new_zeros(shape)

    def smaller(self, images: Tensor) -> Tensor:
        """Images of another size: a part of them, in order, as AOTInductor's packages take for granted."""
        height, width = (images.shape[axis] for axis in self.sides)
        part = images.narrow(self.sides[0], 0, height - height // 4).narrow(self.sides[1], 0, width - width // 5)
        return part.contiguous()


def export(
    source: Source, path: str | os.PathLike[str], graph: Graph, write: Write, load: Load, tolerance: float,
    samples: Samples | None = None,
) -> Comparison:  # fmt: skip
    """Write a model and hold the outputs of what was written against PyTorch's.

    Raises:
        UserError: the model cannot be exported like that, the file cannot be written, or the outputs differ.
    """
    known = ", ".join(TASKS)
    require(source.task in TASKS, f"`task` {source.task}: is not exported; export a model of one of {known}")
    with placed(Path(path)) as partial:
        source = source.sized(graph.img_size)
        module = TASKS[source.task](source, graph.with_preprocessing).eval()
        images = example_images(source, graph.with_preprocessing, samples)
        batches = [images, images[:1], *([graph.smaller(images)] if graph.dynamic_size else [])]
        if source.task == "detect":
            batches = [image for batch in batches[::2] for image in batch.split(1)]
            require_objects(module.original, batches)
        write(graph.trace(module, images, source.task), _metadata(source, graph), partial)
        return compare(load(partial), module.original, batches, tolerance)


def _metadata(source: Source, graph: Graph) -> dict[str, str]:
    """What a user of the file must know of the model; all but the names are JSON."""
    known = {
        "vimamba": package_version(), "model": source.name, "task": source.task, "license": source.license,
        "class_names": source.class_names, "preprocessing": dataclasses.asdict(source.preprocessing),
        "with_preprocessing": graph.with_preprocessing,
    }  # fmt: skip
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items() if value}


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A path to write to, in a folder of its own; what lies there takes its place when the block ends, or is gone.

    Raises:
        UserError: nothing can be written there.
    """
    require(not path.is_dir(), f"`output` {path}: is a folder; give a file")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder / path.name
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model itself last
                os.replace(file, path.parent / file.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"`output` {path}: cannot be written ({error.strerror or error})") from error
