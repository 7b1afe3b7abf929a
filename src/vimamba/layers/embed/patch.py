"""Signals to patch tokens: a convolution along one axis, two or three, or a stem of several on images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vimamba.layers.grid import shape_text
from vimamba.layers.options import check_whole
from vimamba.layers.products import in_quick_type

for _leaf in ("patch_grid", "stem_grid"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are: they look at the sizes

CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIGNALS = {1: ("series", "steps"), 2: ("image", "pixels"), 3: ("volume", "voxels")}


def patch_grid(size: Sequence[int], patch: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each axis of a signal of this size; a remainder at the far edges is not seen.

    Raises:
        ValueError: the signal is smaller than a patch.
    """
    size = _real(size)
    if len(size) != len(patch):
        raise ValueError(
            f"{SIGNALS[len(patch)][0]} patches need {len(patch)} axes behind the channels, got {len(size)}"
        )
    if any(n < p for n, p in zip(size, patch, strict=True)):
        signal, unit = SIGNALS[len(patch)]
        raise ValueError(f"the {signal} is {shape_text(size)} {unit}, smaller than one patch of {shape_text(patch)}")
    return tuple((n - p) // s + 1 for n, p, s in zip(size, patch, stride, strict=True))


def stem_grid(size: Sequence[int], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens along each axis of an image of this size; a remainder at the edges counts as a patch.

    Raises:
        ValueError: the image has no pixels.
    """
    size = _real(size)
    if any(n < 1 for n in size):
        raise ValueError(f"the image is {shape_text(size)} pixels")
    return tuple((n + p - 1) // p for n, p in zip(size, patch, strict=True))


def _real(size: Sequence[int]) -> Sequence[int]:
    return tuple(map(int, size)) if torch.jit.is_tracing() else size  # sizes are tensors there


class PatchEmbed(nn.Module):
    """One convolution: each patch becomes a token. Patches overlap where the stride is smaller.

    Args:
        in_chans: channels of the signal.
        embed_dim: token channels.
        patch_size: length of a patch along each axis, of which there are one, two or three.
        stride: distance between neighbouring patches along each axis.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: tuple[int, ...],
        stride: tuple[int, ...],
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_chans", in_chans)
        check_whole("embed_dim", embed_dim)
        self.patch_size = patch_size
        self.stride = stride
        self.origin = tuple((p - 1) / 2 for p in patch_size)
        """The middle of what the first token sees; that of the next is a stride away."""
        conv: Any = CONVS[len(patch_size)]
        self.proj = conv(in_chans, embed_dim, patch_size, stride, device=device, dtype=dtype)

    def grid_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis of a signal of this size, see `patch_grid`."""
        return patch_grid(size, self.patch_size, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, *size) to (batch, patches, embed_dim) in row order."""
        return in_quick_type(self.proj, x).flatten(2).transpose(1, 2)


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
        patch_size: tuple[int, ...],
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole("in_chans", in_chans)
        check_whole("embed_dim", embed_dim)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        size = patch_size[0]
        steps = size.bit_length() - 1
        if patch_size != (size, size) or size != 2**steps or steps == 0:
            raise ValueError(f'stem="conv" needs patch_size to be 2, 4, 8, 16 or 32 pixels squared, got {patch_size}')
        if embed_dim % 2 ** (steps - 1):
            raise ValueError(f'stem="conv" with patch_size {size} needs embed_dim divisible by {2 ** (steps - 1)}')
        self.patch_size = self.stride = patch_size
        self.origin = (0.0, 0.0)
        """The middle of what the first token sees: not its patch's, but its patch's first pixel."""
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

    def grid_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The rows and columns of tokens of an image, see `stem_grid`."""
        return stem_grid(size, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chans, height, width) to (batch, rows * columns, embed_dim) in row order."""
        return in_quick_type(self.proj, in_quick_type(self.convs, x)).flatten(2).transpose(1, 2)
