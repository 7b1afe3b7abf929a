"""Images that are read part by part: TIFF files larger than the memory, and any other file as a whole."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vimamba.data.decode import DecodeError, decode_image, flatten
from vimamba.errors import one_line, require

CACHE = 2**28  # bytes of decoded pieces that are kept: those of one row of windows are read again and again
LARGEST_PIECE = 2**30  # bytes of one strip or tile of a file
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # with which a TIFF file begins; the last two over 4 GB
GEOGRAPHY = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's tags: where on earth the pixels lie
WHITE_IS_ZERO, PALETTE, YCBCR = 0, 3, 6  # of TIFF's photometric interpretations
CHANNELS = {0: "L", 1: "L", 2: "RGB", PALETTE: "P", 5: "CMYK", YCBCR: "RGB"}
"""Pillow's mode for each of them; decoders give RGB for YCbCr."""
ALPHA = {1: "a", 2: "A"}  # of TIFF's extra samples: transparency that the colours are multiplied by, or are not


class Windows(Protocol):
    """An image of which parts are read. `tags` are those of a TIFF file that its result should have too."""

    size: tuple[int, int]
    tags: list[tuple[Any, ...]]

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        """A part, "L" or "RGB"."""
        ...


def open_windows(path: str) -> Windows:
    """An image file of any size.

    TIFF files are read by rasterio where it is installed, else by tifffile; what neither can read in parts is decoded
    as a whole if it is not too large for that.

    Raises:
        DecodeError: it is no image, damaged, or cannot be read in parts and is too large.
    """
    readers: list[Any] = [WholeImage]
    if _is_tiff(path) and importlib.util.find_spec("tifffile") is not None:
        of_parts = [TiffWindows] if importlib.util.find_spec("rasterio") is None else [RasterioWindows, TiffWindows]
        readers = [*of_parts, WholeImage]
    errors = []
    for reader in readers:
        try:
            return reader(path)
        except DecodeError as error:
            errors.append(error)
    raise errors[0]


def _is_tiff(path: str) -> bool:
    if not os.path.isfile(path):  # a pipe would be waited for
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in SIGNATURES
    except OSError:
        return False


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

    Its values are taken as `decode_image` takes them, so that a part is the same as one of the whole.

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
            self.photometric, self.bits = int(page.photometric), page.bitspersample
            rows = page.tilelength if page.is_tiled else min(int(page.rowsperstrip), self.size[0])
            self.piece = (int(rows), int(page.tilewidth) if page.is_tiled else self.size[1])
            self.extra = [int(kind) for kind in page.extrasamples]
            self.tags = [(t.code, t.dtype, t.count, t.value, True) for t in page.tags if t.code in GEOGRAPHY]
            self._check()
            self.cache: OrderedDict[int, np.ndarray] = OrderedDict()
            self.cached = 0
            self._open()
            self._values(0, 0, 1, 1)  # whether its compression is known
        except DecodeError:
            raise
        except Exception as error:  # tifffile raises whatever its parser stumbles over
            raise DecodeError(path, f"cannot be decoded ({one_line(error)})") from error

    def _check(self) -> None:
        page, bits = self.page, self.bits
        wholes = isinstance(bits, int) and 1 <= bits <= 16 and int(page.sampleformat) == 1
        colours = CHANNELS.get(self.photometric)
        usual = wholes and colours is not None and self.samples >= len(colours) and page.imagedepth == 1
        for right, said in (
            (usual and min(self.size) >= 1, f"holds values of {page.dtype}, {page.photometric.name}"),
            (page.tags.valueof(274, 1) == 1, "is stored turned"),
            (
                np.prod(self.piece) * self.samples * -(-bits // 8) <= LARGEST_PIECE or page.is_memmappable,
                "is stored in one piece; store it in tiles",
            ),
        ):  # fmt: skip
            if not right:
                raise DecodeError(self.path, f"{said}, of which parts cannot be read")

    def _open(self) -> None:
        """What is needed to read values."""

    def read(self, top: int, left: int, height: int, width: int) -> Image.Image:
        try:
            return self._picture(self._values(top, left, height, width))
        except Exception as error:
            raise DecodeError(self.path, f"cannot be decoded ({one_line(error)})") from error

    def _values(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The values of a part as they are stored, (height, width, samples)."""
        if self.page.is_memmappable:
            return self._mapped()[top : top + height, left : left + width].copy()
        found_HWC = np.zeros((height, width, self.samples), np.uint8 if self.bits <= 8 else np.uint16)
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

    def _mapped(self) -> np.ndarray:
        """The values of a file without compression, which are mapped anew: what has been read leaves the memory."""
        height, width = self.size
        shape = (self.samples, height, width) if self.separate else (height, width, self.samples)
        dtype = np.dtype(f"{self.file.byteorder}u{self.bits // 8}")
        values = np.memmap(self.path, dtype, "r", self.page.dataoffsets[0], shape)
        return values.transpose(1, 2, 0) if self.separate else values

    def _piece(self, index: int) -> np.ndarray:
        """A decoded strip or tile, (rows, columns, samples)."""
        if index in self.cache:
            self.cache.move_to_end(index)
            return self.cache[index]
        page, count = self.page, self.page.databytecounts[index]
        self.file.filehandle.seek(page.dataoffsets[index])
        data = self.file.filehandle.read(count)
        require(len(data) == count, "it is truncated")
        decoded, _, shape = page.decode(data or None, index, jpegtables=page.jpegtables)
        if decoded is None:  # a piece that is not stored
            decoded = np.zeros((*shape[:3], 1 if self.separate else self.samples), np.uint8)
        piece_HWC = decoded.reshape(decoded.shape[-3:])[: shape[-3], : shape[-2]]
        self.cache[index] = piece_HWC
        self.cached += piece_HWC.nbytes
        while self.cached > CACHE and len(self.cache) > 1:
            self.cached -= self.cache.popitem(last=False)[1].nbytes
        return piece_HWC

    def _picture(self, values_HWC: np.ndarray) -> Image.Image:
        """Values as they are stored to a picture."""
        height, width = values_HWC.shape[:2]
        if self.photometric == PALETTE:
            colours_3N = np.asarray(self.page.colormap)
            return Image.fromarray((colours_3N[:, values_HWC[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0))
        values_HWC = eight_bits(values_HWC, self.bits)
        mode = CHANNELS[self.photometric]
        channels = [*range(len(mode))]
        if self.photometric == WHITE_IS_ZERO:
            values_HWC[..., 0] = 255 - values_HWC[..., 0]
        clear = next((place for place, kind in enumerate(self.extra) if kind in ALPHA), None)
        if clear is not None and mode != "CMYK":
            mode, channels = mode + ALPHA[self.extra[clear]], [*channels, len(channels) + clear]
        return flatten(Image.frombytes(mode, (width, height), values_HWC[..., channels].tobytes()))


def eight_bits(values_HWC: np.ndarray, bits: int) -> np.ndarray:
    """Values of so many bits in 8, uint8."""
    if bits == 8:
        return values_HWC.astype(np.uint8)
    if bits == 16 and values_HWC.shape[2] >= 3:
        return (values_HWC >> 8).astype(np.uint8)  # as Pillow has them
    white = 2**bits - 1
    return ((values_HWC.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


class RasterioWindows(TiffWindows):
    """A TIFF file whose values rasterio decodes, which knows more ways of compression."""

    def _open(self) -> None:
        os.environ.setdefault("GDAL_CACHEMAX", str(CACHE // 2**20))  # read once; a twentieth of the memory otherwise
        import rasterio

        require(CHANNELS[self.photometric] != "CMYK", "rasterio makes other colours of inks than Pillow")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # most pictures are not of a place on earth
            self.raster = rasterio.open(self.path, driver="GTiff")

    def _values(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        from rasterio.windows import Window

        return self.raster.read(window=Window(left, top, width, height)).transpose(1, 2, 0)


def stamp(path: str) -> list[Any]:
    """By what a file is known to be the same as before."""
    found = os.stat(path)
    return [os.path.realpath(path), found.st_size, found.st_mtime_ns]
