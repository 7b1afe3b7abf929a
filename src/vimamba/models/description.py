"""What a file says of its model, checked before anything is built from it: the file may be a stranger's.

A description names a registered model and arguments of that model's own constructor. It is held against the tensors
beside it: the model is built without memory first, no further than those tensors could reach, and its names and shapes
must be theirs. Nothing that a description says is fetched, opened, written or called.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import threading
import typing
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from vimamba.errors import UserError, nearest, one_line, shown
from vimamba.kinds import fits
from vimamba.layers.mixers import RECURRENCES
from vimamba.models.checkpoints import check_fit
from vimamba.models.pyramid import VisionMambaPyramid
from vimamba.models.vision_mamba import VisionMamba

MAX_TEXT = 200  # letters of an argument
MAX_BUFFERS = 2**26  # numbers that a model computes for itself and its file does not hold
# Of timm's way from a name to a model, not of a model: they fetch, read, write, or choose where the model is made.
BUILDING = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("device", "dtype"),
}


def described_model(described: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """The model that a file describes, on the meta device.

    Args:
        described: what the file says: model, model_args, class_names, preprocessing.
        tensors: the state dict beside it.

    Raises:
        UserError: it says something that it may not, or that the tensors belie.
    """
    try:
        prep = described["preprocessing"]
        name, model_args, classes = described["model"], described["model_args"], len(described["class_names"])
        channels, size = prep["in_chans"], prep["img_size"]
    except (TypeError, KeyError) as error:
        raise UserError(f"the description of the model lacks a part ({one_line(error)})") from None
    if not fits(int, channels) or not fits(tuple[int, int], size) or min(size) < 1:
        raise UserError(f"the description asks for images of {shown(size)} pixels and {shown(channels)} channels")
    given = {"num_classes": classes, "in_chans": channels}
    return skeleton(name, model_args, {}, lambda: create(name, tuple(size), **{**given, **model_args}), tensors)


def skeleton(
    name: Any, model_args: Any, head: Any, build: Callable[[], nn.Module], tensors: dict[str, Tensor]
) -> nn.Module:
    """A described model on the meta device: whatever its sizes, it takes no memory and at most about a second.

    Args:
        name: of the model, or of the trunk of a larger one.
        model_args: its arguments.
        head: those of what stands on the trunk.
        build: makes it.
        tensors: the state dict beside the description.

    Raises:
        UserError: the description says something that it may not, or that the tensors belie.
    """
    check_registered(name)
    sizes = [len(tensors), *(size for tensor in tensors.values() if tensor.numel() for size in tensor.shape)]
    check_plain(model_args, largest=32 * max(sizes), most=64 + len(tensors))
    check_plain(head)
    try:
        with _weightless(1000 + 20 * len(tensors)):
            if model_args:
                check_arguments(name, model_args)
            model = build()
        check_fit(model.state_dict(), tensors)
    except UserError:
        raise
    except Exception as error:  # each architecture checks its arguments in its own way
        raise UserError(f"{name} cannot be built from {shown(model_args)}: {one_line(error)}") from None
    computed = sum(buffer.numel() for buffer in model.buffers()) - sum(tensor.numel() for tensor in tensors.values())
    if computed > MAX_BUFFERS:
        raise UserError(f"{name} with {shown(model_args)} needs tables of {computed} numbers")
    return model


def create(name: str, img_size: tuple[int, int] | None, **given: Any) -> nn.Module:
    """timm.create_model; img_size goes to the models that take one."""
    if img_size:
        try:
            return timm.create_model(name, **{"img_size": img_size, **given})
        except TypeError as error:
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **given)


def check_registered(name: Any) -> None:
    """Refuse a name that is not a registered model's, with or without a tag; so one with a scheme, which would fetch.

    Raises:
        UserError: it is not.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}(\.\w{1,100})?", name) or not timm.is_model(name):
        hint = nearest(name[:100], timm.list_models()) if isinstance(name, str) and ":" not in name else ""
        way_out = hint or "; a file may only name one that `vimamba models` or timm lists"
        raise UserError(f"its model is {shown(name)}: there is no such model{way_out}")


def check_plain(model_args: Any, largest: float = math.inf, most: int = 10_000) -> None:
    """Refuse arguments that are not plain values, or larger or more than the model's tensors allow.

    Raises:
        UserError: they are, named.
    """
    if not isinstance(model_args, dict) or not all(isinstance(name, str) for name in model_args):
        raise UserError(f"model_args is {shown(model_args)}, not arguments by name")
    left = most
    for name, argument in model_args.items():
        for value in _scalars(argument):
            left -= 1
            wrong = (
                "more values than the model can use" if left < 0
                else "not a plain value" if not isinstance(value, str | bool | int | float | None)
                else "too long" if isinstance(value, str) and len(value) > MAX_TEXT
                else "not finite" if isinstance(value, float) and not math.isfinite(value)
                else "too large for this file" if isinstance(value, int) and abs(value) > largest
                else ""
            )  # fmt: skip
            if wrong:
                raise UserError(f"the argument {shown(name)} is {shown(argument)}: {wrong}")


def _scalars(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, list | tuple) and depth < 3:  # deeper ones are handed out as they are, and refused
        for item in value:
            yield from _scalars(item, depth + 1)
    else:
        yield value


def check_arguments(name: str, model_args: dict[str, Any]) -> None:
    """Refuse arguments that are not of the model's own constructor, or not of the kind that it says.

    Raises:
        UserError: one is not, named.
    """
    with _weightless():
        kinds = arguments_of(type(timm.create_model(name)))
    for argument, value in model_args.items():
        if argument not in kinds:
            hint = "" if argument in BUILDING else nearest(argument[:100], kinds)
            raise UserError(f"{shown(argument)} is no argument of {name} that a file may give{hint}")
        if not fits(kinds[argument], value, texts=False):
            raise UserError(f"the argument {argument} of {name} cannot be {shown(value)}")


def arguments_of(model_class: type) -> dict[str, Any]:
    """The arguments of a model's constructor that describe it, with their kinds."""
    owners: list[type] = [model_class]
    if issubclass(model_class, VisionMamba | VisionMambaPyramid):
        owners += [made_by for made_by in RECURRENCES.values() if isinstance(made_by, type)]  # they pass the others on
    kinds: dict[str, Any] = {}
    for owner in owners:
        constructor = owner.__init__  # type: ignore[misc]
        hints = typing.get_type_hints(constructor)
        for parameter in inspect.signature(constructor).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                kinds.setdefault(parameter.name, hints.get(parameter.name, type(parameter.default)))
    return {argument: kind for argument, kind in kinds.items() if argument not in BUILDING | {"self"}}


class _RatesOnCpu(TorchFunctionMode):
    """Drop path rates, from torch.linspace, are read while a model is built: they cannot be meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({**(kwargs or {}), "device": "cpu"} if func is torch.linspace else kwargs or {}))


@contextlib.contextmanager
def _weightless(most: float = math.inf) -> Iterator[None]:
    """Inside, tensors take no memory, and no model of more than `most` modules and parameters is built to its end."""
    thread, count = threading.get_ident(), 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise ValueError("it has many more parts than the file has tensors")

    handles = [
        hooks.register_module_module_registration_hook(registered),
        hooks.register_module_parameter_registration_hook(registered),
    ]
    try:
        with torch.device("meta"), _RatesOnCpu():
            yield
    finally:
        for handle in handles:
            handle.remove()
