"""From a request to images: forms, JSON and bare bytes, all within bounds."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

from fastapi import Request
from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from vimamba.data.decode import DecodeError, decode_image, opened
from vimamba.errors import escaped
from vimamba.serve.options import Refused, ServeOptions

LONGEST = 255  # letters of a file's name that are kept
DATA_URL = re.compile(r"data:[^,]{0,255};base64,")
IN_WORK = 12  # bytes a pixel: a float32 tensor of three channels
WAY_OUT = 'send {"image": BASE64} or {"images": [BASE64, ...]}'


class Upload(NamedTuple):
    """A file as it was sent."""

    name: str
    data: bytes


class Memory:
    """Bytes that requests hold together, counted from any thread.

    Args:
        limit: of them.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self.lock = Lock()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request holds, given back at its end."""
        share = Share(self)
        try:
            yield share
        finally:
            with self.lock:
                self.held -= share.held
                share.ended = True


class Share:
    """Of the memory."""

    def __init__(self, memory: Memory):
        self.memory, self.held, self.ended = memory, 0, False

    def add(self, count: int) -> None:
        """Hold so many bytes more.

        Raises:
            Refused: they are not to be had now.
        """
        with self.memory.lock:
            if self.ended:  # it was answered while a thread still worked for it
                raise Refused(429, "the request has ended")
            if self.memory.held + count > self.memory.limit:
                raise Refused(429, "the server has its memory full of other requests; try again in a moment")
            self.memory.held += count
            self.held += count


async def read_body(request: Request, options: ServeOptions, share: Share) -> bytes:
    """The whole body of a request.

    Raises:
        Refused: it is larger, or slower, than is allowed.
    """
    length = request.headers.get("content-length", "")
    _check_length(int(length) if length.isdecimal() else 0, options)
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            _check_length(len(body) + len(chunk), options)
            share.add(len(chunk))
            body.extend(chunk)

    try:
        await asyncio.wait_for(read(), options.timeout_s)
    except asyncio.TimeoutError:
        raise Refused(408, f"the request had not arrived after {options.timeout_s:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the request ended early") from None
    return bytes(body)


def _check_length(length: int, options: ServeOptions) -> None:
    if length > options.max_upload:
        raise Refused(413, f"the request is larger than {options.max_upload_mb:g} MB; send a smaller image")


async def uploads(request: Request, body: bytes) -> tuple[list[Upload], bool]:
    """The files of a request, and whether it is of the kind that gives several.

    Raises:
        Refused: there are none.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = await _of_form(request, body)
        return found, len(found) > 1
    if kind == "application/json" or kind.endswith("+json"):
        return await asyncio.get_running_loop().run_in_executor(None, _of_json, body)
    return [Upload("image", body)], False


async def _of_form(request: Request, body: bytes) -> list[Upload]:
    async def whole() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(request.headers, whole())  # type: ignore[arg-type]
    parser.spool_max_size = len(body) + 1  # images stay in memory and are not written to a disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read ({error.message.rstrip('.')})") from None
    async with _closing(form):
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        found = [Upload((file.filename or "image")[:LONGEST], await file.read()) for file in files]
    if not found:
        raise Refused(400, "the form has no file; send one image or several as files of a multipart form")
    return found


class _closing:  # noqa: N801 - a context
    """Close a form's files."""

    def __init__(self, form: Any):
        self.form = form

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *error: Any) -> None:
        await self.form.close()


def _of_json(body: bytes) -> tuple[list[Upload], bool]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, f"the body is not JSON; {WAY_OUT}") from None
    if not isinstance(given, dict) or {*given} not in ({"image"}, {"images"}):
        raise Refused(400, f"the JSON has no image; {WAY_OUT}")
    several = "images" in given
    texts = given["images"] if several else [given["image"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"the JSON has no image; {WAY_OUT}")
    names = [f"images[{i}]" for i in range(len(texts))] if several else ["image"]
    return [Upload(name, _decoded(name, text)) for name, text in zip(names, texts, strict=True)], several


def _decoded(name: str, text: str) -> bytes:
    start = DATA_URL.match(text)
    try:
        return base64.b64decode(text[start.end() :] if start else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{name}: is not base64") from None


def size_of(upload: Upload, max_pixels: int) -> int:
    """The pixels of an image, by its header.

    Raises:
        Refused: it has too many.
        DecodeError: it is no image.
    """
    if not upload.data:
        raise DecodeError(upload.name, "is empty (0 bytes)")
    try:
        with opened(io.BytesIO(upload.data), upload.name) as image:
            width, height = image.size
    except DecodeError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise Refused(413, str(error)) from None
        raise
    if width * height > max_pixels:
        most = f"{max_pixels / 1e6:g} million pixels"
        raise Refused(413, f"{escaped(upload.name)}: is {width} x {height} pixels; send one of at most {most}")
    return width * height


def picture(upload: Upload) -> Image.Image:
    """The image.

    Raises:
        DecodeError: it cannot be decoded.
    """
    return decode_image(io.BytesIO(upload.data), upload.name)
