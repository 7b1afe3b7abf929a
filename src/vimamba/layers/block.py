"""One block of Vision Mamba: normalise, mix, add to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vimamba.layers import memory
from vimamba.layers.grid import Layout
from vimamba.layers.intact import intact, own_methods, watched, weight_of
from vimamba.layers.mixers import DirectionalMixer
from vimamba.layers.norm import LayerNorm, RMSNorm, add_norm
from vimamba.ops import BlockWeights, backends, blocks
from vimamba.ops.arguments import wide, widen
from vimamba.ops.backends import compute_dtype
from vimamba.ops.blocks import as_one

for _leaf in ("in_type_of", "widen"):
    torch.fx.wrap(_leaf)


def in_type_of(weight: Any, x: Tensor) -> Tensor:
    """`x` in the type in which products with `weight` run; as it is, if that is no tensor but packed."""
    return x.to(compute_dtype(weight)) if isinstance(weight, Tensor) else x


class Block(nn.Module):
    """stream += drop_path(mixer(norm(stream))). The residual stream is float32, whatever the weights are.

        block = Block(BidirectionalMixer(192), torch.nn.RMSNorm(192))
        tokens = block(tokens)  # (batch, length, 192)

    Args:
        mixer: what mixes the tokens: a `BidirectionalMixer`, or a `DirectionalMixer` over another recurrence.
        norm: what normalises the stream in front of it; `layers.norm.RMSNorm` and `LayerNorm` are joined with the
            addition to the stream.
        drop_path: probability of dropping the block's output, for each image.
    """

    def __init__(self, mixer: DirectionalMixer, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, stream: Tensor, reverse: bool = False, layout: Layout | None = None) -> Tensor:
        """The residual stream (batch, length, dim) to the stream after this block, float32 or float64.

        Args:
            stream: (batch, length, dim).
            reverse: give what the flipped sequence would give, flipped back.
            layout: where the tokens stand on the grid, for mixers that read it in other orders than "row".

        Raises:
            ValueError: the mixer needs the layout and there is none, or it is that of another sequence.
        """
        stream = widen(stream)
        normed = in_type_of(self.mixer.first_weight, self.norm(stream))
        return stream + self._mixed(normed, stream, reverse, layout)

    def step(
        self, hidden: Tensor, stream: Tensor | None, reverse: bool = False, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` in two parts, so that each addition is joined with the next normalisation.

        Takes what the previous block gave and the stream without it (None: there is nothing else yet), and returns
        the same of this block.
        """
        first_weight = self.mixer.first_weight if stream is None else None
        dtype = compute_dtype(first_weight if isinstance(first_weight, Tensor) else hidden)
        normed, stream = add_norm(self.norm, hidden, stream, dtype)
        return self._mixed(normed, stream, reverse, layout), stream

    def joined(self) -> BlockWeights | None:
        """The weights with which `ops.blocks` computes this block; None where it does more, or is not as it was."""
        modules: dict[str, Any] = self._modules
        mixer, norm, drop_path = modules["mixer"], modules["norm"], modules["drop_path"]
        drops = drop_path.training and not isinstance(drop_path, nn.Identity)
        whole = intact(self, Block) and own_methods(self) and intact(norm, RMSNorm)
        whole = whole and intact(drop_path, DropPath, nn.Identity)
        return mixer.joined(weight_of(norm, "weight")) if whole and not drops else None

    def _mixed(self, normed: Tensor, stream: Tensor, reverse: bool, layout: Layout | None) -> Tensor:
        if not memory.recomputes(normed, self.mixer.recompute) or not intact(self.norm, RMSNorm, LayerNorm):
            return self.drop_path(self.mixer(normed, reverse, layout))
        kept, dtype = stream.detach(), normed.dtype

        def compute() -> Tensor:
            return self.norm(kept).to(dtype)

        with memory.recomputed(normed, compute):
            return self.drop_path(self.mixer(normed, reverse, layout, compute))


def run_joined(layers: Iterable[nn.Module], hidden: Tensor, stream: Tensor | None) -> tuple[int, Tensor]:
    """Pass the stream, in two parts as `Block.step` takes it, through as many layers as one call of `ops.blocks` can.

    Returns how many these were, and the stream behind them; 0 where more than the values is wanted, or somebody looks
    on.
    """
    fuses = not watched(hidden) and as_one(hidden)
    if not fuses or not backends.trait("fuses_blocks", None, hidden.device, wide(hidden.dtype)):
        return 0, hidden
    weights: list[BlockWeights] = []
    first: Any = None
    kind: Any = None
    for layer in layers:
        block = layer.joined() if isinstance(layer, Block) else None
        if block is None or (weights and _kind(layer, block) != kind):
            break
        if not weights:
            first, kind = layer, _kind(layer, block)
        weights.append(block)
    if first is None:
        return 0, hidden
    dtype = compute_dtype(first.mixer.first_weight)
    if dtype != torch.float32 and not backends.untraced(hidden):  # the operator has one type
        return 0, hidden
    total = widen(hidden) if stream is None else stream + hidden
    scale, eps, *_ = kind
    return len(weights), blocks(total, weights, scale, eps, dtype=dtype)


def _kind(layer: Any, weights: BlockWeights) -> tuple[Any, ...]:
    """What blocks share that run in one call: how they merge and normalise, their type, and weights with all sizes."""
    conv_weight, _, x_proj, _, _, A_log, *_ = weights.directions[0]
    sizes = weights.in_proj.shape, conv_weight.shape, x_proj.shape, A_log.shape
    return layer.mixer.merge_scale, layer.norm.eps, len(weights.directions), weights.in_proj.dtype, sizes
