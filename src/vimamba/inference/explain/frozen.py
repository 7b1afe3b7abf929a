"""Ways of running a model: looked at layer by layer, with what chooses held constant, or by some directions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vimamba.errors import UserError
from vimamba.inference.explain.layer import Layer
from vimamba.layers.grid import Layout
from vimamba.layers.mixers import BidirectionalMixer, DirectionalMixer
from vimamba.layers.mixers.directional import Scan
from vimamba.layers.norm import LayerNorm, RMSNorm
from vimamba.models.token_model import TokenModel
from vimamba.ops.mixer import frozen_backward

Merged = Callable[[Tensor, Tensor | None, bool, Layout | None], Tensor]
"""`DirectionalMixer._merged`."""


def require_tokens(model: nn.Module) -> TokenModel:
    """The model, if it is a stack of Mamba's mixers over one grid of tokens.

    Raises:
        UserError: it is another; the sentence says which methods take it.
    """
    if isinstance(model, TokenModel) and all(isinstance(block.mixer, BidirectionalMixer) for block in model.layers):
        return model
    raise UserError(
        f"`method`: hidden attention is that of a VisionMamba over the recurrence mamba, and the model is a "
        f"{type(model).__name__}; give gradcam or integrated_gradients"
    )


@contextmanager
def watched(model: nn.Module, see: Callable[[Layer], None]) -> Iterator[None]:
    """Forward passes inside show what each layer did, in their order."""

    def merged_of(mixer: DirectionalMixer, merged: Merged) -> Merged:
        def seen(u: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
            assert layout is not None  # models always give it
            see(Layer(mixer, u, weights_BLG, reverse, layout))
            return merged(u, weights_BLG, reverse, layout)

        return seen

    with _replaced({mixer: ("_merged", merged_of(mixer, mixer._merged)) for mixer in _mixers(model)}):
        yield


@contextmanager
def frozen(model: TokenModel) -> Iterator[None]:
    """Forward passes inside are linear in the image: gates, SiLUs, GELUs, delta, B, C and norms are constants.

    The outputs keep their values; their gradients, which only what is put in may ask for, are those of the linear
    model.
    """

    def merged_of(mixer: DirectionalMixer, merged: Merged) -> Merged:
        def linear(u: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
            assert layout is not None  # models always give it
            weights_BLG = None if weights_BLG is None else weights_BLG.detach()
            return _Linear.apply(u, Layer(mixer, u.detach(), weights_BLG, reverse, layout), merged)

        return linear

    methods: dict[nn.Module, tuple[str, Callable[..., Any]]] = {
        mixer: ("_merged", merged_of(mixer, mixer._merged)) for mixer in _mixers(model)
    }
    for module in model.modules():
        if isinstance(module, (RMSNorm, LayerNorm)):
            methods[module] = "forward", _norm_of(module)
        elif isinstance(module, nn.GELU):  # of a convolutional stem
            methods[module] = "forward", _gelu
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:  # else each layer would keep its input for their gradients
            parameter.requires_grad_(False)
        with _replaced(methods):
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()


@contextmanager
def facing(model: nn.Module, backward: bool) -> Iterator[None]:
    """Forward passes inside go without the directions that run the other way round."""

    def merged_of(mixer: DirectionalMixer, merged: Merged) -> Merged:
        def masked(u: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
            kept = u.new_tensor([(scan.reverse != reverse) == backward for scan in mixer.scans])
            weights_BLG = kept.expand(len(u), 1, -1) if weights_BLG is None else weights_BLG * kept
            return merged(u, weights_BLG, reverse, layout)

        return masked

    with _replaced({mixer: ("_merged", merged_of(mixer, mixer._merged)) for mixer in _mixers(model)}):
        yield


def _mixers(model: nn.Module) -> list[DirectionalMixer]:
    return [module for module in model.modules() if isinstance(module, DirectionalMixer)]


@contextmanager
def _replaced(methods: dict[Any, tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    try:
        for module, (name, method) in methods.items():
            module.__dict__[name] = method
        yield
    finally:
        for module, (name, _) in methods.items():
            module.__dict__.pop(name, None)


class _Linear(torch.autograd.Function):
    """`_merged` by the mixer's own kernels, and its gradient with what chooses held constant."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, layer: Layer, merged: Merged) -> Tensor:
        ctx.layer = layer
        return merged(u, layer.weights_BLG, layer.reverse, layer.layout)

    @staticmethod
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor, None, None]:
        layer: Layer = ctx.layer
        du_BLE = torch.zeros_like(layer.u)
        dx_BLD = du_BLE[..., : dy_BLD.shape[-1]]
        for _, first, scans in layer.mixer.scans_of_paths:
            dx_BLD += _path_backward(layer, first, scans, dy_BLD)
        return du_BLE, None, None


def _path_backward(layer: Layer, first: int, scans: Sequence[Scan], dy_BLD: Tensor) -> Tensor:
    """The gradient of x by all directions of a path: by one kernel, where there is one and it knows their modules."""
    mixer: Any = layer.mixer
    directions, weights_BLG = mixer.fused_directions(scans, layer.reverse), layer.weights_BLG
    if directions is not None:
        if weights_BLG is not None:
            weights_BLG = layer.along(weights_BLG[..., first : first + len(scans)], first)
        dy_along_BLD, u_BLE = layer.along(dy_BLD, first), layer.along(layer.u, first)
        fused_BLD = frozen_backward(dy_along_BLD, u_BLE, directions, mixer.merge_scale, weights_BLG)
        if fused_BLD is not None:
            return layer.back(fused_BLD, first)
    dy_BLD = nn.functional.silu(layer.u.chunk(2, dim=-1)[1]).mul_(dy_BLD)
    indices = range(first, first + len(scans))
    return torch.stack([_direction_backward(layer, i, dy_BLD * layer.weight(i)) for i in indices]).sum(0)


def _direction_backward(layer: Layer, index: int, dy_BLD: Tensor) -> Tensor:
    mixer: Any = layer.mixer
    dy_BDL = layer.along(dy_BLD, index).transpose(1, 2)
    x_BDL = layer.read(index).detach().requires_grad_()
    with torch.enable_grad():
        convolved_BDL = layer.convolved(index, x_BDL)
    D_D1 = getattr(mixer, mixer.names[mixer.scans[index].weights].D).detach()[:, None]
    du_BDL = layer.carried(index, convolved_BDL.detach()).transposed(dy_BDL).addcmul_(D_D1, dy_BDL)
    sigmoid_BDL = convolved_BDL.detach().sigmoid()
    (dx_BDL,) = torch.autograd.grad(convolved_BDL, x_BDL, sigmoid_BDL.mul_(du_BDL))
    return layer.back(dx_BDL.transpose(1, 2), index)


def _gelu(x: Tensor) -> Tensor:
    """The activation, with its gate a constant."""
    return x * torch.special.ndtr(x.detach())


def _norm_of(norm: RMSNorm | LayerNorm) -> Callable[[Tensor], Tensor]:
    """The norm, with its scale a constant."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(norm, LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        scale = (x.detach().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        bias = norm.bias if isinstance(norm, LayerNorm) else 0.0
        return x * scale * norm.weight + bias

    return forward
