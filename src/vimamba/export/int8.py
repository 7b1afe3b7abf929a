"""ONNX files whose matrix products are of 8-bit integers, by ONNX Runtime's quantiser."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from vimamba.data.image_data import ImageData
from vimamba.data.samples import Samples
from vimamba.data.steps import KeepVisible
from vimamba.data.transforms import eval_transform
from vimamba.errors import require
from vimamba.export.check import Comparison, Exported, compare, example_images, prepared
from vimamba.export.detection import OUTPUTS
from vimamba.export.onnx import export_onnx, session
from vimamba.export.source import Source, load_source
from vimamba.export.writing import TASKS, placed
from vimamba.inference.evaluation import RenamedClasses
from vimamba.tasks.detection import placed as placed_in
from vimamba.tasks.find import find_task
from vimamba.tasks.task import evaluation_of, results_of

CALIBRATION = 128  # images from which the ranges of activations are taken
BATCH = 32  # images at once, fewer of a dense task
QUANTISED = ("MatMul", "Gemm")  # the products with weights; scans and convolutions stay in float32


@dataclasses.dataclass(frozen=True)
class Quantised(Comparison):
    """With the number that decides in training, before and after, its name, and of how many images it is."""

    measure: str
    before: float
    after: float
    images: int

    def __str__(self) -> str:
        shares = f"{self.measure} {self.after:.2%} of {self.images} images, {self.before:.2%} in float32"
        return f"{shares}; {super().__str__()}"


def export_int8(
    source: Source | str | os.PathLike[str], path: str | os.PathLike[str], data: ImageData, *,
    img_size: int | tuple[int, int] | None = None, dynamic_size: bool = False, with_preprocessing: bool = False,
) -> Quantised:  # fmt: skip
    """Write a model as an ONNX file in 8 bits, once its float32 form has been held against PyTorch's.

    Args:
        source, path, img_size, dynamic_size, with_preprocessing: as of `export_onnx`.
        data: the ranges of activations are taken from its training images, or its held-out ones where there are none,
            and top-1, mean IoU or box AP from the held-out ones, brought to the size of the graph and cut to it.

    Raises:
        UserError: as of `export_onnx`, or the model does not know a class of the data.
    """
    source = load_source(source)
    require(source.task in TASKS, f"`int8`: is for models of one of {', '.join(TASKS)}")
    options = dict(img_size=img_size, dynamic_size=dynamic_size, with_preprocessing=with_preprocessing)
    task = find_task(source.task)
    held_out = RenamedClasses(data.val, task, data.class_names, source.class_names)
    with placed(Path(path)) as partial:
        whole = partial.with_name("float32.onnx")
        export_onnx(source, whole, **options, samples=data.val)  # type: ignore[arg-type]
        source = source.sized(img_size)
        learned = data.train if len(data.train) else data.val
        every = max(1, len(learned) // CALIBRATION)
        rows = range(0, len(learned), every)[:CALIBRATION]
        _quantise(whole, partial, (batch for batch, _ in _batches(source, learned, rows, with_preprocessing)))
        before, after = (_measured(session(file), source, held_out, with_preprocessing) for file in (whole, partial))
        for file in partial.parent.glob(f"{whole.name}*"):  # with the weights beside it
            file.unlink()
        images = example_images(source, with_preprocessing, data.val)
        module = TASKS[source.task](source, with_preprocessing).eval()
        batches = images.split(1) if source.task == "detect" else [images]
        compared = compare(session(partial), module.original, batches, tolerance=float("inf"))
    measure = task.columns[task.monitor].removesuffix(" %")
    return Quantised(**dataclasses.asdict(compared), measure=measure, before=before, after=after, images=len(held_out))


def _batches(
    source: Source, samples: Samples, rows: Iterable[int], with_preprocessing: bool
) -> Iterator[tuple[Tensor, Any]]:
    """Images as the exported graph takes them, and their classes, of each image or of its pixels, or their objects."""
    rows, transform = list(rows), eval_transform(source.preprocessing)
    batch = 1 if source.task == "detect" else min(BATCH, find_task(source.task).eval_batch)
    for first in range(0, len(rows), batch):
        pairs = [(samples.image(row), samples.target(row)) for row in rows[first : first + batch]]
        images = prepared(source, [image for image, _ in pairs], with_preprocessing)
        if source.task == "segment":  # steps move stacks of masks
            stacks = [transform(image, tv_tensors.Mask(mask[None]))[1] for image, mask in pairs]
            yield images, torch.cat(stacks)
        elif source.task == "detect":
            yield images, [_left(*transform(*pair)) for pair in pairs]
        else:
            yield images, torch.tensor([target for _, target in pairs])


def _measured(exported: Exported, source: Source, samples: Samples, with_preprocessing: bool) -> float:
    """The number that decides which of a task's models is the best."""
    task = find_task(source.task)
    evaluation = evaluation_of(task, source.class_names)
    for images, targets in _batches(source, samples, range(len(samples)), with_preprocessing):
        outputs = exported(images)
        if source.task == "detect":
            found = dict(zip(OUTPUTS, outputs, strict=False))
            if "masks" in found:
                found["masks"] = found["masks"][:, None]
            size = source.preprocessing.img_size
            outputs = [placed_in(found, size, size)]
        task.update(evaluation, outputs, targets)
    return results_of(task, evaluation, source.class_names).numbers[task.monitor]


def _left(image: Any, target: Any) -> dict[str, Tensor]:
    """The objects of which something is left in the image; their areas are those of what is left."""
    kept = KeepVisible()(image, target)[1]
    return {name: values.as_subclass(Tensor) for name, values in kept.items() if name != "area"}


def _quantise(given: Path, path: Path, batches: Iterator[Tensor]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quantize_static(
        given, path, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(QUANTISED), per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip
