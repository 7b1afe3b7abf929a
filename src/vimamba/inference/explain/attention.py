"""The hidden attention of a Vision Mamba for the token that its classifier reads, in time linear in the length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vimamba.inference.explain.frozen import Carried, Layer, frozen
from vimamba.layers.grid import Layout, split_tokens
from vimamba.models.token_model import TokenModel


def look(model: TokenModel, images: Tensor) -> list[Layer]:
    """What each layer did with images (batch, in_chans, height, width)."""
    with torch.no_grad(), frozen(model) as layers:
        model(images)
    return layers


def read_weights(model: TokenModel, layout: Layout) -> Tensor:
    """How much of each token the classifier reads, (length,): 1 at the class token, or alike for all patches ..."""
    tokens = torch.ones(1, layout.patches + len(layout.extras), 1, device=model.patch_embed.proj.weight.device)
    with torch.enable_grad():
        pooled = model.pool(tokens.requires_grad_())
        return torch.autograd.grad(pooled.mean(), tokens)[0][0, :, 0]


def attention(model: TokenModel, layers: Sequence[Layer]) -> list[Tensor]:
    """How much the read token takes from each token, layer by layer.

    Each is (batch, directions + 1, length): the mean over the channels of C_i prod exp(delta A) delta_j B_j's absolute
    value, for each direction as it counts in the merge and, last, for their sum. One product of a vector with the
    scan's Jacobian a direction; no matrix of length × length.
    """
    rows = []
    for layer in layers:
        plain = _without(layer.layout, layer.pooled_at)
        read_L = _padded(read_weights(model, plain)[None], layer.pooled_at)
        of_channels = [_row(carried, read_L) for carried in layer.directions]
        found = torch.stack([*of_channels, torch.stack(of_channels).sum(0)], 1).abs().mean(2)
        rows.append(_cut(found, layer.pooled_at))
    return rows


def rollout(model: TokenModel, layers: Sequence[Layer]) -> Tensor:
    """What the read token takes from each token of the first layer, (batch, length); it sums to 1.

    The product over the layers of (1 + A) / 2 (arXiv 2005.00928), where A is the mean over the channels of the scans
    by |B| and |C|, each row summing to 1, so that no share is negative.
    """
    row: Tensor | None = None
    of_index = _in_order(model, layers)
    for step in reversed(of_index):
        if row is None:
            plain = _without(step[0].layout, step[0].pooled_at)
            row = read_weights(model, plain).expand(len(step[0].shares_BG), -1)
        row = torch.stack([_rolled(layer, row) for layer in step]).mean(0)
    assert row is not None
    return row


def to_grid(values: Tensor, layout: Layout) -> Tensor:
    """Values of tokens (..., length) to a map (..., rows, columns) of the patches."""
    flat = values.flatten(0, -2)[..., None]
    patches = split_tokens(flat, layout.extras)[0][..., 0]
    return patches.reshape(*values.shape[:-1], *layout.grid)


def grid_layout(layer: Layer) -> Layout:
    """Where the tokens of the model stand, without the token that a layer pooled for itself."""
    return _without(layer.layout, layer.pooled_at)


def _in_order(model: TokenModel, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each step: one, or two that read the same tokens."""
    left = iter(layers)
    return [[next(left) for _ in step] for step in model.steps]


def _row(carried: Carried, read_BL: Tensor) -> Tensor:
    """(batch, dim, length): what a weighted sum of steps takes from each token, in each channel."""
    weighted = read_BL[:, :, None] * carried.weight_BLG  # (batch or 1, length, 1)
    cotangent = weighted[:, carried.order_L].transpose(1, 2).expand_as(carried.u_BDL)
    with torch.enable_grad():
        u_BDL = carried.u_BDL.detach().requires_grad_()
        (row_BDL,) = torch.autograd.grad(carried.scan(u_BDL), u_BDL, cotangent.to(u_BDL.dtype).contiguous())
    return row_BDL[:, :, carried.rank_L]


def _rolled(layer: Layer, row_BL: Tensor) -> Tensor:
    row_BL = _padded(row_BL, layer.pooled_at)
    positive = [c._replace(B_BNL=c.B_BNL.abs(), C_BNL=c.C_BNL.abs()) for c in layer.directions]
    with torch.no_grad():
        sums = [c.scan(torch.ones_like(c.u_BDL)).mean(1)[:, c.rank_L] * _flat(c.weight_BLG) for c in positive]
    total_BL = torch.stack(sums).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    taken = torch.stack([_row(c, row_BL / total_BL).mean(1) for c in positive]).sum(0)
    return _cut((row_BL + taken) / 2, layer.pooled_at)


def _flat(weight: Tensor | float) -> Tensor | float:
    return weight[..., 0] if isinstance(weight, Tensor) else weight


def _padded(values_BL: Tensor, pooled_at: int | None) -> Tensor:
    """With nothing at the pooled token, which is read by none."""
    if pooled_at is None:
        return values_BL
    return torch.nn.functional.pad(values_BL, (1, 0) if pooled_at == 0 else (0, 1))


def _cut(values: Tensor, pooled_at: int | None) -> Tensor:
    if pooled_at is None:
        return values
    return values[..., 1:] if pooled_at == 0 else values[..., :-1]


def _without(layout: Layout, pooled_at: int | None) -> Layout:
    """The layout that `with_token` got."""
    if pooled_at is None:
        return layout
    moved = int(pooled_at == 0)
    registers = tuple(place - moved for place in layout.registers if place != pooled_at)
    return Layout(layout.grid, tuple(place - moved for place in layout.classes), registers)
