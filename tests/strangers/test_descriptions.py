"""Descriptions in a safetensors file that ask for what they may not; and those that are odd but harmless."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import timm
import torch

from tests.strangers.conftest import ARGS, description
from vimamba.cli import main
from vimamba.errors import UserError
from vimamba.tasks.weights import ModelCard, load_model

OVERLAY = {"url": "http://localhost:9/evil.pth", "file": "evil.pth"}


def args(**more):
    return description(model_args={**ARGS, **more})


# Each with a word of the sentence that refuses it.
REFUSED = {
    # what timm would fetch, read or write
    "pretrained": (args(pretrained=True), "'pretrained' is no argument"),
    "overlay with a url": (args(pretrained=True, pretrained_cfg_overlay=OVERLAY), "not a plain value"),
    "overlay alone": (args(pretrained_cfg_overlay={"hf_hub_id": "evil/x"}), "not a plain value"),
    "configuration by name": (args(pretrained_cfg="in1k"), "'pretrained_cfg' is no argument"),
    "checkpoint_path": (args(checkpoint_path="evil.pth"), "'checkpoint_path' is no argument"),
    "cache_dir": (args(cache_dir="canary"), "'cache_dir' is no argument"),
    "file": (args(file="evil.pth"), "'file' is no argument"),
    "url": (args(url="http://localhost:9/evil.pth"), "'url' is no argument"),
    "pruned": (args(pruned=True), "'pruned' is no argument"),
    "features_only": (args(features_only=True, out_indices=[0]), "'features_only' is no argument"),
    "feature_cfg": (args(feature_cfg={"feature_cls": "hook"}), "not a plain value"),
    "kwargs_filter": (args(kwargs_filter=["depth"]), "'kwargs_filter' is no argument"),
    "scriptable": (args(scriptable=True), "'scriptable' is no argument"),
    "device": (args(device="meta"), "'device' is no argument"),
    "dtype": (args(dtype="float64"), "'dtype' is no argument"),
    "self": (args(self=1), "'self' is no argument"),
    # names
    "hf-hub": (description(model="hf-hub:evil/x"), "there is no such model"),
    "hf_hub": (description(model="hf_hub:evil/x"), "there is no such model"),
    "local-dir": (description(model="local-dir:."), "there is no such model"),
    "scheme behind a name": (description(model="vim_nano:hf-hub"), "there is no such model"),
    "path": (description(model="../vim_nano"), "there is no such model"),
    "path as a tag": (description(model="vim_nano.../../x"), "there is no such model"),
    "unknown tag": (description(model="vim_nano.evil"), "cannot be built"),
    "line feed": (description(model="vim_nano\n"), "there is no such model"),
    "long name": (description(model="v" * 100_000), "there is no such model"),
    "number for a name": (description(model=7), "there is no such model"),
    "list for a name": (description(model=["vim_nano"]), "there is no such model"),
    "another model": (description(model="resnet18", model_args={}), "is of another model"),
    # sizes that the tensors belie
    "depth of ten million": (args(depth=10_000_000), "too large"),
    "depth of 500": (args(depth=500), "more parts than the file"),
    "depth of 10^30": (args(depth=10**30), "too large"),
    "negative depth": (args(depth=-1), "cannot be built|another model"),
    "d_state": (args(d_state=10**9), "too large"),
    "d_state of 2000": (args(d_state=2000), "another model"),
    "embed_dim": (args(embed_dim=2000), "another model"),
    "no width": (args(embed_dim=0), "cannot be built"),
    "img_size of a million": (args(img_size=1_000_000), "too large"),
    "registers": (args(num_registers=10**7), "too large"),
    "a few registers": (args(num_registers=3), "another model"),
    "no stride": (args(stride=0), "cannot be built"),
    "vast expand": (args(expand=1e300), "cannot be built"),
    "infinite expand": (json.dumps(args(expand=1)).replace('"expand": 1', '"expand": Infinity'), "not finite"),
    "expand not a number": (json.dumps(args(expand=1)).replace('"expand": 1', '"expand": NaN'), "not finite"),
    "thousands of paths": (args(paths=["row"] * 5000), "more values"),
    "many paths": (args(paths=[f"window{i}" for i in range(2, 40)], path_weights="shared"), "cannot be built"),
    "modes": (args(bidirectional=["none"] * 50), "cannot be built"),
    "other number of classes": (args(num_classes=4), "another model"),
    # kinds
    "text for a number": (args(depth="1"), "depth of vim_nano cannot be '1'"),
    "truth for a number": (args(depth=True), "depth of vim_nano cannot be True"),
    "fraction for a number": (args(depth=1.5), "depth of vim_nano cannot be 1.5"),
    "list for a text": (args(merge=["mean"]), "merge of vim_nano cannot be"),
    "null for a number": (args(depth=None), "depth of vim_nano cannot be None"),
    "nested lists": (args(paths=[[[[["row"]]]]]), "not a plain value"),
    "long text": (args(merge="m" * 1000), "too long"),
    "arguments in a list": (description(model_args=[1]), "not arguments by name"),
    "no arguments": (description(model_args=None), "not arguments by name"),
    "unknown option": (args(merge="evil"), "cannot be built"),
    # class names
    "no classes": (description(class_names=[]), "class_names is"),
    "a text for classes": (description(class_names="abc"), "class_names is"),
    "numbers for classes": (description(class_names=[1, 2, 3]), "class name 1"),
    "one class twice": (description(class_names=["a", "b", "a"]), "'a' twice"),
    "too many classes": (description(class_names=[str(i) for i in range(5)]), "another model"),
    "terminal": (description(class_names=["a", "b", "\x1b[2J\x1b]0;evil\x07"]), "class name"),
    "line feed in a class": (description(class_names=["a", "b", "c\nerror: "]), "class name"),
    "text that turns round": (description(class_names=["a", "b", "\u202egnp.exe"]), "class name"),
    "endless class": (description(class_names=["a", "b", "c" * 10_000]), "class name"),
    "empty class": (description(class_names=["a", "b", ""]), "class name"),
    # preprocessing
    "std 0": (description(std=[0.0]), "std is"),
    "negative std": (description(std=[-1.0]), "std is"),
    "mean of text": (description(mean=["x"]), "mean is"),
    "mean of three": (description(mean=[0.5, 0.5, 0.5]), "mean is"),
    "mean a number": (description(mean=0.5), "mean is"),
    "mean beyond float32": (description(mean=[1e300]), "mean is"),
    "negative crop": (description(crop_pct=-0.5), "crop_pct is"),
    "tiny crop": (description(crop_pct=1e-9), "crop_pct is"),
    "crop mode": (description(crop_mode="evil"), "crop_mode is"),
    "interpolation": (description(interpolation="evil"), "interpolation is"),
    "interpolation a list": (description(interpolation=[]), "interpolation is"),
    "image of a million": (description(img_size=[1_000_000, 1_000_000]), "img_size is"),
    "image of nothing": (description(img_size=[0, 16]), "img_size is"),
    "image of fractions": (description(img_size=[16.5, 16]), "img_size is"),
    "image a number": (description(img_size=16), "img_size is"),
    "another image": (description(img_size=[64, 64]), "is of another model"),
    "7 channels": (description(in_chans=7), "in_chans is"),
    "preprocessing a list": (description(preprocessing=[]), "preprocessing is"),
    # the whole
    "nothing": ({}, "damaged"),
    "a list": ([], "damaged"),
    "a number": (7, "damaged"),
    "more keys": (description(evil=1), "damaged"),
    "no JSON": ("{", "not a PyTorch or safetensors checkpoint"),
    "nested JSON": ("[" * 100_000, "not a PyTorch or safetensors checkpoint"),
    "number of 10 000 digits": ('{"model": ' + "9" * 10_000 + "}", "not a PyTorch or safetensors checkpoint"),
}


@pytest.mark.parametrize(("described", "word"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence(stranger, described, word):
    path = stranger(described if isinstance(described, str) else json.dumps(described))
    with pytest.raises(UserError, match=word) as refused:
        load_model(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path}: ")
    assert sentence.isprintable()
    assert len(sentence) < 700


HARMLESS = {
    "as written": description(),
    "a tag": description(model="vim_nano.untrained"),
    "whole number for a fraction": args(expand=2),
    "the default in words": args(merge="mean", bidirectional="ssm_conv", paths=["row"], layer_scale=None),
    "one a layer": args(bidirectional=["ssm_conv"]),
    "rates": args(drop_rate=0.5, drop_path_rate=0.1, pos_drop_rate=0),
    "names of every script": description(class_names=["café", "你好", "می‌خواهم"]),
    "notes": description(trained={"data": "\x1b[2J", "evil": [{}]}),
    "squash": description(crop_mode="squash", interpolation="nearest", crop_pct=1),
}


@pytest.mark.parametrize("described", HARMLESS.values(), ids=HARMLESS)
def test_harmless_ones_load(stranger, described):
    model, card = load_model(stranger(json.dumps(described)))
    assert card.class_names == described["class_names"]
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("resnet18", {"output_stride": 8}),
        ("resnet18.a1_in1k", {}),
        ("vit_tiny_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg"}),
        ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1]}),
        ("vim_pyramid_nano", {"paths": ["row", "column"], "depths": [1, 1, 1, 1]}),
    ],
)
def test_timm_models_load_as_before(stranger, name, model_args):
    size = {} if name.startswith(("resnet", "vim_pyramid")) else {"img_size": (64, 64)}
    model = timm.create_model(name, num_classes=3, in_chans=1, **size, **model_args).eval()
    described = description(model=name, model_args=model_args, img_size=[64, 64])
    tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    loaded, _ = load_model(stranger(json.dumps(described), tensors))
    images = torch.randn(2, 1, 64, 64)
    assert loaded(images).equal(model(images))
    described["model_args"] = {**model_args, "cache_dir": "canary"}
    with pytest.raises(UserError, match="'cache_dir' is no argument"):
        load_model(stranger(json.dumps(described), tensors))


def test_a_pickle_behind_an_overlay_is_not_opened(stranger, guarded):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, ("canary",)

    (guarded / "evil.pth").write_bytes(pickle.dumps(Hostile()))
    for more in ({"checkpoint_path": "evil.pth"}, {"pretrained": True, "pretrained_cfg_overlay": {"file": "evil.pth"}}):
        with pytest.raises(UserError):
            load_model(stranger(json.dumps(args(**more))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "layers.0.mixer.A_log"])
def test_weights_that_are_no_numbers_are_refused_by_name(stranger, weights, name, value):
    spoilt = {**weights, name: weights[name].clone()}
    spoilt[name].view(-1)[-1] = value
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds numbers that are infinite or not a number"):
        load_model(stranger(json.dumps(description()), spoilt))


@pytest.mark.parametrize("kind", [torch.complex64, torch.int32, torch.bool])
def test_weights_of_other_kinds_are_refused(stranger, weights, kind):
    spoilt = {**weights, "head.weight": weights["head.weight"].to(kind)}
    with pytest.raises(UserError, match=r"complex|head\.weight holds"):
        load_model(stranger(json.dumps(description()), spoilt))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_load(stranger, weights, kind):
    model, _ = load_model(stranger(json.dumps(description()), {k: v.to(kind) for k, v in weights.items()}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_names_of_tensors_are_shown_as_they_can_be(stranger, weights):
    with pytest.raises(UserError) as refused:
        load_model(stranger(json.dumps(description()), {**weights, "\x1b[2J\n" + "x" * 1000: torch.zeros(1)}))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_a_card_that_could_not_be_read_is_not_made():
    told = description()
    with pytest.raises(UserError, match="twice"):
        ModelCard("vim_nano", {}, ["a", "a"], told["preprocessing"])


@pytest.mark.parametrize("kind", ["overlay with a url", "hf-hub", "depth of ten million", "terminal", "std 0"])
@pytest.mark.parametrize("command", ["predict", "eval"])
def test_the_commands_say_so_and_exit_with_2(stranger, capsys, command, kind):
    path = stranger(json.dumps(REFUSED[kind][0]))
    more = ["image.png"] if command == "predict" else []
    assert main([command, str(path), *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_real_command_does_not_trace_back(stranger):
    signal.alarm(60)  # Python and PyTorch have to start
    path = stranger(json.dumps(REFUSED["checkpoint_path"][0]))
    command = [sys.executable, "-m", "vimamba", "predict", str(path), "image.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {path}: 'checkpoint_path' is no argument of vim_nano that a file may give\n"
