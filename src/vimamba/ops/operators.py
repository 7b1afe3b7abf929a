"""The operators vimamba::*: defining them, and what Python does for them.

The library of CPU kernels defines those of the forward passes itself, with kernels of its own: a program that
torch.export saved runs where only the library is loaded. Without the library they are defined here, alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vimamba.ops import backends
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


class Differentiable:
    """The operator vimamba::`name` and its gradient, vimamba::`name`_backward, and the shortest way through them.

    Args:
        forward, backward: choose a backend and compute the operators.
        setup_context, rule: what autograd keeps of a forward pass, and does in a backward one: see
            `torch.library.register_autograd`.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
        rule: Callable[..., Any],
    ) -> None:
        self._forward, self._backward = forward, backward
        self._setup_context, self._rule = setup_context, rule
        self._operator, self._backward_operator = (getattr(torch.ops.vimamba, n) for n in (name, f"{name}_backward"))
        implement(name, forward)
        implement(f"{name}_backward", backward)
        torch.library.register_autograd(f"vimamba::{name}", rule, setup_context=setup_context)
        first_derivatives_only(f"{name}_backward")

    def forward(self, backend: str | None, x: Tensor) -> Callable[..., Any]:
        """What computes the operator on `x`: the backend itself where nothing but the numbers is wanted, a function of
        autograd where that is all that records them, or else the operator, for every trace and transformation.

        In small models the dispatcher's way through the operator takes as long as the work.
        """
        if backends.values_only(x) or backends.trait("differentiable", backend, x.device, x.dtype):
            return self._forward
        return self._recorded if backends.untraced(x) else self._operator

    def backward(self, x: Tensor) -> Callable[..., Any]:
        """What computes the gradient, from the gradient `x` of an output."""
        return self._backward if backends.values_only(x) else self._backward_operator

    def _recorded(self, *inputs: Any) -> Any:
        return _Recorded.apply(self, inputs, *_tensors(inputs))


class _Recorded(Function):
    """An operator as autograd alone sees it: its tensors, those of lists too, one by one."""

    @staticmethod
    def forward(ctx: Any, operator: Differentiable, inputs: Sequence[Any], *tensors: Tensor) -> Any:
        ctx.rule, ctx.counts = operator._rule, [len(_tensors([given])) for given in inputs]
        output = operator._forward(*inputs)
        operator._setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for gradient, count in zip(ctx.rule(ctx, *grads), ctx.counts, strict=True):
            several = isinstance(gradient, (list, tuple))
            found += gradient if several else [gradient] if count == 1 else [None] * count
        return None, None, *found


def _tensors(inputs: Sequence[Any]) -> list[Tensor]:
    """The tensors of an operator's arguments, one after the other."""
    found: list[Tensor] = []
    for given in inputs:
        if isinstance(given, Tensor):
            found.append(given)
        elif isinstance(given, (list, tuple)):
            found += [item for item in given if isinstance(item, Tensor)]
    return found
