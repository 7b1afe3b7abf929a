"""Fetch timm's source distribution and point its tests/test_models.py at vimamba's models.

    python -m tests.timm_suite.prepare FOLDER VERSION

Only the two lists that say which kind of model is which are changed: FEAT_INTER_FILTERS, the modules whose models have
forward_intermediates, and NON_STD_FILTERS, the models whose tokens are not a map.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import vimamba

LISTS = {
    "FEAT_INTER_FILTERS": ["registry", "pyramid"],
    "NON_STD_FILTERS": [name for name in vimamba.list_models() if "pyramid" not in name],
}


def source(folder: Path, version: str) -> Path:
    """The unpacked source distribution, fetched by pip once."""
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / f"timm-{version}"
    if not unpacked.is_dir():
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), f"timm=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
        with tarfile.open(folder / f"timm-{version}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def edited(text: str) -> str:
    """test_models.py with our lists in place of timm's."""
    for name, filters in LISTS.items():
        text, count = re.subn(rf"^{name} = \[.*?^\]$", f"{name} = {filters!r}", text, flags=re.MULTILINE | re.DOTALL)
        if count != 1:
            raise SystemExit(f"test_models.py: {name} is there {count} times, not once; is this timm 1.0.31?")
    return text


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    original = source(folder, sys.argv[2]) / "tests" / "test_models.py"
    (folder / "test_models.py").write_text(edited(original.read_text()))  # outside timm's package of tests
