"""Reading weights safely, and the published checkpoints."""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vimamba.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, .safetensors or a PyTorch file that holds only tensors and plain values.

    Nothing in the file is ever executed; the official checkpoints' argparse.Namespace is allowed.

    Raises:
        UserError: there is no such file, it is not a checkpoint, it is damaged, or it asks to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        name = refused.group(1) if refused else _first_call(path)
        if name:
            raise UserError(f"{path}: refused, it asks to run {name} on loading; nothing was executed") from None
        raise UserError(f"{path}: not a PyTorch or safetensors checkpoint, or a damaged one") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a PyTorch or safetensors checkpoint, or a damaged one ({reason})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a state dict")
    return contents


def _first_call(path: Path) -> str | None:
    """The first function that a plain pickle names, found by reading its instructions, not by running them."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for instruction, argument, _ in pickletools.genops(file):
                if instruction.name == "STACK_GLOBAL" and len(strings) >= 2:
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, IndexError):
        pass
    return None


def state_dict_of(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint: under `model` or `state_dict`, or at the top.

    Raises:
        UserError: there are none.
    """
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    tensors = {k.removeprefix("module."): v for k, v in contents.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError("the checkpoint holds no tensors")
    return tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict, or say in one sentence how it differs from the model.

    Raises:
        UserError: names or shapes differ.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    for problem, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{source}: is of another model: it {problem} {', '.join(names[:3])}{more}")
    if shapes:
        name = min(shapes)
        found, wanted = tuple(tensors[name].shape), tuple(own[name].shape)
        raise UserError(f"{source}: is of another model: {name} has shape {found}, the model has {wanted}")
    model.load_state_dict(tensors)


def cache_folder() -> Path:
    """Where converted weights are kept: $VIMAMBA_CACHE, or vimamba under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vimamba"
    return Path(os.environ.get("VIMAMBA_CACHE", default))


def published_weights(hub_id: str, filename: str) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, fetched once, converted, and cached as safetensors.

    Raises:
        UserError: the weights are neither cached nor to be fetched; it says what to do.
    """
    cached = cache_folder() / f"{hub_id.replace('/', '--')}--{Path(filename).stem}.safetensors"
    if cached.is_file():
        return load_file(cached)
    try:
        fetched = hf_hub_download(hub_id, filename)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the weights {filename} of {hub_id} could not be fetched from the hub ({type(error).__name__}): go online "
            f"once, or fetch that file elsewhere and give its path as the checkpoint"
        ) from None
    tensors = {k: v.contiguous() for k, v in state_dict_of(read_checkpoint(fetched)).items()}
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial)
    partial.replace(cached)
    return tensors
