"""From a file to an upright 8-bit image, whatever the file holds."""

from __future__ import annotations

import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vimamba.errors import UserError, escaped, require

MODES = {1: "L", 3: "RGB"}

# What Pillow opens and is no picture of something: drawings (EPS by running Ghostscript), films, tables of numbers.
NO_PHOTOGRAPHS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

ORIENTATION = 0x0112  # in EXIF, of which these values exchange height and width
QUARTER_TURNS: dict[Any, Image.Transpose] = {
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class DecodeError(UserError):
    """A file that cannot be read as an image: its name and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{escaped(name)}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return DecodeError, (self.name, self.reason)


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NO_PHOTOGRAPHS))


@functools.cache
def extensions() -> tuple[str, ...]:
    """The endings of file names that are taken for images: those of every format that Pillow reads here."""
    return tuple(sorted(ending for ending, kind in Image.registered_extensions().items() if kind in formats()))


def decode_image(source: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
    """Read an image, turn it upright as its EXIF says, and bring it to 8 bits, "L" or "RGB".

    Pixels of more bits are scaled by what is white in their file, those of unknown scale by the range that they use,
    and none is clipped. Transparent images are laid on white.

    Raises:
        DecodeError: the file is missing, empty, truncated, not a regular file, not an image, or larger than Pillow's
            limit against decompression bombs.
    """
    with opened(source, name) as image:
        meant = _Grey.of(image)
        image.load()
        return _flatten(_upright(image), meant)


@contextmanager
def opened(source: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Iterator[Image.Image]:
    """An image of which no more than the header is read; whatever is raised inside becomes its DecodeError."""
    name = name if name is not None else str(source)
    try:
        if isinstance(source, str | os.PathLike) and not stat.S_ISREG(mode := os.stat(source).st_mode):
            raise IsADirectoryError if stat.S_ISDIR(mode) else NotAFileError  # a pipe would be waited for
        with warnings.catch_warnings():
            # Pillow refuses an image over twice MAX_IMAGE_PIXELS and only warns below that: those are read.
            warnings.simplefilter("ignore")
            with Image.open(source, formats=formats()) as image:
                yield image
    except DecodeError:
        raise
    except UserError as error:
        raise DecodeError(name, str(error)) from None
    except Exception as error:  # Pillow's format readers raise whatever their parsers stumble over
        raise DecodeError(name, _reason(source, error)) from error


def flatten(image: Image.Image, name: str = "the image") -> Image.Image:
    """The same of an image that is open already.

    Raises:
        DecodeError: its file is truncated, or it has no pixels.
    """
    try:
        meant = _Grey.of(image)
        image.load()
        require(min(image.size) > 0, f"it is {image.width} x {image.height} pixels")
        return _flatten(_upright(image), meant)
    except Exception as error:
        raise DecodeError(name, _reason(io.BytesIO(), error)) from error


class Upright(NamedTuple):
    """The size (width, height) of an image as it is shown, and the quarter turn that brings it there, if any."""

    size: tuple[int, int]
    turn: Image.Transpose | None


def upright(path: str) -> Upright:
    """Of an image, by its header.

    Raises:
        DecodeError: it has none.
    """
    with opened(path) as image:
        try:
            turn = QUARTER_TURNS.get(image.getexif().get(ORIENTATION))
        except Exception:  # a broken EXIF block, which decoding leaves aside as well
            turn = None
        if turn is not None and image.format == "TIFF":  # of which some versions of Pillow give the size when upright
            return Upright(decode_image(path).size, turn)
        return Upright(image.size[::-1] if turn is not None else image.size, turn)


class NotAFileError(OSError):
    """A pipe, a socket or a device."""


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """The image with as many channels as the model takes, 1 or 3."""
    mode = MODES[in_chans]
    return image if image.mode == mode else image.convert(mode)


class _Grey(NamedTuple):
    """How the values of a grey image are meant, as far as its format tells; copies of the image forget it."""

    white: float | None  # the value of white in a deep one
    white_is_zero: bool
    unsigned: bool  # 32 bits, which Pillow reads as signed
    transparent: int | None  # the one value that stands for transparent, as loaded pixels show it

    @classmethod
    def of(cls, image: Image.Image) -> _Grey:
        """Of an image that is open and not loaded yet."""
        bits = _tiff_tag(image, 258, 16)
        white = 2.0**bits - 1 if image.mode.startswith("I;16") else None  # 12 bits come in 16 too
        if image.mode == "I" and image.format in ("PNG", "PPM"):
            white = 65535.0  # Pillow brings 16-bit PGM of any white to this, and 16-bit PNG in some of its versions
        value = image.info.get("transparency")
        if not (image.mode in ("1", "L") or image.mode[0] == "I") or not isinstance(value, int):
            value = None
        elif getattr(image, "tile", None):
            args = image.tile[0].args  # type: ignore[attr-defined]
            # 2 and 4 bits are spread to 8 when loaded; Pillow leaves the transparent value as it was.
            value *= {"L;2": 85, "L;4": 17}.get(args[0] if isinstance(args, tuple) else args, 1)
        inverted = image.mode.startswith("I;16") and _tiff_tag(image, 262, 1) == 0  # which Pillow does for fewer bits
        unsigned = image.mode == "I" and (bits, _tiff_tag(image, 339, 1)) == (32, 1)
        return cls(white, inverted, unsigned, value)

    def to_8_bit(self, pixels: np.ndarray) -> np.ndarray:
        """From 0 to white; where white is not known, by the range that the pixels use."""
        values = pixels.view(np.uint32) if self.unsigned and pixels.dtype.itemsize == 4 else pixels
        values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
        low, high = 0.0, self.white or 0.0
        if self.white is None:
            low, high = min(0.0, float(values.min())), float(values.max())
            if low == 0.0:
                steps = (255.0, 65535.0) if pixels.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
                high = next((step for step in steps if high <= step), high)
        scaled = (values - low) * (255.0 / max(high - low, 1e-12))
        grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        return 255 - grey if self.white_is_zero else grey


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    value: Any = getattr(image, "tag_v2", {}).get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _flatten(image: Image.Image, meant: _Grey) -> Image.Image:
    """Any Pillow mode to "L" or "RGB": palettes resolved, deep pixels scaled, transparency laid on white."""
    if image.mode in ("1", "L") or image.mode[0] in "IF":
        pixels = np.asarray(image)
        grey = meant.to_8_bit(pixels) if image.mode[0] in "IF" else np.asarray(image.convert("L"))
        if meant.transparent is not None:
            clear = (grey if image.mode == "1" else pixels) == meant.transparent
            grey = np.where(clear, np.uint8(255), grey)
        return Image.fromarray(grey)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "LA":
        grey_image = Image.new("L", image.size, 255)
        grey_image.paste(image.getchannel("L"), mask=image.getchannel("A"))
        return grey_image
    if image.mode in ("RGBA", "RGBa", "La", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return image


def _reason(source: str | os.PathLike[str] | IO[bytes], error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    if isinstance(error, NotAFileError):
        return "is a pipe or a device, not a file"
    if isinstance(error, PermissionError):
        return "may not be read (permission denied)"
    if isinstance(source, str | os.PathLike) and Path(source).is_file() and Path(source).stat().st_size == 0:
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a format that Pillow reads"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"has more pixels than the {limit} million that are read; scale it down or cut it into tiles"
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"cannot be decoded ({detail})"
