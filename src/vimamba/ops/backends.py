"""Who computes the ops: what a backend must have and may have, which ones there are, and the choice between them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from vimamba.errors import UserError, nearest
from vimamba.ops import composed_mixer
from vimamba.ops.block_weights import BlockWeights, blocks_of
from vimamba.ops.direction import directions_of, flat
from vimamba.ops.sizes import INTEGER_MAX, chunks

Gradient = Any  # a tensor, or None where the input was None


class Backend(ABC):
    """What computes the ops. Subclass it, give it a name and at least the three forward functions, and `register` it.

    The arguments have been checked and stand by position. Activations (u, delta, z, x, xz) are of one type that
    the backend supports, with any strides; states and weights are in the wide type, float32, or float64 beside float64.

    Shapes: B batch, D dim, L length, N state, G groups, K saved states, W width of the convolution, E channels of
    the norm, R directions. Matrices B and C are (B, G, N, L), each with groups of its own, or constant (D, N).
    """

    name: str
    """What `backend=` calls it."""

    differentiable = False
    """Whether the forward functions are ordinary PyTorch: gradients come from autograd through them, and neither the
    operators nor the backward functions are used."""

    skips_closed_gates = False
    """Whether `mixer_forward` does not compute a direction for the images whose gate is 0."""

    fuses_blocks = False
    """Whether `blocks` is faster than the layers one by one."""

    def __str__(self) -> str:
        """Its name, and what else tells one machine's numbers from another's."""
        return self.name

    def unavailable(self, device: torch.device | None = None, /) -> str | None:
        """None if it runs (on `device`, where given), else one sentence that says why not."""
        return None

    def supports(self, dtype: torch.dtype, /) -> bool:
        """Whether it takes activations of this type."""
        return dtype.is_floating_point

    def saved_states(self, length: int, /) -> int:
        """K, how many states a scan over `length` steps saves for its backward pass; 0 if that needs none."""
        return chunks(length)

    # What it must have.

    @abstractmethod
    def scan_forward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool, reverse: bool, save_states: bool, /,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The output (B, D, L) in u's layout, the last state (B, D, N), and the saved states (B, K, D, N), or (0,)."""

    @abstractmethod
    def conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, /) -> Tensor:
        """The causal convolution of x (B, D, L) by weight (D, W), and SiLU, in x's layout."""

    @abstractmethod
    def norm_forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised sum of x and residual (..., E) in `out_dtype`, the sum, and 1 / its root mean square (...)."""

    # What it must have to train, unless it is `differentiable`.

    def scan_backward(
        self, dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, states: Tensor, delta_softplus: bool,
        reverse: bool, /,
    ) -> tuple[Gradient, ...]:  # fmt: skip
        """The gradients of u, delta, A, B, C, D, z and delta_bias, those of u, delta and z in their layouts."""
        raise self._lacks("scan_backward")

    def conv_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, /
    ) -> tuple[Tensor, Tensor, Gradient]:
        """The gradients of x, in its layout, of the weight and of the bias."""
        raise self._lacks("conv_backward")

    def norm_backward(
        self, dnormed: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, /
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the sum, with what arrives at the sum itself (`dtotal`), and of the weight."""
        raise self._lacks("norm_backward")

    # What it may have: where it is faster than PyTorch, or than the functions above one after the other.

    def has_linear(self, x: Tensor, /) -> bool:
        """Whether `linear` is faster than PyTorch's on `x`."""
        return False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """torch.nn.functional.linear, all of one type; also with a weight that is the transpose of a contiguous one."""
        return F.linear(x, weight, bias)

    def quantized_linear(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, /) -> Tensor:
        """See `vimamba.ops.quantized_linear`."""
        wide = x.to(scales.dtype)
        largest = wide.abs().amax(-1, keepdim=True)
        step = torch.where(largest > 0, largest / INTEGER_MAX, 1.0)
        out = F.linear((wide / step).round(), weight.to(wide.dtype)) * step * scales
        return (out if bias is None else out + bias).to(x.dtype)

    def mixer_forward(
        self, xz: Tensor, weights: Sequence[Tensor], reverse: Sequence[int], scale: float, gates: Tensor | None,
        save_states: bool, /,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The mixed tokens (B, L, D) and the saved states (R, B, K, D, N), or (R, 0); see `vimamba.ops.mixer`.

        `weights` and `reverse` are those of all directions (see `direction.flat`), `gates` (B, L or 1, R) or None.
        """
        return composed_mixer.forward(self, xz, directions_of(weights, reverse), scale, gates, save_states)

    def mixer_backward(
        self, dout: Tensor, xz: Tensor, weights: Sequence[Tensor], reverse: Sequence[int], states: Tensor,
        scale: float, /,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The gradients of xz and of the weights, from a forward pass without gates."""
        return composed_mixer.backward(self, dout, xz, directions_of(weights, reverse), states, scale)

    def mixer_frozen_backward(
        self, dout: Tensor, xz: Tensor, weights: Sequence[Tensor], reverse: Sequence[int], scale: float,
        gates: Tensor | None, /,
    ) -> Tensor | None:  # fmt: skip
        """The gradient of x (B, L, D), see `mixer.frozen_backward`; None where there is no kernel for it."""
        return None

    def blocks(
        self, stream: Tensor, weights: Sequence[BlockWeights], scale: float, eps: float, dtype: torch.dtype, /
    ) -> Tensor:
        """The stream (B, L, E), in the wide type, after blocks whose activations are in `dtype`; values only."""
        hidden = None
        for w in weights:
            x, residual = (stream, None) if hidden is None else (hidden, stream)
            normed, stream, _ = self.norm_forward(x, residual, w.norm.to(stream.dtype), eps, dtype)
            xz = self._project(normed, w.in_proj, w.in_bias, w.in_scales)
            of_directions, reverse = flat(w.directions)
            of_directions = [weight.to(stream.dtype) for weight in of_directions]
            y, _ = self.mixer_forward(xz, of_directions, reverse, scale, None, False)
            hidden = self._project(y, w.out_proj, w.out_bias, w.out_scales)
        return stream if hidden is None else stream + hidden

    def exported_blocks(
        self, stream: Tensor, weights: Sequence[Tensor], reverse: Sequence[int], directions: int, scale: float,
        eps: float, /,
    ) -> Tensor:  # fmt: skip
        """`blocks` in float32 of what `flat_blocks` made flat, for exported programs."""
        return self.blocks(stream, blocks_of(weights, reverse, directions), scale, eps, stream.dtype)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
        if scales is not None:
            return self.quantized_linear(x, weight, scales, bias)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _lacks(self, function: str) -> UserError:
        return UserError(
            f"backend={self.name!r} has no {function}: it computes values only, train with another backend"
        )


MODULES = {"reference": "reference", "torch": "pytorch", "cpu": "cpu", "triton": "triton"}
"""Our backends: the module, loaded when it is first asked for, whose `BACKEND` each is."""
FASTEST = {"cpu": "cpu", "cuda": "triton"}
"""The backend for each type of device, where the caller names none and it can run; for all others, "torch"."""
_known: dict[str, Backend] = {}
"""Those of ours that were asked for, and those that were registered."""


def register(backend: Backend, *, fastest_on: Iterable[str] = ()) -> None:
    """Make a backend known by its name; choose it on these types of device ("cpu", "cuda") where the caller names none.

    Raises:
        UserError: there is a backend of that name.
    """
    if backend.name in names():
        raise UserError(f"there is a backend {backend.name!r} already: give this one another name")
    _known[backend.name] = backend
    FASTEST.update(dict.fromkeys(fastest_on, backend.name))
    _fastest.cache_clear()


def names() -> tuple[str, ...]:
    """What `backend=` may be."""
    return tuple(MODULES | _known)


def load(name: str) -> Backend:
    """The backend `name`, which may be unable to run here."""
    if name not in _known:
        _known[name] = importlib.import_module(f"vimamba.ops.{MODULES[name]}").BACKEND
    return _known[name]


def status(device: torch.device | str | None = None) -> dict[str, str | None]:
    """For each backend None if it is usable (on `device`, where given), else one sentence that says why not."""
    where = torch.device(device) if device is not None else None
    return {name: load(name).unavailable(where) for name in names()}


def check(name: str | None) -> None:
    """Raise UserError unless `name` is None or the name of a backend."""
    if name is not None and name not in names():
        raise UserError(f"backend must be None or one of {', '.join(names())}, got {name!r}{nearest(name, names())}")


def resolve(name: str, device: torch.device, *dtypes: torch.dtype) -> Backend:
    """The backend that runs: the one called `name`, or for "" the fastest one usable for this device and these types.

    Raises UserError if a backend asked for by name cannot run here.
    """
    if not name:
        return _fastest(device, dtypes)
    backend = load(name)
    reason = backend.unavailable(device)
    missing = [str(dtype).removeprefix("torch.") for dtype in dtypes if not backend.supports(dtype)]
    if reason is None and missing:
        reason = f"it has no {missing[0]} kernels"
    if reason is not None:
        raise UserError(f"backend={name!r} cannot run on {device}: {reason}")
    return backend


@cache
def _fastest(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    backend = load(FASTEST.get(device.type, "torch"))
    usable = backend.unavailable(device) is None and all(map(backend.supports, dtypes))
    return backend if usable else load("torch")


@torch.compiler.assume_constant_result
def trait(which: str, name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """What the backend that runs says of itself, `differentiable` or `skips_closed_gates`; torch.compile asks once."""
    return getattr(resolve(name or "", device, dtype), which)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; it does not know the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, if it is on."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products with `x` run: autocast's, where it is on, but float64 stays."""
    lower = autocasts(x.device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if lower else x.dtype


def products_are_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies this type one number at a time: on a CPU that has no instructions for it.

    Its linear layers take 8 times as long as in float32 then, its convolutions 25 to 60 times.
    """
    return dtype in _INSTRUCTIONS and device.type == "cpu" and not _has_instructions(dtype)


_INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    asks = getattr(torch.ops.mkldnn, _INSTRUCTIONS[dtype], None)  # PyTorch may be built without oneDNN
    return asks is not None and asks()


def values_only(x: Tensor) -> bool:
    """Whether nothing but the numbers is wanted of an op on `x`: no gradient and no trace of any kind."""
    return not torch.is_grad_enabled() and untraced(x)


def untraced(x: Tensor) -> bool:
    """Whether an op on `x` is computed and no more: nothing records, transforms or counts it but autograd."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
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
