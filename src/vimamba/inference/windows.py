"""Images that are read part by part: TIFF files larger than the memory, and any other file as a whole."""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vimamba.data.decode import DecodeError, decode_image
from vimamba.errors import UserError, one_line

CACHE = 2**28  # bytes of decoded pieces that are kept: those of one row of windows are read again and again
LARGEST_PIECE = 2**30  # bytes of one strip or tile of a file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # with which such a file begins; the last two over 4 GB
GEOGRAPHY = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's tags: where on earth the pixels lie


class Windows(Protocol):
    """An image of which parts are read. `tags` are those of a TIFF file that its result should have too."""

    size: tuple[int, int]
    tags: list[tuple[Any, ...]]

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """A part, "L" or "RGB"."""
        ...


def open_windows(path: str) -> Windows:
    """An image file of any size.

    TIFF files are read by rasterio where it is installed, else by tifffile.

    Raises:
        DecodeError: it is no image, or not one that can be read in parts and is too large to be read as a whole.
    """
    try:
        with open(path, "rb") as file:
            is_tiff = file.read(4) in TIFF
    except OSError:
        is_tiff = False
    if not is_tiff:
        return WholeImage(path)
    if importlib.util.find_spec("rasterio") is not None:
        return RasterioWindows(path)
    if importlib.util.find_spec("tifffile") is None:
        return WholeImage(path)
    try:
        return TiffWindows(path)
    except UserError as error:
        try:
            return WholeImage(path)  # its compression may be one that Pillow knows and tifffile does not
        except DecodeError:
            raise error from None


class WholeImage:
    """A file that is decoded at once."""

    def __init__(self, path: str):
        self.image = decode_image(path)
        self.tags: list[tuple[Any, ...]] = []
        self.size = (self.image.height, self.image.width)

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        return self.image.crop((left, top, left + width, top + height))


class TiffWindows:
    """A TIFF file by tifffile: the strips or tiles that a part lies in are decoded, the last of them kept.

    Raises:
        DecodeError: it is damaged, its values are of an unusual kind, or it is stored in one huge piece.
    """

    def __init__(self, path: str):
        import tifffile

        self.path = path
        try:
            self.file = tifffile.TiffFile(path)
            page: Any = self.file.pages[0]
            self.page = page
            self.size = (int(page.imagelength), int(page.imagewidth))
            self.samples, self.separate = int(page.samplesperpixel), int(page.planarconfig) == 2
            self.photometric = int(page.photometric)
            self.tiled = bool(page.is_tiled)
            self.piece = (page.tilelength, page.tilewidth) if self.tiled else (page.rowsperstrip, self.size[1])
            self.piece = (min(int(self.piece[0]), self.size[0] if not self.tiled else 2**31), int(self.piece[1]))
            self.extra = [int(kind) for kind in page.extrasamples]
            self.tags = [(t.code, t.dtype, t.count, t.value, True) for t in page.tags if t.code in GEOGRAPHY]
            dtype = np.dtype(page.dtype) if page.dtype is not None else None
        except Exception as error:  # tifffile raises whatever its parser stumbles over
            raise DecodeError(path, f"cannot be decoded ({one_line(error)})") from error
        known = dtype is not None and dtype in (np.uint8, np.uint16) and page.bitspersample in (8, 16)
        if not known or self.photometric not in (0, 1, 2, 3) or page.imagedepth != 1 or min(self.size) < 1:
            raise DecodeError(
                path, f"holds values of {page.dtype}, {page.photometric.name}; parts of it cannot be read"
            )
        self.dtype: np.dtype = np.dtype(dtype)
        self.whole = tifffile.memmap(path, page=0, mode="r") if page.is_memmappable else None
        bytes_of_piece = self.piece[0] * self.piece[1] * self.samples * self.dtype.itemsize
        if self.whole is None and bytes_of_piece > LARGEST_PIECE:
            raise DecodeError(path, "is stored in one piece, which must be decoded at once; store it in tiles")
        self.cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self.cached = 0

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        try:
            values_HWC = self._values(top, left, height, width)
        except Exception as error:
            raise DecodeError(self.path, f"cannot be decoded ({one_line(error)})") from error
        return self._picture(values_HWC)

    def _values(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        if self.whole is not None:
            whole = self.whole.transpose(1, 2, 0) if self.separate and self.samples > 1 else self.whole
            return np.array(whole[top : top + height, left : left + width]).reshape(height, width, self.samples)
        found_HWC = np.zeros((height, width, self.samples), self.dtype)
        rows, columns = self.piece
        across = -(-self.size[1] // columns)
        plane = across * -(-self.size[0] // rows)
        for y in range(top // rows, -(-(top + height) // rows)):
            for x in range(left // columns, -(-(left + width) // columns)):
                for sample in range(self.samples if self.separate else 1):
                    piece_HWC = self._piece(sample * plane + y * across + x)
                    y0, x0 = y * rows, x * columns
                    y1, x1 = min(y0 + piece_HWC.shape[0], top + height), min(x0 + piece_HWC.shape[1], left + width)
                    into = (slice(max(y0, top) - top, y1 - top), slice(max(x0, left) - left, x1 - left))
                    part = piece_HWC[max(top - y0, 0) : y1 - y0, max(left - x0, 0) : x1 - x0]
                    found_HWC[(*into, slice(sample, sample + 1) if self.separate else slice(None))] = part
        return found_HWC

    def _piece(self, index: int) -> np.ndarray:
        """A decoded strip or tile, (rows, columns, samples)."""
        if index in self.cache:
            self.cache.move_to_end(index)
            return self.cache[index]
        page = self.page
        handle = self.file.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        if len(data) < page.databytecounts[index]:
            raise ValueError("it is truncated")
        decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            decoded = np.zeros((*shape[:3], 1 if self.separate else self.samples), self.dtype)
        piece_HWC = decoded.reshape(decoded.shape[-3:])[: shape[-3], : shape[-2]]
        self.cache[index] = piece_HWC
        self.cached += piece_HWC.nbytes
        while self.cached > CACHE and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return piece_HWC

    def _picture(self, values_HWC: np.ndarray) -> Image.Image:
        if self.photometric == 3:
            colours = np.asarray(self.page.colormap)
            values_HWC = (colours[:, values_HWC[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        elif self.photometric == 0:
            values_HWC = np.iinfo(self.dtype).max - values_HWC
        alpha = 1 in self.extra or 2 in self.extra
        return picture_of(values_HWC, alpha=alpha and self.photometric != 3)


class RasterioWindows:
    """A TIFF file by rasterio, which knows more ways of compression."""

    def __init__(self, path: str):
        import rasterio

        self.path = path
        try:
            self.file = rasterio.open(path)
        except Exception as error:
            raise DecodeError(path, f"cannot be decoded ({one_line(error)})") from error
        self.size = (self.file.height, self.file.width)
        if self.file.dtypes[0] not in ("uint8", "uint16"):
            raise DecodeError(path, f"holds values of {self.file.dtypes[0]}; large images are read with 8 or 16 bits")
        self.alpha = self.file.colorinterp[-1].name == "alpha"
        self.tags = _tags_of(path)

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        from rasterio.windows import Window

        try:
            values_CHW = self.file.read(window=Window(left, top, width, height))
            if self.file.colorinterp[0].name == "palette":
                table = self.file.colormap(1)
                colours = np.array([table.get(i, (0, 0, 0, 255))[:3] for i in range(256)], dtype=np.uint8)
                return Image.fromarray(colours[values_CHW[0]])
        except Exception as error:
            raise DecodeError(self.path, f"cannot be decoded ({one_line(error)})") from error
        return picture_of(values_CHW.transpose(1, 2, 0), self.alpha)


def _tags_of(path: str) -> list[tuple[Any, ...]]:
    if importlib.util.find_spec("tifffile") is None:
        return []
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        return [(t.code, t.dtype, t.count, t.value, True) for t in page.tags if t.code in GEOGRAPHY]


def picture_of(values_HWC: np.ndarray, alpha: bool) -> Image.Image:
    """Values of 8 or 16 bits as a picture: grey of one or two channels, else the first three; transparency on white."""
    if values_HWC.dtype == np.uint16:
        values_HWC = (values_HWC >> 8).astype(np.uint8)
    channels = values_HWC.shape[2]
    if alpha and channels in (2, 4):
        picture = Image.fromarray(np.ascontiguousarray(values_HWC), "LA" if channels == 2 else "RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        return flat.getchannel(0) if channels == 2 else flat
    if channels < 3:
        return Image.fromarray(np.ascontiguousarray(values_HWC[..., 0]))
    return Image.fromarray(np.ascontiguousarray(values_HWC[..., :3]))


def stamp(path: str) -> list[Any]:
    """By what a file is known to be the same as before."""
    found = os.stat(path)
    return [os.path.realpath(path), found.st_size, found.st_mtime_ns]
