"""The page: one HTML file that needs nothing else, for a server and for a static folder alike."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vimamba.tasks.overlays import colours
from vimamba.tasks.results import is_background

FILE = Path(__file__).with_name("page.html")
PLACE = "null/*settings*/"
WASM = "'wasm-unsafe-eval'"  # what a browser calls compiling WebAssembly


def page(model: str, task: str, names: list[str], **more: Any) -> str:
    """Its text, with what it must know.

    Args:
        model, task, names: the model's name, its task and its classes.
        more: settings of a page that runs the model itself.
    """
    shades = [
        None if is_background(name) else shade for name, shade in zip(names, colours(names).tolist(), strict=True)
    ]
    known = {"model": model, "task": task, "classes": names, "colours": shades, **more}
    settings = json.dumps(known).replace("<", "\\u003c")  # a class may be called </script>
    return FILE.read_text(encoding="utf-8").replace(PLACE, settings)


def headers(text: str) -> dict[str, str]:
    """What a server tells a browser beside a page."""
    more = "frame-ancestors 'self'"
    return {
        "content-security-policy": f"{rules(text)}; {more}",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def with_rules(text: str, elsewhere: str) -> str:
    """A page for a folder: its rules in itself, with leave to run a model by what it fetches from its folder, or from
    elsewhere."""
    meta = f'<meta http-equiv="Content-Security-Policy" content="{rules(text, "blob: " + WASM, elsewhere)}">'
    return text.replace("<head>", f"<head>\n{meta}", 1)


def rules(text: str, script: str = "", elsewhere: str = "") -> str:
    """Run this page's script alone, and load nothing that is not the page's own or from where it is said to be."""
    own = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    return "; ".join([
        "default-src 'none'", f"script-src 'sha256-{digest}' {script}".strip(), "style-src 'unsafe-inline'",
        "img-src 'self' blob: data:", "media-src blob:", f"connect-src 'self' {elsewhere}".strip(), "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip
