"""Grey images of every depth and kind of transparency, against a table of what they show."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vimamba.data.decode import decode_image, to_channels


def png(width, depth, colour, row, transparent=None, palette=None):
    """A PNG file of one row, by its header: colour 0 is grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    more = chunk(b"PLTE", palette) if palette else b""
    more += chunk(b"tRNS", transparent) if transparent else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + chunk(b"IEND", b"")


def tiff(width, bits, data, white_is_zero=False, sample_format=1, order="<"):
    """A TIFF file of one row of grey pixels: sample_format 1 is unsigned, 2 signed, 3 floating point."""
    data += b"\0" * (len(data) % 2)
    tags = {
        256: (4, width), 257: (4, 1), 258: (3, bits), 259: (3, 1), 262: (3, 0 if white_is_zero else 1), 273: (4, 8),
        277: (3, 1), 278: (4, 1), 279: (4, len(data)), 339: (3, sample_format),
    }  # fmt: skip
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *value)
        for tag, kind, value in ((t, k, (v, 0) if k == 3 else (v,)) for t, (k, v) in tags.items())
    )
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def words(*values, order=">"):
    return struct.pack(f"{order}{len(values)}H", *values)


def saved(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


DARK = np.array([[0, 255, 40_000]], np.uint16)
FILES = {
    "PGM, dark": (b"P5 3 1 65535\n" + words(0, 255, 200), [0, 1, 1]),
    "PGM, white is 4095": (b"P5 3 1 4095\n" + words(0, 2048, 4095), [0, 128, 255]),
    "PGM, white is 4095, dark": (b"P5 3 1 4095\n" + words(0, 16, 32), [0, 1, 2]),
    "PGM, white is 100": (b"P5 3 1 100\n" + bytes([0, 50, 100]), [0, 128, 255]),
    "PGM in text, white is 1000": (b"P2 3 1 1000\n0 500 1000\n", [0, 128, 255]),
    "PBM": (b"P1 3 1\n0 1 0\n", [255, 0, 255]),
    "PFM": (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.25, 1.0), [64, 255]),
    "PNG 1": (png(4, 1, 0, b"\x50"), [0, 255, 0, 255]),
    "PNG 1, black is clear": (png(4, 1, 0, b"\x50", words(0)), [255, 255, 255, 255]),
    "PNG 1, white is clear": (png(4, 1, 0, b"\x50", words(1)), [0, 255, 0, 255]),
    "PNG 2": (png(4, 2, 0, b"\x1b"), [0, 85, 170, 255]),
    "PNG 2, 1 is clear": (png(4, 2, 0, b"\x1b", words(1)), [0, 255, 170, 255]),
    "PNG 4, 1 is clear": (png(4, 4, 0, b"\x01\x2f", words(1)), [0, 255, 34, 255]),
    "PNG 8": (png(3, 8, 0, bytes([0, 7, 200])), [0, 7, 200]),
    "PNG 8, 7 is clear": (png(3, 8, 0, bytes([0, 7, 200]), words(7)), [0, 255, 200]),
    "PNG 16, dark": (png(3, 16, 0, words(0, 255, 200)), [0, 1, 1]),
    "PNG 16, one is clear": (png(3, 16, 0, words(0, 1799, 1800), words(1799)), [0, 255, 7]),
    "PNG 8 with alpha": (png(3, 8, 4, bytes([10, 0, 10, 255, 10, 128])), [255, 10, 132]),
    "PNG 16 with alpha": (png(2, 16, 4, words(2570, 0, 2570, 65535)), [255, 10]),
    "palette of greys, half clear": (png(3, 8, 3, bytes([0, 1, 2]), bytes([0, 128]), bytes([9] * 9)), [255, 132, 9]),
    "palette 2, two clear": (png(4, 2, 3, b"\x1b", bytes([0, 255, 0]), bytes([9] * 12)), [255, 9, 255, 9]),
    "RGB 8, one is clear": (png(2, 8, 2, bytes([7, 7, 7, 8, 8, 8]), words(7, 7, 7)), [255, 8]),
    "RGB 16, one is clear": (png(2, 16, 2, words(1799, 1799, 1799, 0, 0, 0), words(1799, 1799, 1799)), [255, 0]),
    "RGBA 16": (png(2, 16, 6, words(2570, 2570, 2570, 0, 2570, 2570, 2570, 65535)), [255, 10]),
    "TIFF 2": (tiff(4, 2, b"\x1b"), [0, 85, 170, 255]),
    "TIFF 4": (tiff(2, 4, b"\x1f"), [17, 255]),
    "TIFF 8, white is 0": (tiff(2, 8, bytes([0, 200]), True), [255, 55]),
    "TIFF 12": (tiff(2, 12, b"\x80\x0f\xff"), [128, 255]),
    "TIFF 16, dark": (tiff(2, 16, words(0, 255, order="<")), [0, 1]),
    "TIFF 16, big-endian": (tiff(2, 16, words(0, 32_768), order=">"), [0, 128]),
    "TIFF 16, white is 0": (tiff(2, 16, words(0, 65_535, order="<"), True), [255, 0]),
    "TIFF 16, signed": (tiff(3, 16, struct.pack("<3h", -32_768, 0, 32_767), sample_format=2), [0, 128, 255]),
    "TIFF 32": (tiff(3, 32, struct.pack("<3I", 0, 2**31, 2**32 - 1)), [0, 128, 255]),
    "TIFF 32, signed": (tiff(3, 32, struct.pack("<3i", -100, 0, 100), sample_format=2), [0, 128, 255]),
    "TIFF of floats": (tiff(2, 32, struct.pack("<2f", 0.25, 0.5), sample_format=3), [64, 128]),
    "JPEG 2000 of 16 bits": (saved(DARK, "jpeg2000", irreversible=False), [0, 1, 156]),
    "PNG 16 by Pillow": (saved(DARK, "png"), [0, 1, 156]),
}


@pytest.mark.parametrize(("data", "expected"), FILES.values(), ids=FILES)
def test_grey_images_show_what_their_files_say(data, expected):
    image = decode_image(io.BytesIO(data), "picture")
    assert image.mode in ("L", "RGB")
    assert np.abs(np.asarray(to_channels(image, 1))[0].astype(int) - expected).max() <= 1
    assert np.abs(np.asarray(to_channels(image, 3))[0].astype(int) - np.array(expected)[:, None]).max() <= 1
