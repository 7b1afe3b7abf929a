"""One block of Vision Mamba: add to the residual stream, normalise, mix."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from vimamba.layers import recompute
from vimamba.layers.mixer import BidirectionalMixer
from vimamba.layers.norm import LayerNorm, RMSNorm
from vimamba.layers.tokens import Layout


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual)). The residual stays in float32.

    Args:
        mixer: what mixes the tokens.
        norm: normalisation joined with the addition.
        drop_path: probability of dropping the previous block's output, for each image.
    """

    def __init__(self, mixer: BidirectionalMixer, norm: RMSNorm | LayerNorm, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, hidden: Tensor, residual: Tensor | None, reverse: bool = False, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, length, dim) of the previous block and the stream before it, to the same of this block."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        normed, residual = self.norm(hidden, residual)
        if not recompute.pays(normed):
            return self.mixer(normed, reverse, layout), residual
        stream, dtype = residual.detach(), normed.dtype

        def again() -> Tensor:
            return self.norm(stream)[0].to(dtype)

        with recompute.instead_of(normed, again):
            return self.mixer(normed, reverse, layout, again), residual
