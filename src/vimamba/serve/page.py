"""The page: one HTML file that needs nothing else, for a server and for a static folder alike."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from vimamba.inference.predictor import Predictor
from vimamba.tasks.overlays import colours
from vimamba.tasks.results import is_background

FILE = Path(__file__).with_name("page.html")
PLACE = "null/*settings*/"


def page(predictor: Predictor, **more: Any) -> str:
    """Its text, with what it must know of the model.

    Args:
        predictor: whose model it is.
        more: settings of a page that runs the model itself.
    """
    card, names = predictor.card, predictor.class_names
    shades = [
        None if is_background(name) else shade for name, shade in zip(names, colours(names).tolist(), strict=True)
    ]
    known = {"model": card.model, "task": card.task, "classes": names, "colours": shades, **more}
    settings = json.dumps(known).replace("<", "\\u003c")  # a class may be called </script>
    return FILE.read_text(encoding="utf-8").replace(PLACE, settings)


def headers(text: str) -> dict[str, str]:
    """What a browser is told: run the script of this page alone, and load nothing from elsewhere."""
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    return {"content-security-policy": rules, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
