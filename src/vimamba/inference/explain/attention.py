"""The hidden attention of a Vision Mamba for the token that its classifier reads, in time linear in the length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimamba.inference.explain.frozen import watched
from vimamba.inference.explain.layer import SMALLEST, Carried, Layer
from vimamba.layers.grid import Layout, split_tokens
from vimamba.models.token_model import TokenModel


def look(model: TokenModel, images: Tensor) -> list[Layer]:
    """What each layer did with images (batch, in_chans, height, width)."""
    layers: list[Layer] = []
    with torch.no_grad(), watched(model, layers.append):
        model(images)
    return layers


def read_weights(model: TokenModel, layout: Layout) -> Tensor:
    """How much of each token the classifier reads, (length,): 1 at the class token, or alike for all patches ..."""
    tokens = torch.ones(1, layout.patches + len(layout.extras), 1, device=model.patch_embed.proj.weight.device)
    with torch.enable_grad():
        pooled = model.pool(tokens.requires_grad_())
        return torch.autograd.grad(pooled.mean(), tokens)[0][0, :, 0]


@torch.no_grad()
def attention(model: TokenModel, layer: Layer) -> Tensor:
    """How much the read token takes from each token in a layer, (batch, directions + 1, length).

    The mean over the channels of C_i prod exp(delta A) delta_j B_j's absolute value, for each direction as it counts
    in the merge and, last, for their sum. One product of a vector with the scan's Jacobian a direction; no matrix of
    length × length.
    """
    read_L = _padded(read_weights(model, grid_layout(layer))[None], layer.pooled_at)
    rows = [_row(layer, i, read_L) for i in range(len(layer.mixer.scans))]
    rows_BGLD = torch.stack([*rows, sum(rows[1:], rows[0])], 1)
    return _cut(rows_BGLD.abs().mean(-1), layer.pooled_at)


@torch.no_grad()
def rollout(model: TokenModel, layers: Sequence[Layer]) -> Tensor:
    """What the read token takes from each token of the first layer, (batch, length); it sums to 1.

    The product over the layers of (1 + A) / 2 (arXiv 2005.00928), where A is the mean over the channels of the scans
    by |B| and |C|, each row summing to 1, so that no share is negative.
    """
    row: Tensor | None = None
    of_index = _in_order(model, layers)
    for step in reversed(of_index):
        if row is None:
            row = read_weights(model, grid_layout(step[0])).expand(len(step[0].u), -1)
        row = torch.stack([_rolled(layer, row) for layer in step]).mean(0)
    assert row is not None
    return row


def to_grid(values: Tensor, layout: Layout) -> Tensor:
    """Values of tokens (..., length) to a map (..., rows, columns) of the patches."""
    flat = values.flatten(0, -2)[..., None]
    patches = split_tokens(flat, layout.extras)[0][..., 0]
    return patches.reshape(*values.shape[:-1], *layout.grid)


def to_places(maps_Bhw: Tensor, model: TokenModel, size: Sequence[int]) -> Tensor:
    """Values of tokens (batch, rows, columns) as values of as many equal parts of images of this height and width.

    A token is shared out between the parts between whose middles it stands: those of a convolutional stem see around
    their patches' corners. The sum stays, and so do all values where patches lie side by side.
    """
    embed, shares = model.patch_embed, []
    for count, pixels, first, stride in zip(maps_Bhw.shape[1:], size, embed.origin, embed.stride, strict=True):
        parts = torch.arange(count, dtype=maps_Bhw.dtype, device=maps_Bhw.device)
        places = ((first + parts * stride + 0.5) * count / pixels - 0.5).clamp(0, count - 1)
        shares.append((1 - (parts[:, None] - places).abs()).clamp(min=0))
    rows, columns = shares
    return rows @ maps_Bhw @ columns.t()


def in_parts(values_BHW: Tensor, grid: Sequence[int]) -> Tensor:
    """Values of pixels summed over equal parts of the image, (batch, rows, columns); a pixel that two share is cut."""
    shares = []
    for pixels, count in zip(values_BHW.shape[1:], grid, strict=True):
        edges = torch.arange(count + 1, dtype=values_BHW.dtype, device=values_BHW.device) * pixels / count
        lefts = torch.arange(pixels, dtype=values_BHW.dtype, device=values_BHW.device)
        ends, starts = edges[1:, None].minimum(lefts + 1), edges[:-1, None].maximum(lefts)
        shares.append((ends - starts).clamp(min=0))
    rows, columns = shares
    return rows @ values_BHW @ columns.t()


def grid_layout(layer: Layer) -> Layout:
    """Where the tokens of the model stand, without the token that a layer pooled for itself: what `with_token` got."""
    pooled_at = layer.pooled_at
    if pooled_at is None:
        return layer.layout
    moved = int(pooled_at == 0)
    registers = tuple(place - moved for place in layer.layout.registers if place != pooled_at)
    return Layout(layer.layout.grid, tuple(place - moved for place in layer.layout.classes), registers)


def _in_order(model: TokenModel, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers of each step: one, or two that read the same tokens."""
    left = iter(layers)
    return [[next(left) for _ in step] for step in model.steps]


def _row(layer: Layer, index: int, read_BL: Tensor) -> Tensor:
    """What a weighted sum of tokens takes from each in each channel of a direction, (batch, length, dim)."""
    length, steps = layer.u.shape[1], layer.along(read_BL[..., None], index).any(0)[:, 0].nonzero()
    # What is read has seen nothing of the steps behind it.
    within = slice(int(steps.min()), length) if layer.backward(index) else slice(0, int(steps.max()) + 1)
    read_BL1 = layer.along(read_BL[..., None] * layer.weight(index), index)
    carried = layer.carried(index, within=within)
    row_BLD = carried.transposed(_in_channels(read_BL1[:, within], carried)).transpose(1, 2)
    return layer.back(F.pad(row_BLD, (0, 0, within.start, length - within.stop)), index)


def _in_channels(values_BL1: Tensor, carried: Carried) -> Tensor:
    return values_BL1.to(carried.delta_BDL.dtype).transpose(1, 2).expand_as(carried.delta_BDL)


def _rolled(layer: Layer, row_BL: Tensor) -> Tensor:
    row_BL = _padded(row_BL, layer.pooled_at)
    positive = []
    for i in range(len(layer.mixer.scans)):
        carried = layer.carried(i)
        positive.append(carried._replace(B_BNL=carried.B_BNL.abs(), C_BNL=carried.C_BNL.abs()))
    sums_BL = [
        layer.back(c.scan(torch.ones_like(c.delta_BDL)).mean(1)[..., None], i) * layer.weight(i)
        for i, c in enumerate(positive)
    ]
    read_BL1 = row_BL[..., None] / torch.stack(sums_BL).sum(0).clamp(min=SMALLEST)
    taken = [
        layer.back(c.transposed(_in_channels(layer.along(read_BL1 * layer.weight(i), i), c)).mean(1), i)
        for i, c in enumerate(positive)
    ]
    return _cut((row_BL + sum(taken)) / 2, layer.pooled_at)


def _padded(values_BL: Tensor, pooled_at: int | None) -> Tensor:
    """With nothing at the pooled token, which is read by none."""
    if pooled_at is None:
        return values_BL
    return F.pad(values_BL, (1, 0) if pooled_at == 0 else (0, 1))


def _cut(values: Tensor, pooled_at: int | None) -> Tensor:
    if pooled_at is None:
        return values
    return values[..., 1:] if pooled_at == 0 else values[..., :-1]
