"""Configuration files, of --config and of a run, that hang, fetch, replace or are none."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.cli.runs import train_arguments, write_photos
from tests.strangers.conftest import description
from vimamba.cli import main
from vimamba.tasks.config import read_config

RECIPES = Path(__file__).parents[2] / "recipes"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
REFUSED = {
    "nested aliases": (LAUGHS.encode(), "anchor or alias"),
    "itself": (b"model_args: &a {x: *a}\n", "anchor or alias"),
    "a merge": (b"a: &a {x: 1}\nb: {<<: *a}\n", "anchor or alias"),
    "an anchor": (b"epochs: &a 3\n", "anchor or alias"),
    "Latin-1": "data: caf\u00e9\n".encode("latin-1"),
    "UTF-16": "data: mnist\n".encode("utf-16"),
    "nested lists": (b"a: " + b"[" * 100_000, "nested deeper"),
    "nested mappings": (b"a: " + b"{a: " * 500, "nested deeper"),
    "large": (b"# " + b"x" * 2_000_000, "larger than 1 MB"),
    "a Python object": (b"data: !!python/object/apply:os.mkdir [canary]\n", "is not valid YAML"),
    "a Python name": (b"data: !!python/name:os.mkdir\n", "is not valid YAML"),
    "no YAML": (b"a: [1, 2\nb: {", "is not valid YAML"),
    "two documents": (b"epochs: 1\n---\nepochs: 2\n", "is not valid YAML"),
    "nothing": (b"", "is empty"),
    "number of 10 000 digits": (b"epochs: " + b"9" * 10_000, "is not valid YAML"),
    "control": (b"data: \x1b[2J\n", "is not valid YAML"),
    "a list": (b"- 1\n- 2\n", "not options by name"),
    "a text": (b"hello\n", "not options by name"),
    "numbers for names": (b"1: 2\n", "not options by name"),
    "zeros": (bytes(1000), "is not valid YAML"),
    # of train
    "model of the hub": (b"model: hf-hub:evil/x\n", "names a model to be fetched"),
    "model of a folder": (b"model: 'local-dir:.'\n", "names a model to be fetched"),
    "data of the hub": (b"data: hfds/evil/x\n", "names a data to be fetched"),
    "a logger's class": (b"logger: evil.module.Logger\n", "names a logger to be imported"),
    "a logger of a service": (b"logger: csv,wandb\n", "names a logger to be imported"),
    "overlay": (b"model_args: {pretrained_cfg_overlay: {file: evil.pth}}\n", "may not give pretrained_cfg_overlay"),
    "cache": (b"model_args: {cache_dir: canary}\n", "may not give cache_dir"),
    "overwrite": (b"overwrite: true\n", "overwrite must be typed"),
    "resume": (b"resume: runs/x\n", "resume must be typed"),
    "another configuration": (b"config: other.yaml\n", "config must be typed"),
    "an unknown option": (b"evil: 1\n", "'evil' is not an option"),
    "a kind": (b"epochs: [1, 2]\n", "--epochs: expected a whole number"),
    "a long text for a number": (b"epochs: " + b"x" * 10_000, "--epochs: expected a whole number"),
    "arguments in a list": (b"model_args: [1, 2]\n", "--model_args: expected"),
    "an argument that no file may give": (b"model_args: {device: meta}\n", "may not give device"),
}
REFUSED = {name: case if isinstance(case, tuple) else (case, "is not UTF-8") for name, case in REFUSED.items()}


@pytest.mark.parametrize("spelling", ["--config FILE", "--config=FILE"])
@pytest.mark.parametrize(("contents", "word"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(guarded, capsys, contents, word, spelling):
    path = guarded / "stranger.yaml"
    path.write_bytes(contents)
    status = main(["train", *spelling.replace("FILE", str(path)).split(), "--output", str(guarded / "run")])
    err = capsys.readouterr().err
    assert status == 2
    assert word in err
    assert err[:-1].isprintable()
    assert len(err) < 600
    assert not (guarded / "run").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/kmsg", "/", "/nowhere"])
@pytest.mark.parametrize("command", ["train", "eval run", "predict run image.png"])
def test_files_of_the_system_are_refused(guarded, capsys, path, command):
    assert main([*command.split(), "--config", path]) == 2
    assert capsys.readouterr().err.startswith("error: --config")


def test_a_pipe_is_not_waited_for(guarded, capsys):
    os.mkfifo(guarded / "pipe")
    assert main(["train", "--config", "pipe"]) == 2
    assert "is no regular file" in capsys.readouterr().err


def test_what_was_typed_is_the_users(guarded, capsys):
    (guarded / "own.yaml").write_text("model: hf-hub:own/x\ndata: mnist\n")
    assert main(["train", "--config", "own.yaml", "--model", "vim_nono"]) == 2
    assert "--model vim_nono: there is no such model" in capsys.readouterr().err


def test_the_recipes_are_read():
    for name in ("mnist", "vim_small", "vim_tiny", "vim_small_stride8", "vim_tiny_stride8"):
        assert read_config(__import__("pathlib").Path(f"{os.path.dirname(__file__)}/../../recipes/{name}.yaml"))[
            "model"
        ]


RUN = {
    "nested aliases": (LAUGHS.encode(), "anchor or alias"),
    "Latin-1": ("data: caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
    "a list": (b"- 1\n", "not options by name"),
    "data a number": (b"data: 7\n", "data is 7; expected a text or null"),
    "data a list": (b"data: [mnist]\n", "data is ['mnist']; expected"),
    "share of text": (b"data: mnist\nval_fraction: x\n", "val_fraction is 'x'; expected a number"),
    "share of nothing": (b"data: mnist\nval_fraction: .nan\n", "val_fraction is nan; expected a number"),
    "seed a list": (b"data: mnist\nseed: []\n", "seed is []; expected a whole number"),
    "names a mapping": (b"data: mnist\nclass_names: {a: 1}\n", "class_names is {'a': 1}; expected"),
    "data of the hub": (b"data: hfds/evil/x\n", "names data to be fetched"),
    "data that are not there": (b"data: /nowhere\n", "there is no such folder"),
    "a device for data": (b"data: /dev/zero\n", "no such folder"),
}


@pytest.mark.parametrize(("contents", "word"), RUN.values(), ids=RUN)
def test_the_configuration_of_a_run_is_checked_by_eval(stranger, guarded, capsys, contents, word):
    stranger(json.dumps(description()))
    (guarded / "config.yaml").write_bytes(contents)
    assert main(["eval", str(guarded), "--json"]) == 2
    err = capsys.readouterr().err
    assert word in err
    assert err[:-1].isprintable()


@pytest.mark.parametrize("more", [{"loops": 7}, {}, {"loops": {}, "optimizer_states": "evil"}])
def test_a_strange_checkpoint_is_not_continued_from(guarded, capsys, more):
    photos = write_photos(guarded / "photos", halves=(("train", 2), ("val", 2)))
    arguments = [str(a) for a in train_arguments(photos, guarded / "run", "--epochs", 1)]
    assert main(arguments) == 0
    last = guarded / "run/checkpoints/last.ckpt"
    whole = torch.load(last, weights_only=True)
    kept = {name: whole[name] for name in ("state_dict", "vimamba", "loops", "pytorch-lightning_version")}
    torch.save({**kept, **more}, last)
    capsys.readouterr()
    assert main(["train", "--resume", str(guarded / "run"), "--epochs", "2"]) == 2
    err = capsys.readouterr().err
    assert "checkpoints/last.ckpt cannot be continued from" in err
    assert err.count("\n") == 1
