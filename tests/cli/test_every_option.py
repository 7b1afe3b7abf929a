"""Every option of every command with a value other than its default: it runs, and does what its line in the table says.

What a command leaves and prints with the value is held against what it leaves and prints without.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import string
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.cli.option_values import ASKS, CONFIGS, GIVEN, VALUES, Value
from tests.cli.runs import write_photos
from tests.cli.test_bad_commands import parser_of
from tests.data.test_shards import write_shards
from tests.dense import write_masks
from vimamba.cli import COMMANDS, ablate, main, parsing
from vimamba.serve import server

CASES = [(command, name, value) for command in VALUES for name in VALUES[command] for value in VALUES[command][name]]


def described(case: tuple[str, str, Value]) -> str:
    command, name, value = case
    return f"{command} {typed(name, value)}"


def typed(name: str, value: Value) -> str:
    return f"--{name} {value.words}".strip()


class Outcome(NamedTuple):
    """What came of a command, apart from times: the files are those of its folder, by name, with what they hold."""

    status: int
    printed: str
    error: str
    files: dict[str, Any]


class Caller:
    """Calls commands, each in a folder of its own."""

    def __init__(self, places: dict[str, Path], root: Path):
        self.places, self.root, self.calls = places, root, 0
        self.outcome_without = functools.cache(self.outcome)

    def words(self, text: str, out: Path) -> list[str]:
        """The words of a command line, with the places in them."""
        known = {**self.places, "out": out, "config": out.with_suffix(".yaml")}
        return [string.Template(word).substitute(known) for word in shlex.split(text)]

    def outcome(self, command: str, text: str, over: bool) -> Outcome:
        """Call a command, over an earlier run where it says so."""
        self.calls += 1
        out = self.root / str(self.calls)
        out.mkdir()
        out.with_suffix(".yaml").write_text(CONFIGS.get(command, ""))
        if over:
            shutil.copytree(self.places["trained"], out / "run")
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                status = main([command, *self.words(text, out)])
            except SystemExit as asked:  # --help and --print_config
                status = int(str(asked.code))
        files = {name_of(path, out): content(path) for path in out.rglob("*") if path.is_file()}
        tells_times = command in ("train", "export", "bench", "ablate") and files
        text = "" if tells_times else printed.getvalue().replace(str(out), "$out")
        return Outcome(status, text, error.getvalue().replace(str(out), "$out"), files)


def name_of(path: Path, out: Path) -> str:
    """The place of a file in a folder; of a log, whose name tells the time, that of its logger."""
    return re.sub(r"(logs/\w+)/.*", r"\1", str(path.relative_to(out)))


def content(path: Path) -> Any:
    """What a file holds, apart from times and places."""
    if "logs" in path.parts:
        return None
    if path.suffix == ".ckpt":
        contents = torch.load(path, weights_only=True)
        weights = contents["state_dict"]
        digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights.values())).hexdigest()
        return contents["global_step"], list(weights), digest
    if path.suffix == ".csv":
        times = ("seconds", "train_s", "forward_ms", "step_ms", "skip_forward_ms")
        with path.open() as file:
            return [{name: cell for name, cell in row.items() if name not in times} for row in csv.DictReader(file)]
    if path.suffix == ".json" and "results" in (measured := json.loads(path.read_text())):
        kept = ("model", "attention", "pass", "dtype", "batch", "size", "mode", "error")
        return measured["machine"]["threads"], [
            ([row[name] for name in kept], len(row["times_s"]), row["peak_extra_bytes"] is None)
            for row in measured["results"]
        ]
    return path.read_bytes() if path.suffix in (".safetensors", ".json", ".onnx", ".pt2", ".npz") else None


@pytest.fixture(scope="module")
def caller(trained, segmented, detected, tmp_path_factory):
    """With the places that the table calls $photos, $trained and so on, which no command changes."""
    root = tmp_path_factory.mktemp("places")
    broken = write_photos(root / "broken", seed=2)
    for half in ("train", "val"):
        (broken / half / "red" / "0.png").write_bytes(b"")
    sizes = dict(depth=1, embed_dim=16, d_state=4)
    timm.models.save_for_hf(timm.create_model("vim_nano", **sizes), root / "published", model_args=sizes)
    (root / "names").write_text("blue\ngreen\n")
    places = {
        "segmented": segmented,
        "detected": detected,
        "masks": segmented.parent / "data",
        "full": with_masks(root / "full", lambda mask: np.where(mask == 255, 0, mask)),
        "large": with_masks(root / "large", lambda image: image.repeat(2, 0).repeat(3, 1), "*"),
        "objects": detected.parent / "data",
        "trained": trained,
        "photos": trained.parent / "photos",
        "other": write_photos(root / "other", seed=3),
        "flat": write_photos(root / "flat", halves=((".", 10),), seed=1),
        "broken": broken,
        "published": root / "published",
        "names": root / "names",
        "shards": write_shards(root / "shards", {"train": (2, 8), "validation": (1, 8)}, {"class_names": None}),
    }
    return Caller(places, tmp_path_factory.mktemp("called"))


def with_masks(root, change, which="masks"):
    """Images with masks, of which some files have been changed."""
    for path in write_masks(root).glob(f"*/{which}/*.png"):
        Image.fromarray(change(np.asarray(Image.open(path))).astype(np.uint8)).save(path)
    return root


@pytest.fixture
def _as_it_was(monkeypatch):
    """Threads, processes and environment are afterwards as before; there is no GPU to round otherwise, the page of
    a study goes without the times of large models, and a server tells what it was given."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(server, "serve", lambda run, what, how, ready: print(what, how))
    monkeypatch.setattr(ablate, "design_costs", lambda: {"ssm_conv": 1.0, "none": 0.75})
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_values_and_every_value_an_option(command):
    options = {name.removeprefix("--") for name in parsing._options(parser_of(command))}
    assert options == {name for name, values in VALUES[command].items() if values}


@pytest.mark.parametrize("case", [case for case in CASES if case[1] not in ASKS], ids=described)
def test_no_value_is_the_default(caller, case, tmp_path):
    command, name, value = case
    (tmp_path / "out.yaml").write_text(CONFIGS.get(command, ""))
    parser = parser_of(command)
    words = caller.words(f"{GIVEN[command]} {typed(name, value)}", tmp_path / "out")
    assert parsing.parse(parser, words)[name] != parser.get_default(name)


@pytest.mark.slow
@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("case", CASES, ids=described)
def test_every_option_acts(caller, case):
    command, name, value = case
    beside = value.beside if value.bare else f"{GIVEN[command]} {value.beside}"
    found = caller.outcome(command, f"{beside} {typed(name, value)}", value.over)
    if value.refused:
        assert found.status == 2
        assert found.error.startswith(f"error: {value.refused}")
        return
    assert found.status == 0, found.error
    without = caller.outcome_without(command, beside, value.over)
    assert (found != without) == value.acts
    assert name != "help" or found.printed.startswith(f"usage: vimamba {command} ")


@pytest.mark.parametrize("command", [command for command in COMMANDS if "print_config" in VALUES[command]])
def test_config_takes_what_print_config_prints(caller, tmp_path, command):
    needed = {"eval": "$trained", "predict": "$trained $photos/val", "export": "$trained", "serve": "$trained"}.get(
        command, ""
    )
    for typed_out in (f"{GIVEN[command]}", f"{needed} --config {tmp_path}/printed.yaml"):
        found = caller.outcome(command, f"{typed_out} --print_config", False)
        assert (found.status, found.error) == (0, "")
        (tmp_path / "printed.yaml").write_text(found.printed)
        typed_only = {*ASKS, "config", *parser_of(command).typed_only}
        assert {*yaml.safe_load(found.printed)} == {*VALUES[command]} - typed_only
