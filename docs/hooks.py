"""What MkDocs does besides: the repository's own pages belong to the site, and links out of docs/ find them there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
PLACES = {"../examples/cpp": "examples.md#without-python", "../recipes": "numbers.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages, whose links to docs/ lose that part."""
    for name in OF_THE_REPOSITORY:
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links out of docs/ to the pages that show what they lead to."""
    for name in OF_THE_REPOSITORY:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    for path, page in PLACES.items():
        markdown = markdown.replace(f"]({path})", f"]({page})")
    return markdown
