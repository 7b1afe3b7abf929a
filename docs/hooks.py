"""What MkDocs does besides: the repository's own pages belong to the site, and links out of docs/ find them there."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
LINE = 36
"""Letters of code that fit in a line of a phone's."""
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


def on_page_content(content: str, **_: Any) -> str:
    """Keep short code in one line, and let long names break behind their dots."""
    content = re.sub(r"(?<!</span>)<code>([^<]+)</code>", lambda code: f"<code>{_whole(code[1])}</code>", content)
    return re.sub(r"(?<=doc-object-name )[^>]*>[^<]+", lambda name: name[0].replace(".", ".<wbr>"), content)


def _whole(code: str) -> str:
    """Code that is not broken, or of long code its words."""
    code = " ".join(code.split())
    parts = [code] if len(html.unescape(code)) <= LINE else code.split()
    short = (len(html.unescape(part)) <= LINE for part in parts)
    return " ".join(
        f'<span class="whole">{part}</span>' if fits else part for part, fits in zip(parts, short, strict=True)
    )
