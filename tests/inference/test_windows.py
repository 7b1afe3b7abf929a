"""Parts of image files: of every kind of TIFF they are the same as those of the whole, by either reader."""

import contextlib
import importlib.util
import os
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from vimamba.data.decode import DecodeError, decode_image
from vimamba.inference import windows
from vimamba.inference.windows import RasterioWindows, TiffWindows, WholeImage, open_windows

HEIGHT, WIDTH = 70, 90
PLACES = [(0, 0, HEIGHT, WIDTH), (0, 0, 1, 1), (13, 21, 40, 33), (31, 0, 2, 90), (69, 89, 1, 1), (16, 16, 16, 16)]
RGB = {"photometric": "rgb"}
GREY = {"photometric": "minisblack"}


def values(channels, dtype=np.uint8):
    random = np.random.RandomState(channels)
    shape = (HEIGHT, WIDTH, channels) if channels > 1 else (HEIGHT, WIDTH)
    return random.randint(0, np.iinfo(dtype).max, shape, dtype=dtype)


def write(path, array, **how):
    tifffile.imwrite(path, array, metadata=None, **how)
    return str(path)


KINDS = {
    "tiles": (values(3), RGB | {"tile": (16, 32), "compression": "zlib"}),
    "uncompressed tiles": (values(3), RGB | {"tile": (32, 16)}),
    "strips": (values(3), RGB | {"rowsperstrip": 9, "compression": "zlib"}),
    "one strip": (values(3), RGB | {"rowsperstrip": HEIGHT, "compression": "zlib"}),
    "mapped": (values(3), RGB),
    "mapped, other end first": (values(1, np.uint16), GREY | {"byteorder": ">"}),
    "planes in tiles": (values(3).transpose(2, 0, 1), RGB | {"planarconfig": "separate", "tile": (16, 16)}),
    "planes in strips": (
        values(3).transpose(2, 0, 1), RGB | {"planarconfig": "separate", "rowsperstrip": 11, "compression": "zlib"},
    ),
    "planes mapped": (values(3).transpose(2, 0, 1), RGB | {"planarconfig": "separate"}),
    "grey": (values(1), GREY | {"tile": (16, 16)}),
    "deep grey": (values(1, np.uint16), GREY | {"tile": (16, 16), "compression": "zlib"}),
    "deep colours": (values(3, np.uint16), RGB | {"rowsperstrip": 8, "compression": "zlib"}),
    "deep colours, other end first": (values(3, np.uint16), RGB | {"tile": (16, 16), "byteorder": ">"}),
    "transparent": (values(4), RGB | {"extrasamples": ["unassalpha"], "tile": (16, 16)}),
    "multiplied": (values(4) // 2 + np.uint8([0, 0, 0, 127]), RGB | {"extrasamples": ["assocalpha"], "tile": (16, 16)}),
    "four channels": (values(4), RGB | {"extrasamples": ["unspecified"], "tile": (16, 16)}),
    "white is zero": (values(1), {"photometric": "miniswhite", "rowsperstrip": 8}),
    "deep white is zero": (values(1, np.uint16), {"photometric": "miniswhite", "tile": (16, 16)}),
    "palette": (
        values(1), {"photometric": "palette", "colormap": values(2, np.uint16).ravel()[:768].reshape(3, 256)},
    ),
    "black and white": (values(1) > 99, GREY | {"rowsperstrip": 16}),
    "ink": (values(4), {"photometric": "separated", "tile": (16, 16)}),
    "BigTIFF": (values(3), RGB | {"tile": (16, 16), "bigtiff": True, "compression": "zlib"}),
    "predictor": (values(3), RGB | {"rowsperstrip": 8, "compression": "zlib", "predictor": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", [TiffWindows, RasterioWindows], ids=["tifffile", "rasterio"])
def test_parts_are_those_of_the_whole(tmp_path, kind, reader):
    array, how = KINDS[kind]
    if kind == "predictor" and reader is TiffWindows and importlib.util.find_spec("imagecodecs") is None:
        pytest.skip("tifffile decodes differences of neighbours with imagecodecs alone")
    path = write(tmp_path / "image.tif", array, **how)
    if kind == "ink" and reader is RasterioWindows:
        with pytest.raises(DecodeError, match="other colours of inks"):
            reader(path)
        return
    image = reader(path)
    assert image.size == (HEIGHT, WIDTH)
    try:
        whole = np.asarray(decode_image(path).convert("RGB"))
    except DecodeError:  # of which Pillow reads no parts
        assert kind in ("planes in tiles", "deep colours, other end first")
        whole = np.asarray(image.read(0, 0, HEIGHT, WIDTH).convert("RGB"))
        np.testing.assert_array_equal(
            whole, (values(3, array.dtype) >> 8 * (array.dtype.itemsize - 1)).astype(np.uint8)
        )
    for top, left, height, width in PLACES:
        part = np.asarray(image.read(top, left, height, width).convert("RGB"))
        np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "group4", "tiff_adobe_deflate"])
@pytest.mark.parametrize("installed", ["tifffile", "tifffile, rasterio", ""])
def test_any_compression_is_read_by_one_of_the_readers(tmp_path, monkeypatch, compression, installed):
    array = values(3) if compression != "group4" else values(1) > 127
    path = tmp_path / "image.tif"
    Image.fromarray(array).save(path, compression=compression)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name: None if name in ("tifffile", "rasterio") and name not in installed else found(name),
    )  # fmt: skip
    image = open_windows(str(path))
    wanted = decode_image(path).convert("RGB").crop((20, 10, 60, 50))
    off = np.abs(np.asarray(image.read(10, 20, 40, 40).convert("RGB")).astype(int) - np.asarray(wanted))
    assert off.max() <= (8 if compression == "jpeg" else 0)  # decoders of JPEG differ in how they enlarge colours
    assert isinstance(image, RasterioWindows) == ("rasterio" in installed)
    assert installed or isinstance(image, WholeImage)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "sm\u00f8rbr\u00f8d \u96ea.webp"])
def test_other_files_are_read_as_a_whole(tmp_path, name):
    Image.fromarray(values(3)).save(tmp_path / name)
    image = open_windows(str(tmp_path / name))
    assert isinstance(image, WholeImage)
    assert image.size == (HEIGHT, WIDTH)
    wanted = decode_image(tmp_path / name).crop((5, 6, 25, 16))
    np.testing.assert_array_equal(np.asarray(image.read(6, 5, 10, 20)), np.asarray(wanted))


def test_an_image_that_is_stored_turned_is_read_upright(tmp_path):
    path = write(tmp_path / "image.tif", values(3), **RGB, extratags=[(274, "H", 1, 6, True)])
    image = open_windows(path)
    assert image.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(np.asarray(image.read(0, 0, WIDTH, HEIGHT)), np.asarray(decode_image(path)))


def test_values_of_an_unusual_kind_are_read_as_a_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "image.tif", values(1).astype(np.float32) / 255, **GREY)
    assert isinstance(open_windows(path), WholeImage)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="holds values of float32, MINISBLACK, of which parts cannot be read"):
        open_windows(path)


def test_one_huge_piece_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "LARGEST_PIECE", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write(tmp_path / "image.tif", values(3), **RGB, rowsperstrip=HEIGHT, compression="zlib")
    with pytest.raises(DecodeError, match="is stored in one piece; store it in tiles"):
        open_windows(path)
    assert open_windows(write(tmp_path / "mapped.tif", values(3), **RGB)).size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("reader", [TiffWindows, RasterioWindows])
@pytest.mark.parametrize("how", [{"tile": (16, 16), "compression": "zlib"}, {"rowsperstrip": 8}, {}])
def test_a_truncated_file_is_named(tmp_path, how, reader):
    path = tmp_path / "image.tif"
    write(path, values(3), **RGB, **how)
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DecodeError, match=r"image\.tif: "):
            reader(str(path)).read(0, 0, HEIGHT, WIDTH)


def test_bytes_that_are_no_image_are_named(tmp_path):
    random = np.random.RandomState(0)
    path = tmp_path / "image.tif"
    write(path, values(3), **RGB, tile=(16, 16), compression="zlib")
    whole = path.read_bytes()
    for number in range(60):  # anything in the header, the tags and the data
        spoilt = bytearray(whole)
        for place in random.randint(0, [8, 400, len(whole)][number % 3], 6):
            spoilt[place] = random.randint(256)
        path.write_bytes(bytes(spoilt[: random.randint(8, len(whole))] if number % 5 == 0 else spoilt))
        for reader in (TiffWindows, RasterioWindows, open_windows):
            with contextlib.suppress(DecodeError):  # and nothing else
                image = reader(str(path))
                image.read(0, 0, min(50, image.size[0]), min(50, image.size[1]))
    for content in (b"", b"II*\0", b"II*\0" + struct.pack("<I", 8), b"no image"):
        path.write_bytes(content)
        with pytest.raises(DecodeError, match=r"image\.tif: "):
            open_windows(str(path))


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    for name, said in (
        ("pipe.tif", "is a pipe or a device"),
        ("gone.tif", "there is no such file"),
        (".", "is a folder"),
    ):
        with pytest.raises(DecodeError, match=said):
            open_windows(str(tmp_path / name))


def test_pieces_that_are_not_stored_are_empty(tmp_path):
    path = write(tmp_path / "image.tif", iter([b""] * 30), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, **RGB,
                 tile=(16, 16), compression="zlib")  # fmt: skip
    for reader in (TiffWindows, RasterioWindows):
        assert not np.asarray(reader(path).read(0, 0, HEIGHT, WIDTH)).any()


def test_few_pieces_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "CACHE", 3 * 16 * 16 * 3)
    image = TiffWindows(write(tmp_path / "image.tif", values(3), **RGB, tile=(16, 16), compression="zlib"))
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(image.read(3, 3, 60, 80)), values(3)[3:63, 3:83])
        assert len(image.cache) <= 3
    image.read(69, 89, 1, 1)
    last = image.cache[29]
    image.read(64, 80, 6, 10)
    assert image.cache[29] is last


def test_rasterio_keeps_as_little(tmp_path, monkeypatch):
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    path = write(tmp_path / "image.tif", values(3), **RGB)
    RasterioWindows(path)
    assert os.environ["GDAL_CACHEMAX"] == str(windows.CACHE // 2**20)
    monkeypatch.setenv("GDAL_CACHEMAX", "99")  # somebody's own choice
    RasterioWindows(path)
    assert os.environ["GDAL_CACHEMAX"] == "99"


def test_tags_of_the_place_on_earth_are_kept(tmp_path):
    scale = (33550, "d", 3, (0.5, 0.5, 0.0), True)
    point = (33922, "d", 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0), True)
    path = write(tmp_path / "image.tif", values(3), **RGB, extratags=[scale, point, (305, "s", 0, "software", True)])
    for reader in (TiffWindows, RasterioWindows):
        found = {tag[0]: tag[3] for tag in reader(path).tags}
        assert found == {33550: scale[3], 33922: point[3]}
