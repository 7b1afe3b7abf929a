"""Whatever a file holds comes out as an upright 8-bit image."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from vimamba.data.decode import DecodeError, decode_image, to_channels

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)


def reread(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return decode_image(file, "picture")


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    grey = np.asarray(reread(Image.fromarray(RAMP), kind))
    assert grey.dtype == np.uint8
    assert np.abs(grey.astype(int).ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
        (np.array([[7, 100, 255]], np.int32), [7, 100, 255]),
    ],
)
def test_floats_and_wide_integers_are_scaled(pixels, expected):
    grey = np.asarray(reread(Image.fromarray(pixels), "tiff"))[0]
    assert np.abs(grey.astype(int) - expected).max() <= 1


def coloured():
    image = Image.new("RGB", (4, 2), (200, 30, 60))
    image.putpixel((0, 0), (20, 220, 40))
    return image


@pytest.mark.parametrize("mode", ["P", "CMYK", "RGBA", "YCbCr"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_colour_modes_keep_their_colours(mode, in_chans):
    kind = {"CMYK": "tiff", "YCbCr": "tiff"}.get(mode, "png")
    image = coloured().quantize(8) if mode == "P" else coloured().convert(mode)
    found = to_channels(reread(image, kind), in_chans)
    wanted = to_channels(coloured(), in_chans)
    assert found.mode == wanted.mode
    assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= 4


def test_cmyk_jpeg():
    found = np.asarray(reread(Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK"), "jpeg", quality=95))
    assert np.abs(found.astype(int) - [200, 30, 60]).max() <= 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    flat = decode_image(_as_file(image.convert("LA" if mode == "LA" else "RGBA"), mode))
    assert to_channels(flat, 1).getpixel((0, 0)) == 255
    assert to_channels(flat, 1).getpixel((1, 0)) == 0


def _as_file(image, mode):
    file = io.BytesIO()
    if mode == "PA":
        image.convert("P").save(file, "gif", transparency=image.convert("P").getpixel((0, 0)))
    else:
        image.save(file, "png")
    file.seek(0)
    return file


def test_a_transparent_colour_of_a_palette_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    flat = np.asarray(reread(image, transparency=0))
    assert flat.tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_undone(orientation):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 24, 16))
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = upright
    for step in undo:
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = reread(stored, "jpeg", exif=exif, quality=95)
    assert found.size == (48, 32)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 3


def test_binary_images():
    assert set(np.unique(np.asarray(reread(Image.fromarray(RAMP > 30000))))) == {0, 255}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"  # which Ghostscript would run


def spoilt(tmp_path, how):
    path = tmp_path / "picture.jpg"
    if how == "missing":
        return path
    if how == "folder":
        path.mkdir()
        return path
    if how == "pipe":
        os.mkfifo(path)
        return path
    Image.effect_noise((64, 64), 50).save(path, "jpeg")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "drawing": EPS, "truncated": whole[: len(whole) // 2]}[how])
    return path


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("empty", "is empty (0 bytes)"),
        ("text", "not an image"),
        ("drawing", "not an image"),
        ("pipe", "is a pipe or a device"),
        ("truncated", "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_named_with_the_reason(tmp_path, how, reason):
    path = spoilt(tmp_path, how)
    with pytest.raises(DecodeError) as refused:
        decode_image(path)
    assert str(path) in str(refused.value)
    assert reason in str(refused.value)
