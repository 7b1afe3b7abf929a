"""Commands that cannot be meant: each is one sentence that names the option, and exit status 2."""

from __future__ import annotations

import importlib
import signal
from typing import Any, Literal, get_args, get_origin

import pytest

from vimamba.cli import COMMANDS, main, parsing

TRAIN = "train --data mnist --model vim_nano"


SECONDS = 5
"""That a refusal may take; a command that goes on for longer is ended."""


@pytest.fixture(autouse=True)
def _ended():
    def end(*_: Any) -> None:
        raise TimeoutError(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.signal(signal.SIGALRM, before)


def parser_of(command: str) -> Any:
    parser = parsing.new_parser(command, "")
    importlib.import_module(f"vimamba.cli.{command}").arguments(parser)
    return parser


def wrong_kinds(kind: Any) -> list[str]:
    """Words that are no values of a type."""
    if kind is bool or kind is str or str in get_args(kind):  # a word after a switch is none of its; any is a text
        return []
    if list[str] in get_args(kind):  # without brackets any word is one text
        return ["[1, [2]]", "{a: 1}", "true"]
    if get_origin(kind) is dict:
        return ["x y", "[1, 2]", "5"]
    if get_origin(kind) is Literal:
        return ["nonsense", "[1]", "{a: 1}"]
    return ["x y", "[1, [2]]", "{a: 1}", "true"]


def of_wrong_kind() -> list[tuple[str, str]]:
    """Every option of every command that takes a value, with words that are none for it, and without any."""
    found = []
    for command in COMMANDS:
        given = TRAIN if command == "train" else command
        given += " run" if command in ("eval", "predict", "explain", "export") else ""
        given += " image.png" if command in ("predict", "explain") else ""
        for name, action in parsing._options(parser_of(command)).items():
            kind = parsing.kind_of(action)
            if kind is None or name == "--print_config":
                continue
            if action.nargs != "*" and kind is not bool:
                found.append((f"{given} {name}", f"{name}: "))
            found += [(f"{given}|{name}|{word}", f"{name}: expected ") for word in wrong_kinds(kind)]
    return found


OUT_OF_RANGE = {
    "epochs": ("0", "-1", "10000000"), "batch_size": ("0", "-3", "100000000000"), "accumulate": ("0",),
    "lr": ("0", "-1", ".nan", ".inf"), "weight_decay": ("-0.1", ".nan"), "min_lr": ("-1",), "warmup_epochs": ("-1",),
    "clip_grad": ("-1", ".inf"), "layer_decay": ("0", "1", "2", ".nan"), "ema": ("0", "1", "-1"),
    "img_size": ("0", "-224", "[0, 5]"), "in_chans": ("0", "2", "4"), "val_fraction": ("-0.1", "1", "2", ".nan"),
    "num_workers": ("-1", "1000"), "max_undecodable": ("-1", "2", ".nan"), "seed": ("-1", "18446744073709551616"),
    "hflip": ("-0.1", "1.1"), "color_jitter": ("-1",), "random_erasing": ("2",), "mixup": ("-1", ".nan"),
    "cutmix": ("-1",), "class_mix": ("2",), "label_smoothing": ("1", "-0.1"), "repeated_augmentation": ("0",),
    "crop_scale": ("[0, 1]", "[0.5, 0.2]", "[0.5, 2]"), "auto_augment": ("nonsense", "rand-m9-foo"),
    "devices": ("0", "-2", "99", "[0, 0]", "x"), "num_nodes": ("0", "-1"), "accelerator": ("gpu", "tpu", "nonsense"),
    "strategy": ("nonsense", "ddp_spawn"), "precision": ("64", "bf16"), "schedule": ("linear",), "augment": ("all",),
    "model": ("vim_nono", "vim_nano.foo", "hf-hub:no/such", "local-dir:nowhere", "http://x/y", "", "vim nano", "../x"),
    "data": ("nowhere/", "", "hfds/no/such/thing", "wds/nowhere", "/dev/null", "a\0b"),
    "checkpoint": ("nowhere.pth", "/dev/null", "/etc/hostname", ".", "a\0b"),
    "class_names": ("nowhere.txt", "/dev/zero"),
}  # fmt: skip
MODEL_ARGS = {
    "d_conv": "0", "d_state": "-1", "depth": "0", "embed_dim": "0", "expand": "-1", "drop_path_rate": "7",
    "num_classes": "5", "in_chans": "2", "img_size": "7", "features_only": "true", "global_pool": "''",
    "merge": "max", "bidirectional": "both", "paths": "[row, row]", "conv": "3d", "nonsense": "1", "deph": "4",
    "pretrained": "true", "checkpoint_path": "x.pth", "norm": "batch", "rope": "full", "stride": "0",
    "patch_size": "64", "class_token": "last", "num_registers": "-1", "layer_scale": "x", "dt_rank": "0",
}  # fmt: skip
OTHERS = {
    "trian": "there is no command 'trian'; did you mean train",
    "help trian": "there is no command 'trian'",
    "train": "--data: required but not given",
    "train --data mnist": "--model: required but not given",
    "train --dat mnist": "--dat: there is no such option; did you mean --data",
    "train --resume nowhere": "--resume nowhere",
    "train --config nowhere.yaml": "--config",
    "eval nowhere": "nowhere: there is no such run",
    "eval /etc": "/etc: holds no model.safetensors",
    "eval /etc/hostname": "/etc/hostname",
    "eval /dev/null": "/dev/null",
    "predict nowhere image.png": "nowhere: there is no such run",
    "explain nowhere image.png --output out": "nowhere: there is no such run",
    "explain nowhere image.png": "--output: required",
    "explain run image.png --output out --method [gradcan]": "did you mean gradcam",
    "explain run image.png --output out --method gradcan": "did you mean gradcam",
    "explain run image.png --output out --method [gradcam": "--method: expected [text, ...], got [gradcam",
    "explain run image.png --output out --method gradcam rollout": "joined by commas: --method A,B",
    "predict /etc/hostname image.png": "/etc/hostname",
    "export run": "--format: required but not given",
    "export run --format onnx": "--output: required but not given",
    "export nowhere --format onnx --output x.onnx": "nowhere: there is no such run",
    "export /etc --format onnx --output x.onnx": "/etc: holds no model.safetensors",
    "export vim_nano --format onnx --output x.onnx": "vim_nano: is a model's name; give its weights with --checkpoint",
    "export vim_nano --checkpoint x.pth --format onnx --output x.onnx": "x.pth: no such checkpoint file",
    "export run --format onnx --output x.onnx --img_size 0": "--img_size is 0",
    "export run --format pt2 --output x.pt2 --portable": "--portable: is for --format onnx",
    "export run --format onnx --output x.onnx --int8": "--int8: give --data",
    "export run --format onnx --output x.onnx --int8 --portable": "--int8: goes without --portable",
    "export run --format pt2 --output x.pt2 --operator vimamba": "--operator: is for --format onnx",
    "export run --format onnx --output x.onnx --operator vimamba --portable": "--operator: goes without --portable",
    "bench --sizes 0": "--sizes 0: it must be at least 1",
    "bench --threads 100000": "--threads 100000",
    "bench --seconds -1": "--seconds",
    "bench --models vim_nono": "vim_nono",
    "bench --dtype int8": "--dtype int8",
    "bench --device meta": "--device meta",
    "bench --plot x.txt": "--plot x.txt",
    "models nonsense_that_is_no_model": "no model matches",
    "ablate --model vit_tiny_patch16_224": "--model vit_tiny_patch16_224: the designs are those of vimamba's models",
    "ablate --designs nonsense": "--designs",
    "ablate --seeds 0": "--seeds",
    "ablate --lr [0]": "--lr",
    "ablate --lr 0": "--lr is [0.0]",
    "ablate --designs none nonsense": "joined by commas: --designs A,B",
    "ablate --data nonsense": "nonsense",
    "ablate --lr+ 0.1": "--lr+: there is no such option; did you mean --lr",
    "info --nonsense": "--nonsense: there is no such option",
}
COMMANDS_OUT_OF_RANGE = [
    (f"{TRAIN}|--{name}|{word}", f"--{name}") for name, words in OUT_OF_RANGE.items() for word in words
]
WRONG_MODEL_ARGS = [(f"{TRAIN}|--model_args.{name}|{word}", name) for name, word in MODEL_ARGS.items()]
UNKNOWN = [(f"{command} --nonsense 5", "--nonsense: there is no such option") for command in COMMANDS]
CASES = [*of_wrong_kind(), *COMMANDS_OUT_OF_RANGE, *WRONG_MODEL_ARGS, *UNKNOWN, *OTHERS.items()]


def test_there_are_enough_of_them():
    assert len(CASES) >= 300


@pytest.mark.parametrize(("command", "sentence"), CASES, ids=lambda text: repr(text))
def test_a_bad_command_is_refused_in_one_sentence(command, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    first, *rest = command.split("|")
    words = [*first.split(), *rest]
    signal.alarm(SECONDS)
    try:
        status = main(words)
    finally:
        signal.alarm(0)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert status == 2, captured
    assert len([line for line in lines if line.startswith("error: ")]) == 1, captured.err
    assert sentence in lines[-1]
    assert "Traceback" not in captured.err
    assert [
        path.name for path in tmp_path.iterdir()
    ] == []  # nothing is left behind that would refuse the right command
