"""What is measured: a model at one size, and the closure that runs it once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.errors import UserError, nearest
from vimamba.models.registry import count_flops, count_parameters, create_model

PASSES = ("forward", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("fused", "eager")
MODES = ("eager", "compile", "graph")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the comparison.

    Args:
        model: a name of vimamba or timm.
        size: height and width of the images, pixels.
        batch: images in one step.
        dtype: "float32", or what autocast computes in: "bfloat16" or "float16".
        passes: "forward" (inference) or "train" (forward, loss, backward and AdamW step).
        attention: "fused" or "eager" (the attention matrix is formed); without effect where there is no attention.
        device: "cpu" or "cuda".
        mode: "eager"; "compile", by torch.compile; or "graph", replayed from a CUDA graph (a forward pass only).
        model_args: keyword arguments of the model beyond its size.
        label: how the model is called in tables; its name, and the attention where there is one, by default.
    """

    model: str
    size: int
    batch: int = 1
    dtype: str = "float32"
    passes: str = "forward"
    attention: str = "fused"
    device: str = "cpu"
    mode: str = "eager"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    label: str = ""

    @property
    def combination(self) -> tuple[str, str, int, int]:
        """What entries must share to be compared."""
        return self.passes, self.dtype, self.batch, self.size


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model is before anything is run: its parameters, operations for one image, and whether it attends."""

    parameters: int
    flops: int
    attends: bool


def build(entry: Entry) -> nn.Module:
    """The model with random weights, on its device (which becomes the current one), ready for its pass.

    Raises:
        UserError: there is no such model, or it does not take such images.
    """
    if torch.device(entry.device).type == "cuda":
        torch.cuda.set_device(torch.device(entry.device).index or 0)
    torch.manual_seed(0)
    model = _create(entry)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = entry.attention == "fused"  # type: ignore[assignment]
    return model.to(entry.device).train(entry.passes == "train")


def _create(entry: Entry) -> nn.Module:
    try:
        try:
            model = create_model(entry.model, img_size=entry.size, **entry.model_args)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = create_model(entry.model, **entry.model_args)  # a network that takes any size
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError) or not str(error):
            raise
        raise UserError(f"{entry.model} cannot be built for {entry.size}×{entry.size} pixels: {error}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and entry.size < max(patch):
        raise UserError(
            f"{entry.model}: {entry.size}×{entry.size} pixels are smaller than one patch of {patch[0]}×{patch[1]}"
        )
    return model


def check_name(name: str) -> None:
    """Raise UserError unless there is such a model."""
    if not timm.is_model(name):
        raise UserError(f"model {name!r} is unknown{nearest(name, timm.list_models())}")


def attends(model: nn.Module) -> bool:
    """Whether the choice of fused or eager attention concerns this model."""
    return any(hasattr(module, "fused_attn") for module in model.modules())


def cost(entry: Entry) -> Cost:
    """Parameters and operations of the entry's model, without running it.

    Raises:
        UserError: there is no such model, or it does not take such images.
    """
    return _cost(Entry(entry.model, entry.size, model_args=entry.model_args))


@functools.cache
def _cost(entry: Entry) -> Cost:
    model = build(entry)
    try:
        flops = count_flops(model, (3, entry.size, entry.size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{entry.model} does not take {entry.size}×{entry.size} pixels: {error}") from error
    return Cost(count_parameters(model), flops, attends(model))


def images(entry: Entry) -> Tensor:
    """Random images for one step, the same for all entries of their size."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(entry.batch, 3, entry.size, entry.size, generator=generator).to(entry.device)


def step_of(entry: Entry, model: nn.Module) -> Callable[[], None]:
    """A function that does one step and waits until the device has done it.

    Raises:
        UserError: the mode is "graph" and the device has no CUDA graphs, or the pass is a training step.
    """
    x = images(entry)
    if entry.mode == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    step = _train_step(entry, model, x) if entry.passes == "train" else _forward_step(entry, model, x)
    on_gpu = torch.device(entry.device).type == "cuda"
    if entry.mode == "graph":
        if entry.passes == "train" or not on_gpu:
            raise UserError(f"mode graph is for forward passes on a GPU, not for {entry.passes} on {entry.device}")
        step = _graph(step)
    if not on_gpu:
        return step

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    return synchronised


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step's kernels as a CUDA graph, after a run outside it that compiles and allocates."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _autocast(entry: Entry) -> torch.autocast:
    device = torch.device(entry.device).type
    wide = entry.dtype == "float32"
    return torch.autocast(device, torch.bfloat16 if wide else DTYPES[entry.dtype], enabled=not wide)


def _forward_step(entry: Entry, model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), _autocast(entry):
            model(x)

    return step


def _train_step(entry: Entry, model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler(x.device.type, enabled=entry.dtype == "float16")
    targets = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> None:
        with _autocast(entry):
            loss = F.cross_entropy(model(x), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step
