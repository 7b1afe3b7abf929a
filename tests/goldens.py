"""Outputs of the published model code, from the shared folder beside the checkout or the copy in tests/data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT.parent / "shared" / "goldens", ROOT / "tests" / "data" / "goldens")


def golden_files() -> list[Path]:
    """Every golden file, each name once, the shared one first."""
    found: dict[str, Path] = {}
    for folder in FOLDERS:
        for path in sorted(folder.glob("*.pt")):
            found.setdefault(path.name, path)
    return list(found.values())


def load_golden(path: Path) -> dict[str, Any]:
    """config, state_dict, input, features, logits, grads."""
    return torch.load(path, weights_only=True)
