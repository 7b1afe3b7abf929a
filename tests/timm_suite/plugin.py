"""Registers vimamba's models with timm before its tests are collected, keeps those of our models, and serves weights.

The published weights are not fetched: files of the same kind, with random numbers in them, stand for them.
"""

from __future__ import annotations

import argparse

import pytest
import timm
import torch

import vimamba
from vimamba.models import checkpoints, registry

PUBLISHED = {cfg.default.hf_hub_filename: name for name, cfg in registry.default_cfgs.items()}


def pytest_collection_modifyitems(config, items):
    ours = set(vimamba.list_models())
    kept = [item for item in items if _model_of(item).split(".")[0] in ours and "torchscript" not in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _model_of(item) -> str:
    return str(item.callspec.params.get("model_name", "")) if hasattr(item, "callspec") else ""


@pytest.fixture(autouse=True)
def official_weights(tmp_path, monkeypatch):
    """The hub's official files, made when they are asked for."""

    def download(hub_id: str, filename: str) -> str:
        path = tmp_path / filename
        state = timm.create_model(PUBLISHED[filename]).state_dict()
        torch.save({"model": state, "args": argparse.Namespace(model=PUBLISHED[filename])}, path)
        return str(path)

    monkeypatch.setenv("VIMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
