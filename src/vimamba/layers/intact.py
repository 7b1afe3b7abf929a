"""Whether a module may be skipped for its weights: nobody replaced it, hooked it or looks on.

Fused kernels take the weights of several modules at once. LoRA, pruning, parametrisation, quantisation and forward
hooks put something else in a module's place or around its call; then the module is called.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as registry

_PLAIN = frozenset({nn.Parameter, torch.Tensor, type(None), FakeTensor, FunctionalTensor})
"""Types of weights that are no more than their numbers; the last two, while a model is traced."""


def intact(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether `module` is of exactly one of these types, with neither hooks nor a forward method of its own, and its
    weights are tensors and not what stands for one (as torchao's do)."""
    state = module.__dict__  # asked of every module at every call, so for what it costs
    changed = (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )
    return type(module) in kinds and not changed and _PLAIN.issuperset(map(type, state["_parameters"].values()))


def weight_of(module: Any, name: str) -> Any:
    """A weight of a module by its name, for what looking it up costs: as an attribute it costs ten times as much."""
    weights = module._parameters
    return weights[name] if name in weights else getattr(module, name)


def own_methods(module: nn.Module) -> bool:
    """Whether its methods are those of its class: none was replaced on the instance."""
    kind: Any = type(module)
    return _methods(kind).isdisjoint(module.__dict__)


@cache
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def watched(x: Any) -> bool:
    """Whether somebody looks at every module: by hooks on all of them, or by tracing `x` symbolically."""
    return bool(
        isinstance(x, torch.fx.Proxy)
        or registry._global_forward_hooks
        or registry._global_forward_pre_hooks
        or registry._global_backward_hooks
        or registry._global_backward_pre_hooks
    )
