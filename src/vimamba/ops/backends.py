"""Which implementation of the ops runs: their names, what each needs, and the choice by device and type.

A backend is a module with the functions `scan_forward`, `scan_backward`, `conv_forward`, `conv_backward`,
`norm_forward` and `norm_backward` on arguments that the public functions have already checked, and,
where it fuses the whole mixer, `mixer_forward` (with `mixer_takes_gates`, if it does) and `mixer_backward`, and
`linear` with `linear_pays` where it has a product of its own. The plain loop in `reference.py` is not among them: it
is ordinary differentiable PyTorch that the public functions call directly.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vimamba.errors import nearest

CHUNK = 64
"""Steps between the states that a forward pass keeps for its backward pass."""


def chunks(length: int) -> int:
    """How many states a forward pass over `length` steps saves."""
    return (length + CHUNK - 1) // CHUNK


MODULES = {"torch": "chunked", "cpu": "cpu", "triton": "triton"}
NAMES = ("reference", *MODULES)


@cache
def load(name: str) -> ModuleType:
    """Import the module of the backend `name`."""
    return importlib.import_module(f"vimamba.ops.{MODULES[name]}")


def status(device: torch.device | str | None = None) -> dict[str, str | None]:
    """For each backend None if it is usable (on `device`, where given), else one sentence that says why not."""
    where = torch.device(device) if device is not None else None
    return {"reference": None} | {name: load(name).unavailable(where) for name in MODULES}


def check(name: str | None) -> None:
    """Raise ValueError unless `name` is None or the name of a backend."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {name!r}{nearest(name, NAMES)}")


def resolve(name: str, device: torch.device, *dtypes: torch.dtype) -> ModuleType:
    """The module that runs: the backend `name`, or for "" the fastest one usable for this device and these types.

    Raises ValueError if a backend asked for by name cannot run here.
    """
    if name:
        module = load(name)
        reason = module.unavailable(device)
        missing = [str(dtype).removeprefix("torch.") for dtype in dtypes if not module.supports(dtype)]
        if reason is None and missing:
            reason = f"it has no {missing[0]} kernels"
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run on {device}: {reason}")
        return module
    return _fastest(device, dtypes)


@cache
def _fastest(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> ModuleType:
    module = load({"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch"))
    usable = module.unavailable(device) is None and all(map(module.supports, dtypes))
    return module if usable else load("torch")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; it does not know the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def values_only(x: Tensor) -> bool:
    """Whether nothing but the numbers is wanted of an op on `x`: no gradient and no trace of any kind.

    The public functions then call the backend themselves: in small models the dispatcher's way through the operator
    takes as long as the work.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_grad_enabled()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow, for which the forward should keep its states.

    An exported or traced graph is run for its values: where it is differentiated after all, the backward pass computes
    the states again.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def first_derivatives_only(op: str) -> None:
    """Have a second derivative through the backward op `op` raise instead of being silently wrong."""

    def rule(ctx, *grads):
        raise RuntimeError(f"{op} has no derivative: vimamba's ops have first derivatives only")

    torch.library.register_autograd(op, rule)
