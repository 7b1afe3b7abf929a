"""From a file to an upright 8-bit image, whatever the file holds."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vimamba.errors import UserError

MODES = {1: "L", 3: "RGB"}


class DecodeError(UserError):
    """A file that cannot be read as an image: its name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return DecodeError, (self.name, self.reason)


def decode_image(source: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
    """Read an image, turn it upright as its EXIF says, and bring it to 8 bits, "L" or "RGB".

    16-bit and floating-point pixels are scaled, not clipped. Transparent images are laid on white.

    Raises:
        DecodeError: the file is missing, empty, truncated, not an image, or larger than Pillow's
            limit against decompression bombs.
    """
    name = name if name is not None else str(source)
    try:
        with warnings.catch_warnings():
            # Pillow refuses an image over twice MAX_IMAGE_PIXELS and only warns below that: those are read.
            warnings.simplefilter("ignore")
            with Image.open(source) as image:
                image.load()
                return flatten(_upright(image))
    except Exception as error:  # Pillow's format readers raise whatever their parsers stumble over
        raise DecodeError(name, _reason(source, error)) from error


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """The image with as many channels as the model takes, 1 or 3."""
    mode = MODES[in_chans]
    return image if image.mode == mode else image.convert(mode)


def flatten(image: Image.Image) -> Image.Image:
    """Any Pillow mode to "L" or "RGB": palettes resolved, deep pixels scaled, transparency laid on white."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy()
    if image.mode == "1":
        return image.convert("L")
    if image.mode[0] in "IF":
        return Image.fromarray(_to_8_bit(image))
    if image.mode == "LA":
        grey = Image.new("L", image.size, 255)
        grey.paste(image.getchannel("L"), mask=image.getchannel("A"))
        return grey
    if image.mode in ("RGBA", "RGBa", "La", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return image


def _to_8_bit(image: Image.Image) -> np.ndarray:
    """Integers of 16 bits by their full range; wider ones and floats by the range that they use."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, high = 0.0, 65535.0
    elif low >= 0.0:
        low = 0.0
        steps = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        high = next((step for step in steps if high <= step), high)
    scaled = (pixels - low) * (255.0 / max(high - low, 1e-12))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _reason(source: str | os.PathLike[str] | IO[bytes], error: Exception) -> str:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        if path.is_dir():
            return "is a folder, not an image"
        if isinstance(error, PermissionError):
            return "may not be read (permission denied)"
        if path.is_file() and path.stat().st_size == 0:
            return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"has more pixels than the {limit} million that are read; scale it down or cut it into tiles"
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"cannot be decoded ({detail})"
