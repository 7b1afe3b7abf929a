"""Images to patch tokens, with overlapping patches where the stride is smaller than the patch."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """One convolution: each patch becomes a token.

    Args:
        in_chans: image channels.
        embed_dim: token channels.
        patch_size: height and width of a patch, pixels.
        stride: distance between neighbouring patches, pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; a remainder at the bottom and right edges is not seen.

        Raises:
            ValueError: the image is smaller than a patch.
        """
        if height < self.patch_size[0] or width < self.patch_size[1]:
            raise ValueError(
                f"the image is {height}×{width} pixels, smaller than one patch of "
                f"{self.patch_size[0]}×{self.patch_size[1]}"
            )
        (patch_h, patch_w), (step_h, step_w) = self.patch_size, self.stride
        return (height - patch_h) // step_h + 1, (width - patch_w) // step_w + 1

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(batch, in_chans, height, width) to (batch, rows * columns, embed_dim) in row order, and the grid."""
        grid = self.grid_size(x.shape[2], x.shape[3])
        return self.proj(x).flatten(2).transpose(1, 2), grid
