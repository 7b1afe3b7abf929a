"""Every argument of a training run, by name: as keyword arguments, and as the YAML file that a run keeps."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vimamba.data.transforms import AugmentOptions
from vimamba.errors import UserError, nearest, one_line, require, shown
from vimamba.kinds import convert, describe, fits
from vimamba.models.description import BUILDING
from vimamba.tasks.loggers import OWN_LOGGERS
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.options import DenseOptions, MachineOptions, RunOptions

GROUPS = (RunOptions, DenseOptions, OptimOptions, AugmentOptions, MachineOptions)
MAX_CONFIG = 2**20  # bytes
MAX_NESTING = 20


@dataclasses.dataclass
class TrainConfig:
    """What a run is asked for."""

    run: RunOptions
    dense: DenseOptions
    optim: OptimOptions
    augment: AugmentOptions
    machine: MachineOptions

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From arguments by name; those left out have their defaults.

        Raises:
            UserError: one is unknown, missing, of another kind or out of range.
        """
        kinds = argument_kinds()
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        for name, value in values.items():
            hint = nearest(name, kinds)
            require(name in kinds, f"`{name}`: there is no such argument{hint}")
            require(fits(kinds[name], value), f"`{name}`: expected {describe(kinds[name])}, got {shown(value)}")
        for name in ("data", "model"):
            require(name in values, f"`{name}`: required but not given")
        groups = []
        for group in GROUPS:
            names = [field.name for field in dataclasses.fields(group) if field.name in values]
            groups.append(group(**{name: convert(kinds[name], values[name]) for name in names}))
        return cls(*groups)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Every argument by name."""
        parts = (self.run, self.dense, self.optim, self.augment, self.machine)
        return {name: value for part in parts for name, value in vars(part).items()}

    def to_text(self) -> str:
        """The YAML that `read_config` reads back."""
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in self.to_dict().items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def argument_kinds() -> dict[str, Any]:
    """The types of all arguments by name."""
    return {name: kind for group in GROUPS for name, kind in typing.get_type_hints(group).items()}


def default_output(options: RunOptions) -> Path:
    """runs/DATA-MODEL."""
    return Path(f"runs/{Path(options.data.rstrip('/')).name}-{options.model.replace('/', '_').replace(':', '_')}")


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, which may be a stranger's: plain values by name, without aliases.

    Raises:
        UserError: there is no such file, or it is no such YAML.
    """
    require(path.exists(), f"`config`: there is no file {path}")
    require(path.is_file(), f"`config` {path}: is no regular file")
    require(path.stat().st_size > 0, f"`config` {path}: is empty (0 bytes)")  # as files of /proc that wait for ever
    require(path.stat().st_size <= MAX_CONFIG, f"`config` {path}: is larger than {MAX_CONFIG // 2**20} MB")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=loader):
            # A few lines of nested aliases stand for more values than there is memory.
            alias = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)
            require(not alias, f"`config` {path}: has an anchor or alias (& or *), which is not read; write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            require(depth <= MAX_NESTING, f"`config` {path}: is nested deeper than {MAX_NESTING} levels")
        values = yaml.load(text, Loader=loader)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"`config` {path}: is not UTF-8 (byte {error.start}); save it as that") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"`config` {path}: is not valid YAML ({one_line(error)})") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"`config` {path}: holds {shown(values)}, not options by name")
    return values


def fetches(name: str, value: Any) -> bool:
    """Whether an argument's value names something to fetch or to import, which a file may not."""
    text = str(value)
    if name == "logger":
        return value is not None and not {part.strip() for part in text.split(",")} <= {*OWN_LOGGERS, "none"}
    return (name == "model" and ":" in text) or (name == "data" and text.startswith(("hfds/", "hfids/")))


def check_source(path: Path, values: Mapping[str, Any], given: Container[str], builds: bool = True) -> None:
    """Refuse a file's arguments that fetch or import unless they were given besides: the file may be a stranger's.

    Args:
        path: the file.
        values: what it says.
        given: names of the arguments that the user gave.
        builds: whether the model is built from them. A resumed run builds its own from what its checkpoint says, and
            its file may name what is no longer there.

    Raises:
        UserError: it has one.
    """
    for name in ("data", "logger", *(("model",) if builds else ())):
        if name not in given and fetches(name, values.get(name)):
            what = "imported" if name == "logger" else "fetched"
            raise UserError(
                f"`config` {path}: names a {name} to be {what}; give `{name}` {values[name]} if you mean it"
            )
    model_args = values.get("model_args") if builds else None
    building = sorted(BUILDING & model_args.keys()) if isinstance(model_args, dict) else []
    if building and "model_args" not in given:
        raise UserError(f"`config` {path}: model_args may not give {building[0]}; give `model_args.{building[0]}`")
