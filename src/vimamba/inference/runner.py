"""A trained model on its device."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import nn

from vimamba.errors import UserError, require
from vimamba.processes import check_workers
from vimamba.tasks.options import Precision


@dataclasses.dataclass
class DeviceOptions:
    """What to compute on.

    Args:
        device: cpu, cuda, cuda:1, mps ...; auto takes the fastest
        precision: 32-true, bf16-mixed or 16-mixed
        batch_size: images at once
        num_workers: processes that decode images; chosen by the machine if not given
    """

    device: str = "auto"
    precision: Precision = "32-true"
    batch_size: int = 64
    num_workers: int | None = None

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"`batch_size` is {self.batch_size}; it must be at least 1")
        check_workers(self.num_workers)


class Runner:
    """A model on its device, run without gradients at the precision asked for."""

    def __init__(self, model: nn.Module, device: str = "auto", precision: Precision = "32-true"):
        self.device = pick_device(device)
        types = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        require(precision in types, f"`precision` {precision}: give {', '.join(types)}")
        self.dtype = types[precision]
        try:
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"`device` {device}: {str(error).splitlines()[0]}") from error

    @torch.inference_mode()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The model's outputs, in float32 and on its device."""
        lower: Any = contextlib.nullcontext()
        if self.dtype is not None:
            lower = torch.autocast(self.device.type, self.dtype)
        with lower:
            return self.model(images_BCHW.to(self.device, non_blocking=True)).float()


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
