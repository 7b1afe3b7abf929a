"""Matrix products and convolutions as modules have them, in the type in which this machine multiplies fastest."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from vimamba.layers.intact import intact, watched
from vimamba.ops import linear
from vimamba.ops.backends import compute_dtype, products_are_slow, untraced, without_autocast


def project(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, by the kernels of `ops.linear` where it is one."""
    if isinstance(module, nn.Linear) and intact(module, nn.Linear) and not watched(x):
        return linear(x, module.weight, module.bias)
    return module(x)


def without_slow_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, if PyTorch has no instructions for products of its type on the device of `x`."""
    return without_autocast(x.device) if _multiplies_slowly(x) else nullcontext()


def in_quick_type(module: nn.Module, x: Any) -> Any:
    """module(x); in float32, with the result in the lower type, where PyTorch has no instructions for products of it.

    Args:
        module: of one argument.
        x: a tensor, or a list or dict of tensors, as the module takes it. What comes back is of that kind too.
    """
    first: Any = tree_leaves(x)[0]
    if not _multiplies_slowly(first):
        return module(x)
    dtype = compute_dtype(first)
    lower = {k: v for k, v in chain(module.named_parameters(), module.named_buffers()) if v.dtype == dtype}
    if module.training and any(not isinstance(v, nn.Parameter) for v in lower.values()):
        return module(x)  # running statistics: copies would lose them
    with without_autocast(first.device):
        y = functional_call(module, {k: v.float() for k, v in lower.items()}, (tree_map(Tensor.float, x),))
    return tree_map(lambda tensor: tensor.to(dtype), y)


def _multiplies_slowly(x: Tensor) -> bool:
    return untraced(x) and products_are_slow(x.device, compute_dtype(x))
