"""A trained model on its device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from vimamba.errors import UserError, out_of_memory, require
from vimamba.models import quantize
from vimamba.processes import check_workers
from vimamba.tasks.dense import DenseTask
from vimamba.tasks.find import find_task
from vimamba.tasks.options import InferenceOptions, InferencePrecision
from vimamba.tasks.task import Task
from vimamba.tasks.weights import ModelCard


@dataclasses.dataclass
class DeviceOptions:
    """What to compute on.

    Args:
        device: cpu, cuda, cuda:1, mps ...; auto takes the fastest
        precision: 32-true, bf16-mixed or 16-mixed; int8, with 8-bit projections, for processors
        batch_size: images at once; 64 if not given, and 8 of a dense task
        num_workers: processes that decode images; chosen by the machine if not given
    """

    device: str = "auto"
    precision: InferencePrecision = "32-true"
    batch_size: int | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        require(
            self.batch_size is None or self.batch_size >= 1,
            f"`batch_size` is {self.batch_size}; it must be at least 1",
        )
        check_workers(self.num_workers)


class Runner:
    """A model on its device, run without gradients at the precision asked for.

    Args:
        model: what the card describes.
        card: of the model.
        device, precision: as of `DeviceOptions`.
        how: how a dense task looks at an image.
    """

    def __init__(
        self, model: nn.Module, card: ModelCard, device: str = "auto", precision: InferencePrecision = "32-true",
        how: InferenceOptions | None = None,
    ):  # fmt: skip
        self.card, self.task, self.how = card, find_task(card.task), how or InferenceOptions()
        self.device = pick_device(device)
        types = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "int8": None}
        require(precision in types, f"`precision` {precision}: give {', '.join(types)}")
        self.dtype = types[precision]
        if precision == "int8":
            model = quantize(model)
        try:
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"`device` {device}: {str(error).splitlines()[0]}") from error

    def __call__(self, images: Any, sizes: list[tuple[int, int]]) -> Iterator[tuple[Any, slice]]:
        """What the model gives for preprocessed images that had these sizes, part by part, on its device.

        Raises:
            UserError: it does not fit into the memory.
        """
        parts = self.task.infer(self.model, self.to_device(images), sizes, self.card.preprocessing, self.how)
        while True:  # the modes hold while the task computes, and not while the caller does
            lower = contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
            with torch.inference_mode(), lower, fitting(self.task, len(images), sizes):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def to_device(self, values: Any) -> Any:
        """Tensors, in any structure, where the model is."""
        return move_data_to_device(values, self.device)


@contextlib.contextmanager
def fitting(task: type[Task], count: int, sizes: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Errors for want of memory as a sentence, about images of sizes (height, width)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        ways = [f"a smaller `batch_size` than {count}"] if count > 1 else []
        if issubclass(task, DenseTask):
            ways.append("a `tile` of 1024 pixels or, if you did, of fewer")
        height, width = max(sizes)
        what = f"{count} image{'s' * (count > 1)} of up to {width} x {height} pixels"
        raise UserError(f"out of memory by {what}; give {' or '.join(ways or ['a smaller model'])}") from error


def pick_device(name: str) -> torch.device:
    """The device of that name; auto takes an accelerator if there is one.

    Raises:
        UserError: there is no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    count = torch.accelerator.device_count() if found else 0
    usable = ["cpu", *(f"{found.type}:{i}" for i in range(count) if found)]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` {name}: torch knows no such device; give auto or {' or '.join(usable)}") from error
    here = device.type == "cpu" or (found is not None and device.type == found.type and (device.index or 0) < count)
    require(here, f"`device` {name}: there is none here; give auto or {' or '.join(usable)}")
    return device
