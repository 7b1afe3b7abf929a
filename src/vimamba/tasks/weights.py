"""Models with their weights: built by name, written as safetensors, read without running anything."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError, nearest, require
from vimamba.models.checkpoints import load_weights, read_checkpoint, state_dict_of
from vimamba.models.registry import convert_checkpoint


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a file of weights must say to be used: the model, its classes and its preprocessing."""

    model: str
    model_args: dict[str, Any]
    class_names: list[str]
    preprocessing: Preprocessing
    trained: dict[str, Any] = dataclasses.field(default_factory=dict)  # data, epoch, top1: for people to read

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        return cls(**{**values, "preprocessing": Preprocessing.from_dict(values["preprocessing"])})

    def build(self) -> nn.Module:
        prep = self.preprocessing
        return build_model(self.model, len(self.class_names), prep.in_chans, prep.img_size, self.model_args)


def check_model_name(name: str) -> None:
    """Refuse a name that neither vimamba nor timm knows, with the nearest that they do."""
    if ":" in name or timm.is_model(name.split(".")[0]):
        return
    hint = nearest(name, timm.list_models()) or "; `vimamba models` lists them"
    raise UserError(f"--model {name}: there is no such model{hint}")


def build_model(
    name: str,
    num_classes: int,
    in_chans: int,
    img_size: tuple[int, int] | None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A vimamba or timm model; img_size goes to the models that take one."""
    check_model_name(name)
    given = {"num_classes": num_classes, "in_chans": in_chans, "pretrained": pretrained, **(model_args or {})}
    sizes = [{"img_size": img_size}, {}] if img_size else [{}]
    for size in sizes:
        try:
            return timm.create_model(name, **{**size, **given})
        except TypeError as error:
            if size and "img_size" in str(error):
                continue
            raise UserError(f"--model {name} with --model_args {model_args or {}}: {_one_line(error)}") from error
        except Exception as error:  # each architecture checks its arguments, and the hub its network, in its own way
            what = f"{name} with --model_args {model_args}" if model_args else name
            what += " --pretrained" if pretrained else ""
            raise UserError(f"--model {what}: cannot be built: {_one_line(error)}") from error
    raise AssertionError("unreachable")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def save_model(path: Path, model: nn.Module, card: ModelCard) -> None:
    """Weights and card in one safetensors file; the file is whole or not there."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt", "vimamba": json.dumps(card.to_dict())})
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner reads
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({_one_line(error)})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_model(run: str | Path) -> tuple[nn.Module, ModelCard]:
    """The model of a run's folder, of its model.safetensors or of one of its checkpoints."""
    path = Path(run)
    if path.is_dir():
        require(
            (path / "model.safetensors").is_file(),
            f"{path}: holds no model.safetensors; is it a run's folder?",
        )
        path = path / "model.safetensors"
    if not path.exists():
        beside = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such run or file{nearest(str(path), beside)}")
    tensors, described = read_weights(path)
    require(
        described is not None,
        f"{path}: holds weights, but not vimamba's description of the model and its classes",
    )
    assert described is not None
    try:
        card = ModelCard.from_dict(described)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its description of the model is damaged ({_one_line(error)})") from error
    model = card.build()
    load_weights(model, tensors, path)
    return model.eval(), card


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors by name, and vimamba's description if the file carries one; nothing in it is executed."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    contents = read_checkpoint(path)
    tensors = state_dict_of(contents)
    # Of our own checkpoints, which hold the whole task, the weights that were evaluated.
    for prefix in ("ema.module.", "model."):
        inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if inner:
            tensors = inner
            break
    return tensors, contents.get("vimamba")


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("vimamba")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, json.loads(described) if described else None
    except (SafetensorError, OSError, ValueError) as error:
        reason = "is empty (0 bytes)" if path.is_file() and path.stat().st_size == 0 else _one_line(error)
        raise UserError(f"{path}: is truncated, damaged or no safetensors file ({reason})") from error


def load_start(model: nn.Module, path: Path) -> str:
    """Start a training from the weights in a file; a head for other classes is left as it was.

    Returns a note on what was done.
    """
    tensors, _ = read_weights(path)
    tensors = convert_checkpoint(tensors, model)
    # timm's convention: a model's module adapts the names and sizes of its published checkpoints.
    if adapt := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
        try:
            tensors = adapt(tensors, model)
        except Exception as error:  # it trips over checkpoints of other models in many ways
            raise UserError(f"--checkpoint {path}: is not of this model ({_one_line(error)})") from error
    own, note = model.state_dict(), f"weights from {path}"
    head = [name for name in own if name.rsplit(".", 1)[0] in _classifiers(model)]
    if any(name in tensors and tensors[name].shape != own[name].shape for name in head):
        tensors = {**tensors, **{name: own[name] for name in head}}
        note += ", with a new head for these classes"
    load_weights(model, tensors, f"--checkpoint {path}")
    return note


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)
