"""Images to patch tokens, with overlapping patches where the stride is smaller than the patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vimamba.layers.options import check_whole

torch.fx.wrap("patch_grid")  # a symbolic trace calls it as it is: it looks at the sizes


def patch_grid(height: int, width: int, patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image; a remainder at the bottom and right edges is not seen.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    if torch.jit.is_tracing():  # sizes are tensors there
        height, width = int(height), int(width)
    if height < patch[0] or width < patch[1]:
        raise ValueError(f"the image is {height}×{width} pixels, smaller than one patch of {patch[0]}×{patch[1]}")
    return (height - patch[0]) // stride[0] + 1, (width - patch[1]) // stride[1] + 1


class PatchEmbed(nn.Module):
    """One convolution: each patch becomes a token.

    Args:
        in_chans: image channels.
        embed_dim: token channels.
        patch_size: height and width of a patch, pixels.
        stride: distance between neighbouring patches, pixels.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_chans", in_chans)
        check_whole("embed_dim", embed_dim)
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, device=device, dtype=dtype)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of tokens of an image, see `patch_grid`."""
        return patch_grid(height, width, self.patch_size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) to (batch, rows * columns, embed_dim) in row order."""
        return self.proj(x).flatten(2).transpose(1, 2)
