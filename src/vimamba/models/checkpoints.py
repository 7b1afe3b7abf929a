"""Reading weights safely, and the published checkpoints."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vimamba.errors import UserError, naming, one_line, shown
from vimamba.files import whole


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, .safetensors or a PyTorch file that holds only tensors and plain values.

    Nothing in the file is ever executed; the official checkpoints' argparse.Namespace is allowed. What a safetensors
    file says of its model stands under `vimamba` beside `state_dict`, as in a checkpoint of `vimamba train`.

    Raises:
        UserError: there is no such file, it is not a checkpoint, it is damaged, or it asks to run code.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint file")
    if not path.is_file():  # opening a pipe or a device may wait for ever
        raise UserError(f"{path}: is no regular file; give a checkpoint file")
    no_checkpoint = f"{path}: not a PyTorch or safetensors checkpoint, or a damaged one"
    if path.stat().st_size == 0:  # /proc has such files, and reading some of them waits for ever
        raise UserError(f"{no_checkpoint} (it is empty, 0 bytes)")
    try:
        contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = refused.group(1) if refused else _first_call(path)
        if name:
            raise UserError(f"{path}: refused, it asks to run {name} on loading; nothing was executed") from None
        raise UserError(no_checkpoint) from None
    except Exception as error:  # damaged files trip PyTorch's reader in a dozen ways
        raise UserError(f"{no_checkpoint} ({one_line(error)})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a state dict")
    with naming(path):
        state_dict_of(contents)
    return contents


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get("vimamba")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors if described is None else {"state_dict": tensors, "vimamba": json.loads(described)}


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # torch.save never compresses, so nothing in the archive is larger than the file: a zip bomb is.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
            sum(entry.file_size for entry in entries) > path.stat().st_size
        ):
            raise ValueError("its archive is compressed or holds more than the file; torch.save writes neither")
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _first_call(path: Path) -> str | None:
    """The first function that a plain pickle names, found by reading its instructions, not by running them."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for instruction, argument, _ in itertools.islice(pickletools.genops(file), 100_000):
                named = strings[-2:] if instruction.name == "STACK_GLOBAL" else str(argument).split(" ")
                if instruction.name in ("STACK_GLOBAL", "GLOBAL") and len(named) == 2:
                    return ".".join(named) if all(re.fullmatch(r"[\w.]{1,80}", part) for part in named) else None
                if isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # no pickle after all
        pass
    return None


def state_dict_of(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint: under `model` or `state_dict`, or at the top.

    Raises:
        UserError: there are none, or one of them is not plain numbers that the file holds.
    """
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    found = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
    for name, value in found.items():
        if not isinstance(name, str):
            raise UserError(f"the checkpoint names a tensor {shown(name)}, which is no text")
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_complex():
            raise UserError(f"the checkpoint's tensor {shown(name)} is sparse, quantized, nested or complex")
        # A file may claim billions of numbers that are views of a few, or that are not there at all.
        if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"the checkpoint's tensor {shown(name)} claims more numbers than the file holds")
    if not found:
        raise UserError("the checkpoint holds no tensors")
    return {name.removeprefix("module."): value for name, value in found.items()}


def check_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Refuse a state dict whose names, shapes or kinds of numbers are not those `expected`, in one sentence.

    Raises:
        UserError: it is another model's.
    """
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    for problem, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(shown(name).strip("'") for name in names[:3])
            raise UserError(f"is of another model: it {problem} {listed}{more}")
    for name in sorted(expected):
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape:
            shapes = f"{name} has shape {tuple(found.shape)}, the model has {tuple(wanted.shape)}"
            raise UserError(f"is of another model: {shapes}")
        if found.is_floating_point() != wanted.is_floating_point():
            raise UserError(f"{name} holds {found.dtype}, the model has {wanted.dtype}")


def classifiers(model: Any) -> tuple[str, ...]:
    """Names of a timm model's classifiers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load a state dict, or say in one sentence why it cannot be.

    Raises:
        UserError: names or shapes differ from the model's, or a weight is not a finite number.
    """
    expected = model.state_dict()
    with naming(source):
        check_fit(expected, tensors)
        for name, value in tensors.items():
            if not value.to(expected[name].dtype).isfinite().all():
                raise UserError(f"{name} holds numbers that are infinite or not a number; these weights are broken")
    model.load_state_dict(tensors)


def cache_folder() -> Path:
    """Where converted weights are kept: $VIMAMBA_CACHE, or vimamba under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vimamba"
    return Path(os.environ.get("VIMAMBA_CACHE", default))


class OfficialWeights(dict[str, Tensor]):
    """The state dict of an official checkpoint: all of them were trained on square images."""


def published_weights(hub_id: str, filename: str) -> OfficialWeights:
    """The tensors of a published checkpoint, fetched once, converted, and cached as safetensors.

    Raises:
        UserError: the weights are neither cached nor to be fetched; it says what to do.
    """
    cached = cache_folder() / f"{hub_id.replace('/', '--')}--{Path(filename).stem}.safetensors"
    if cached.is_file():
        return OfficialWeights(load_file(cached))
    try:
        fetched = hf_hub_download(hub_id, filename)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the weights {filename} of {hub_id} could not be fetched from the hub ({type(error).__name__}): go online "
            "once, or fetch that file elsewhere and give its path as `checkpoint`, without `pretrained`"
        ) from None
    tensors = {k: v.contiguous() for k, v in state_dict_of(read_checkpoint(fetched)).items()}
    cached.parent.mkdir(parents=True, exist_ok=True)
    with whole(cached) as partial:
        save_file(tensors, partial)
    return OfficialWeights(tensors)
