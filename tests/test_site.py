"""The documentation: it builds without a warning, loads nothing from elsewhere, and its drawings are the code's."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).parents[1]
# What a page loads: every address in these attributes but a link's, which is only followed when clicked.
LOADING = {"src", "srcset", "poster", "data", "href", "action"}
CLICKED = {"a", "area"}
NOT_LOADED = {"canonical", "next", "prev"}


class Loads(HTMLParser):
    """The addresses that a page loads by itself, and those that it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if given.get("rel") in NOT_LOADED:
            return
        for name in LOADING & given.keys():
            (self.linked if tag in CLICKED else self.loaded).append(given[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does; links and anchors that lead nowhere are warnings, and those are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site):
    pages = {path: Loads(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 25
    assert any("https://arxiv.org" in link for page in pages.values() for link in page.linked)  # the parser sees links
    for path, page in pages.items():
        assert page.loaded
        for address in page.loaded:
            parts = urlparse(address)
            assert parts.scheme in ("", "data"), f"{path.name}: {address}"
            assert not parts.netloc, f"{path.name}: {address}"
            if path.name != "404.html" and parts.scheme == "" and parts.path:  # 404.html is served at any address
                assert (path.parent / parts.path).exists(), f"{path.name}: {address}"
    for path in site.rglob("*.css"):
        addresses = re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", path.read_text())
        assert [address for address in addresses if urlparse(address).netloc] == [], path.name


def test_every_public_name_is_described(site):
    import vimamba

    text = "".join(path.read_text() for path in (site / "api").glob("*.html")).replace("<wbr>", "")
    assert [name for name in vimamba.__all__ if not re.search(rf">\s*vimamba\.{name}\s*<", text)] == []
    assert "repeated_augmentation" in text  # an argument of `train`, whose words are put together from its options


def test_a_list_is_no_sentence(site):
    pages = {path.name: path.read_text() for path in site.rglob("*.html")}
    assert "<li>" in pages["CHANGELOG.html"]
    assert [name for name, text in pages.items() if re.search(r"<p>(?:(?!</p>).)*\n- ", text, re.S)] == []


def test_short_code_stays_in_one_line_and_long_code_keeps_its_words(site):
    text = (site / "explain.html").read_text()
    assert '<code><span class="whole">integrated_gradients</span></code>' in text
    long = re.search(r"<code>(<span class=\"whole\">vimamba</span> .*?)</code>", text)
    assert long is not None
    assert long[1].endswith('<span class="whole">explained/</span>')


def test_the_drawings_are_those_of_the_code():
    drawn = runpy.run_path(str(ROOT / "docs/drawings.py"))["drawings"]()
    kept = {path.name: path.read_text() for path in (ROOT / "docs/drawings").glob("*.svg")}
    assert drawn.keys() == kept.keys()
    assert [name for name, text in drawn.items() if text != kept[name]] == []
