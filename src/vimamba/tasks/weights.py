"""Models with their weights: built by name, written as safetensors, read without running anything."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import _hub
from torch import nn

from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError, naming, nearest, one_line, require, showable, shown
from vimamba.files import whole
from vimamba.hub import from_cache_if_out_of_reach
from vimamba.models.checkpoints import classifiers, load_weights, read_checkpoint, state_dict_of
from vimamba.models.description import MAX_TEXT, skeleton
from vimamba.models.registry import convert_checkpoint
from vimamba.tasks.find import find_task
from vimamba_command import package_version


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a file of weights must say to be used: the model, its classes and its preprocessing.

    Raises:
        UserError: the names of the classes are not distinct texts that can be shown.
    """

    model: str
    model_args: dict[str, Any]
    class_names: list[str]
    preprocessing: Preprocessing
    trained: dict[str, Any] = dataclasses.field(default_factory=dict)  # data, epoch, top1: for people to read
    task: str = "classification"
    version: str = dataclasses.field(default_factory=package_version)  # of vimamba that wrote it
    head: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a dense task: its kind and its arguments

    def __post_init__(self) -> None:
        find_task(self.task)
        names = self.class_names
        require(isinstance(names, list) and bool(names), f"class_names is {shown(names)}; it must list texts")
        for name in names:
            if not (isinstance(name, str) and 0 < len(name) <= MAX_TEXT and showable(name)):
                raise UserError(f"the class name {shown(name)} is no text of 1 to {MAX_TEXT} letters that can be shown")
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise UserError(f"class_names lists {shown(twice)} twice; classes must differ in their names")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, tensors: dict[str, torch.Tensor]) -> ModelCard:
        """A description that came with a file's tensors, held against them; see `with_skeleton`."""
        return cls.with_skeleton(values, tensors)[0]

    @classmethod
    def with_skeleton(cls, values: Any, tensors: dict[str, torch.Tensor]) -> tuple[ModelCard, nn.Module]:
        """The same, and the model that it describes, on the meta device.

        Raises:
            UserError: it is damaged, says what it may not, or is not of these tensors.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        keys = set(values) if isinstance(values, dict) else set()
        version = values.get("version", "0.1.0") if keys else ""
        require(
            keys <= {*fields} or not _is_newer(version),
            f"it is of vimamba {shown(version)}, and this is {package_version()}; upgrade",
        )
        needed = [name for name in fields if name not in ("trained", "task", "version", "head")]
        require(
            {*needed} <= keys <= {*fields},
            f"its description of the model is damaged: it must have {', '.join(needed)}",
        )
        for name in ("task", "version"):
            value = values.get(name, "")
            require(isinstance(value, str) and len(value) <= MAX_TEXT, f"{name} is {shown(value)}; it must be a text")
        card = cls(**{"version": "0.1.0", **values, "preprocessing": Preprocessing.from_dict(values["preprocessing"])})
        return card, card._skeleton(tensors)

    def _skeleton(self, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """The model without memory, held against a file's tensors.

        Raises:
            UserError: the card says what it may not, or is not of these tensors.
        """
        task = find_task(self.task)
        model = skeleton(self.model, self.model_args, self.head, lambda: task.build(self), tensors)
        found, outputs = getattr(model, "num_classes", None), task.outputs(self.class_names)
        require(
            found in (None, outputs), f"the model has {shown(found)} outputs, and its file's classes need {outputs}"
        )
        return model

    def build(self, pretrained: bool = False) -> nn.Module:
        """The model with new weights, or with what its publisher trained.

        Raises:
            UserError: there is no such model, or it does not take these arguments.
        """
        check_model_name(self.model)
        fetched = pretrained or ":" in self.model
        try:
            with from_cache_if_out_of_reach() if fetched else contextlib.nullcontext():
                return find_task(self.task).build(self, pretrained)
        except UserError as error:
            raise UserError(f"`model` {self.model}: {error}") from error
        except TypeError as error:
            raise UserError(f"`model` {self.model} with `model_args` {self.model_args}: {one_line(error)}") from error
        except Exception as error:  # each architecture checks its arguments, and the hub its network, in its own way
            what = f"{self.model} with `model_args` {self.model_args}" if self.model_args else self.model
            way_out = "; weights fetched elsewhere are given with `checkpoint`, without `pretrained`"
            raise UserError(
                f"`model` {what}: cannot be built: {one_line(error)}{way_out if pretrained else ''}"
            ) from error


def _is_newer(version: Any) -> bool:
    """Whether a version, such as "0.2.0", is after this one."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d{1,6}", text)[:3]]

    return isinstance(version, str) and numbers(version) > numbers(package_version())


def check_model_name(name: str) -> None:
    """Refuse a name that neither vimamba nor timm knows, with the nearest that they do."""
    if ":" in name:
        return
    if timm.is_model(name.split(".")[0]):
        try:
            timm.models.get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:
            known = [tagged for tagged in timm.list_pretrained() if tagged.startswith(f"{name.split('.')[0]}.")]
            tags = f"; there are {', '.join(known)}" if known else "; it has none"
            raise UserError(f"`model` {name}: there is no such tag of the model{tags}") from error
        return
    hint = nearest(name, timm.list_models()) or "; `vimamba models` lists them"
    raise UserError(f"`model` {name}: there is no such model{hint}")


class Architecture(NamedTuple):
    """What `--model` stands for: a registered model, arguments besides those typed, its publisher's configuration."""

    name: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def architecture(name: str) -> Architecture:
    """The registered model behind a name, which is all that a file may say; a hub model's is read off its page.

    Raises:
        UserError: the hub's page, or the folder, cannot be read.
    """
    source, colon, place = name.partition(":")
    if not colon:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        return Architecture(name, {}, config.to_dict() if config else {})
    reader = {"hf-hub": "load_model_config_from_hf", "local-dir": "load_model_config_from_path"}.get(source, "")
    require(hasattr(_hub, reader), f"`model` {name}: give a name, hf-hub:OWNER/NAME or local-dir:FOLDER")
    try:
        with from_cache_if_out_of_reach() if source == "hf-hub" else contextlib.nullcontext():
            config, registered, model_args = getattr(_hub, reader)(place)
    except Exception as error:  # no network, no such page, no configuration on it
        elsewhere = "; its files fetched elsewhere are given as local-dir:FOLDER" if source == "hf-hub" else ""
        raise UserError(f"`model` {name}: cannot be read: {one_line(error)}{elsewhere}") from error
    return Architecture(registered, dict(model_args or {}), dict(config or {}))


def save_model(path: Path, model: nn.Module, card: ModelCard) -> None:
    """Weights and card in one safetensors file, the same bytes for the same weights; it is whole or not there."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        with whole(path) as partial:
            save_file(tensors, partial, metadata={"format": "pt", "vimamba": json.dumps(card.to_dict())})
            _sort_metadata(partial)
            partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner reads
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in an order that it draws anew in each process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "both write compact JSON"
        file.seek(8)
        file.write(text.ljust(length))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_model(run: str | Path) -> tuple[nn.Module, ModelCard]:
    """The model of a run's folder, of its model.safetensors or of one of its checkpoints.

    The file may be a stranger's: what it says is checked before anything is built, and nothing in it is executed.
    """
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
    with naming(path):
        card = ModelCard.from_dict(described, tensors)
    model = card.build()
    load_weights(model, tensors, path)
    return model.eval(), card


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors by name, and vimamba's description if the file carries one; nothing in it is executed."""
    return described_weights(read_checkpoint(path))


def described_weights(contents: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """The same of what a file holds."""
    return _evaluated(contents), contents.get("vimamba")


def _evaluated(contents: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; of our own, which hold the whole task, the weights that were evaluated."""
    tensors = state_dict_of(contents)
    for prefix in ("ema.module.", "model.") if "loops" in contents else ():  # Lightning's, of a whole task
        inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        if inner:
            return inner
    return tensors


def load_start(model: nn.Module, path: Path, task: str = "classification") -> str:
    """Start a training from the weights in a file; a head for other classes, or of another task, is left as it was.

    Returns a note on what was done.
    """
    dense: Any = model  # if its trunk has a place in it
    with naming("`checkpoint`"):
        contents = read_checkpoint(path)
    with naming(f"`checkpoint` {path}"):
        tensors, described = described_weights(contents)
        trunk, place = find_task(task).trunk(dense)
        taken, kept, grid = _trunk_of(tensors, described)
        taken = convert_checkpoint({**contents, "model": taken}, trunk, grid)
    # timm's convention: a model's module adapts the names and sizes of its published checkpoints.
    if adapt := getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None):
        try:
            taken = adapt(taken, trunk)
        except Exception as error:  # it trips over checkpoints of other models in many ways
            raise UserError(f"`checkpoint` {path}: is not of this model ({one_line(error)})") from error
    fresh, note = trunk.state_dict(), f"weights from {path}"
    if place:
        taken = dense.backbone.kept(taken)
    head = [name for name in fresh if name.rsplit(".", 1)[0] in classifiers(trunk)]
    if any(name in taken and taken[name].shape != fresh[name].shape for name in head):
        taken = {**taken, **{name: fresh[name] for name in head}}
        note += ", with a new head for these classes"
    load_weights(trunk, taken, f"`checkpoint` {path}")
    if place:
        note += _load_head(model, place, kept)
    return note


def _trunk_of(tensors: dict[str, torch.Tensor], described: Any) -> tuple[dict, dict, tuple[int, ...] | None]:
    """Of a file's tensors those of the trunk, the others if they are of a dense task, and the grid it was made for."""
    if not isinstance(described, dict) or "task" not in described:
        return tensors, {}, None
    card, skeleton = ModelCard.with_skeleton(described, tensors)
    trunk, place = find_task(card.task).trunk(skeleton)
    if not place:
        return tensors, {}, None
    inner = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(place)}
    return inner, others, getattr(trunk, "grid", None)


def _load_head(model: nn.Module, place: str, kept: dict[str, torch.Tensor]) -> str:
    """Take from a file of the same task what fits beside the trunk; a note on it."""
    fresh = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(place)}
    fitting = {name: tensor for name, tensor in kept.items() if name in fresh and tensor.shape == fresh[name].shape}
    if not fitting:
        return ", with a new head"
    model.load_state_dict(fitting, strict=False)
    return "" if fitting.keys() == fresh.keys() else ", with what of the head has other sizes new"
