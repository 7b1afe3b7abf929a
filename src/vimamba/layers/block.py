"""One block of Vision Mamba: normalise, mix, add to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vimamba.layers import recompute
from vimamba.layers.intact import intact
from vimamba.layers.mixer import BidirectionalMixer
from vimamba.layers.norm import LayerNorm, RMSNorm, add_norm, compute_dtype, widen
from vimamba.layers.tokens import Layout

for _leaf in ("in_type_of", "widen"):
    torch.fx.wrap(_leaf)


def in_type_of(weight: Any, x: Tensor) -> Tensor:
    """`x` in the type in which products with `weight` run; as it is, if that is no tensor but packed."""
    return x.to(compute_dtype(weight)) if isinstance(weight, Tensor) else x


class Block(nn.Module):
    """stream += drop_path(mixer(norm(stream))). The residual stream is float32, whatever the weights are.

    Args:
        mixer: what mixes the tokens.
        norm: what normalises the stream in front of it.
        drop_path: probability of dropping the block's output, for each image.
    """

    def __init__(self, mixer: BidirectionalMixer, norm: RMSNorm | LayerNorm, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, stream: Tensor, reverse: bool = False, layout: Layout | None = None) -> Tensor:
        """The residual stream (batch, length, dim) to the stream after this block."""
        stream = widen(stream)
        normed = in_type_of(self.mixer.in_proj.weight, self.norm(stream))
        return stream + self._mixed(normed, stream, reverse, layout)

    def step(
        self, hidden: Tensor, stream: Tensor | None, reverse: bool = False, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` in two parts, so that each addition is joined with the next normalisation.

        Takes what the previous block gave and the stream without it (None: there is nothing else yet), and returns
        the same of this block.
        """
        if stream is None and isinstance(self.mixer.in_proj.weight, Tensor):
            dtype = compute_dtype(self.mixer.in_proj.weight)
        else:
            dtype = compute_dtype(hidden)
        normed, stream = add_norm(self.norm, hidden, stream, dtype)
        return self._mixed(normed, stream, reverse, layout), stream

    def _mixed(self, normed: Tensor, stream: Tensor, reverse: bool, layout: Layout | None) -> Tensor:
        if not recompute.pays(normed) or not intact(self.norm, RMSNorm, LayerNorm):
            return self.drop_path(self.mixer(normed, reverse, layout))
        kept, dtype = stream.detach(), normed.dtype

        def again() -> Tensor:
            return self.norm(kept).to(dtype)

        with recompute.instead_of(normed, again):
            return self.drop_path(self.mixer(normed, reverse, layout, again))
