"""A convolutional stem in place of the patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vimamba.layers.options import check_whole

torch.fx.wrap("stem_grid")  # a symbolic trace calls it as it is: it looks at the sizes


def stem_grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tokens of an image; a remainder at the edges counts as a patch.

    Raises:
        ValueError: the image has no pixels.
    """
    if torch.jit.is_tracing():  # sizes are tensors there
        height, width = int(height), int(width)
    if height < 1 or width < 1:
        raise ValueError(f"the image is {height}×{width} pixels")
    return (height + patch[0] - 1) // patch[0], (width + patch[1] - 1) // patch[1]


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2 until each position stands for a patch (arXiv 2106.14881), then one of 1×1.

    Args:
        in_chans: image channels.
        embed_dim: token channels, halved for each convolution before the last.
        patch_size: height and width of a patch, pixels: equal, and a power of two.
        device, dtype: of the weights.

    Raises:
        ValueError: patch_size is not a power of two from 2 up, or embed_dim cannot be halved that often.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: tuple[int, int],
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_chans", in_chans)
        check_whole("embed_dim", embed_dim)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        size = patch_size[0]
        steps = size.bit_length() - 1
        if patch_size[1] != size or size != 2**steps or steps == 0:
            raise ValueError(f'stem="conv" needs patch_size to be 2, 4, 8, 16 or 32 pixels squared, got {patch_size}')
        if embed_dim % 2 ** (steps - 1):
            raise ValueError(f'stem="conv" with patch_size {size} needs embed_dim divisible by {2 ** (steps - 1)}')
        self.patch_size = self.stride = patch_size
        widths = [in_chans, *(embed_dim // 2 ** (steps - 1 - i) for i in range(steps))]
        self.convs = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False, **dd),
                    nn.BatchNorm2d(widths[i + 1], **dd),
                    nn.GELU(),
                )
                for i in range(steps)
            )
        )
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1, **dd)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of tokens of an image, see `stem_grid`."""
        return stem_grid(height, width, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) to (batch, rows * columns, embed_dim) in row order."""
        return self.proj(self.convs(x)).flatten(2).transpose(1, 2)
