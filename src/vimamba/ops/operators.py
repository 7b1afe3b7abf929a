"""The operators vimamba::*: defining them, and what Python does for them.

The library of CPU kernels defines those of the forward passes itself, with kernels of its own: a program that
torch.export saved runs where only the library is loaded. Without the library they are defined here, alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vimamba.ops.cpu import library


def define(name: str, schema: str) -> None:
    """Define the operator vimamba::`name`, unless the library of CPU kernels has.

    Raises:
        ImportError: the library is another version's.
    """
    if not hasattr(torch.ops.vimamba, name):
        torch.library.define(f"vimamba::{name}", schema)
        return
    found, wanted = getattr(torch.ops.vimamba, name).default._schema, torch._C.parse_schema(f"vimamba::{name}{schema}")
    if found != wanted:
        raise ImportError(
            f"{library.PATH} defines {found}, and this vimamba needs {wanted}: install vimamba again (`make install`)"
        )


def implement(name: str, function: Callable[..., Any]) -> None:
    """Have vimamba::`name` call `function`, which chooses a backend, on every device.

    Under this key it goes before the library's own kernels; see cpu/ops.cpp.
    """
    torch.library.impl(f"vimamba::{name}", "CompositeExplicitAutogradNonFunctional", function)


def first_derivatives_only(name: str) -> None:
    """Have a second derivative through the backward operator `name` raise instead of being silently wrong."""

    def rule(ctx, *grads):
        raise RuntimeError(f"vimamba::{name} has no derivative: vimamba's ops have first derivatives only")

    torch.library.register_autograd(f"vimamba::{name}", rule)
