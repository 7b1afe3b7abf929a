"""A model with what chooses held constant, so that its mixers are linear in what they carry, and what each one carries.

A selective scan is y_i = sum_j C_i (prod_k exp(delta_k A)) delta_j B_j u_j: an attention over u, if delta, B and C are
constants (arXiv 2403.01590). Gates, SiLUs and the scales of norms are held likewise, as in MambaLRP (arXiv 2406.07592).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.errors import UserError
from vimamba.layers.grid import Layout, route
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.layers.mixers.directional import Scan
from vimamba.layers.mixers.mamba import _conv_reverse
from vimamba.layers.norm import LayerNorm, RMSNorm
from vimamba.models.token_model import TokenModel
from vimamba.ops import causal_conv1d, selective_scan


class Carried(NamedTuple):
    """What the scan of one direction is given, along its path; `rank_L` puts steps back in the order of the tokens."""

    u_BDL: Tensor
    delta_BDL: Tensor
    A_DN: Tensor
    B_BNL: Tensor
    C_BNL: Tensor
    D_D: Tensor
    reverse: bool
    order_L: Tensor
    rank_L: Tensor
    weight_BLG: Tensor | float
    """What the direction counts in the merge, in the order of the tokens: (batch, length or 1, 1)."""
    path: str

    def scan(self, u_BDL: Tensor) -> Tensor:
        """The scan of other values by the same delta, B and C, without what passes by in D."""
        return selective_scan(  # type: ignore[return-value]
            u_BDL, self.delta_BDL, self.A_DN, self.B_BNL, self.C_BNL, reverse=self.reverse
        )

    @property
    def name(self) -> str:
        """The path, and which way round."""
        return f"{self.path} {'backward' if self.reverse else 'forward'}"


class Layer(NamedTuple):
    """What one mixer did with an image: its directions, and how much each gave, as a share of all."""

    directions: list[Carried]
    shares_BG: Tensor
    layout: Layout
    pooled_at: int | None
    """The place of the pooled token, which no other layer sees."""


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
def frozen(model: TokenModel) -> Iterator[list[Layer]]:
    """The model's forward passes inside are linear in what the mixers carry; gives what each layer did, of the last.

    The outputs keep their values; their gradients are those of the linear model.
    """
    seen: list[Layer] = []
    with _frozen_methods(model, seen):
        handle = model.register_forward_pre_hook(lambda *_: seen.clear())
        try:
            yield seen
        finally:
            handle.remove()


@contextmanager
def _frozen_methods(model: TokenModel, seen: list[Layer]) -> Iterator[None]:
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        module.__dict__[name] = method
        replaced.append((module, name))

    try:
        for module in model.modules():
            if isinstance(module, BidirectionalMixer):
                replace(module, "_merged", _merged_of(module, seen))
            elif isinstance(module, (RMSNorm, LayerNorm)):
                replace(module, "forward", _norm_of(module))
        yield
    finally:
        for module, name in replaced:
            del module.__dict__[name]


def _norm_of(norm: RMSNorm | LayerNorm) -> Callable[[Tensor], Tensor]:
    """The norm, with its scale a constant."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(norm, LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        scale = (x.detach().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        bias = norm.bias if isinstance(norm, LayerNorm) else 0.0
        return x * scale * norm.weight + bias

    return forward


def _merged_of(mixer: BidirectionalMixer, seen: list[Layer]) -> Callable[..., Tensor]:
    """`DirectionalMixer._merged` with each direction on its own and its choices constant."""

    def merged(u: Tensor, weights_BLG: Tensor | None, reverse: bool, layout: Layout | None) -> Tensor:
        assert layout is not None  # models always give it
        scale = 1.0 if mixer.merge == "sum" else 1 / len(mixer.scans)
        total, parts, directions = None, [], []
        for i, scan in enumerate(mixer.scans):
            weight = scale if weights_BLG is None else scale * weights_BLG[..., i : i + 1].detach()
            carried = _carried(mixer, u, scan, reverse, layout, weight)
            y_BDL = carried.scan(carried.u_BDL) + carried.D_D[:, None] * carried.u_BDL
            y_BLD = y_BDL.transpose(1, 2)[:, carried.rank_L] * weight
            y_BLD = y_BLD * F.silu(u.chunk(2, dim=-1)[1]).detach()
            total = y_BLD if total is None else total + y_BLD
            parts.append(F.linear(y_BLD.detach(), mixer.out_proj.weight).norm(dim=(1, 2)))
            directions.append(carried._replace(u_BDL=carried.u_BDL.detach()))
        shares_BG = torch.stack(parts, 1)
        pooled_at = (u.shape[1] - 1 if directions[0].reverse else 0) if mixer.pooled_token else None
        seen.append(Layer(directions, shares_BG / shares_BG.sum(1, keepdim=True), layout, pooled_at))
        assert total is not None
        return total

    return merged


def _carried(
    mixer: BidirectionalMixer, u: Tensor, scan: Scan, reverse: bool, layout: Layout, weight: Tensor | float
) -> Carried:
    """What `BidirectionalMixer.one_direction` gives its scan."""
    if scan.path.along_rows:
        order = rank = torch.arange(u.shape[1], device=u.device)
    else:
        order, rank = route(scan.path, layout, u)
    direction = mixer._direction(scan, reverse)
    x_BDL = u.chunk(2, dim=-1)[0][:, order].transpose(1, 2)
    if mixer.conv2d is None:
        way = _conv_reverse(scan, reverse)
        x_BDL = causal_conv1d(x_BDL, direction.conv_weight.flatten(1), direction.conv_bias, reverse=way)
    u_BDL = x_BDL * x_BDL.detach().sigmoid()
    with torch.no_grad():
        rank_of_dt, state = direction.dt_proj_weight.shape[1], direction.A_log.shape[1]
        projected = F.linear(u_BDL.transpose(1, 2), direction.x_proj_weight)
        dt, B_BLN, C_BLN = projected.split([rank_of_dt, state, state], dim=-1)
        delta = F.softplus(F.linear(dt, direction.dt_proj_weight, direction.dt_bias))
    return Carried(
        u_BDL, delta.transpose(1, 2), direction.decay_rates.detach(), B_BLN.transpose(1, 2), C_BLN.transpose(1, 2),
        direction.D.detach(), direction.scan_reverse, order, rank, weight, scan.path.name,
    )  # fmt: skip
