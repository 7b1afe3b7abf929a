"""What OpenAPI says of /predict: bodies and answers."""

from __future__ import annotations

from typing import Any

_BINARY = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "format": "byte"}

BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"image": {"type": "array", "items": _BINARY}}}
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {"type": "object", "required": ["image"], "properties": {"image": _BASE64}},
                    {
                        "type": "object",
                        "required": ["images"],
                        "properties": {"images": {"type": "array", "items": _BASE64}},
                    },
                ]
            }
        },
        "image/*": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
    },
}

_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_REFUSED = {
    400: "the request cannot be read",
    408: "the request took too long to arrive",
    413: "too many bytes, pixels or images",
    422: "not an image, a damaged one, or a wrong parameter",
    429: "too many wait already",
    500: "a fault of the server",
    503: "too many connections",
    504: "no answer in time",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": 'one image: what `vimamba predict --json` prints for it; several: {"results": [...]}',
        "content": {"application/json": {"schema": {"type": "object"}}},
    },
    **{
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSED.items()
    },
}
