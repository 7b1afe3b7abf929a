"""Checkpoint files that ask to run code, claim more than they hold, never end, or are none."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import vimamba
from tests.strangers.conftest import ARGS, description
from vimamba.errors import UserError
from vimamba.tasks.weights import load_model, load_start


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(contents, **how):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **how)
    return buffer.getvalue()


def zipped(entries, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def recompressed(contents):
    """What torch.save wrote, as small as zip makes it."""
    with zipfile.ZipFile(io.BytesIO(saved(contents))) as archive:
        return zipped({name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()})


def itself():
    contents: dict = {}
    contents["model"] = contents
    return contents


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(__file__, "pickle")
    return buffer.getvalue()


ONE = torch.zeros(1)
FILES = {
    # code
    "mkdir": saved({"model": Calls(os.mkdir, "canary")}),
    "mkdir, the old format": saved({"model": Calls(os.mkdir, "canary")}, _use_new_zipfile_serialization=False),
    "mkdir, plain pickle": pickle.dumps(Calls(os.mkdir, "canary")),
    "mkdir, text pickle": pickle.dumps(Calls(os.mkdir, "canary"), protocol=0),
    "eval": pickle.dumps({"state_dict": Calls(eval, "__import__('os').mkdir('canary')")}),
    "getattr": b"c__builtin__\ngetattr\n(cos\npath\nS'join'\ntR.",
    "name with an escape": b"cos\x1b[2J\nmkdir\n(S'canary'\ntR.",
    "torch.load": pickle.dumps({"model": Calls(torch.load, "evil.pth")}),
    "hidden in a Namespace": saved({"model": {"a": ONE}, "args": argparse.Namespace(model=Calls(os.mkdir, "canary"))}),
    # more than the file holds
    "bomb": recompressed({"model": {"a": torch.zeros(20_000_000)}}),
    "bomb in the pickle": zipped({"data.pkl": b"\x00" * 50_000_000, "version": b"3"}),
    "expanded": saved({"model": {"a": ONE.expand(10**12)}}),
    "expanded to a depth": saved({"model": {"a": ONE.expand(10**15, 1)}}),
    "meta": saved({"model": {"a": torch.empty(10**12, device="meta")}}),
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x7f\x85R.",
    "length of an exabyte": b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x10abc.",
    # kinds
    "sparse": saved({"model": {"a": torch.eye(3).to_sparse()}}),
    "complex": saved({"model": {"a": torch.zeros(3, dtype=torch.complex64)}}),
    "numbers for names": saved({"model": {1: ONE, 2: ONE}}),
    "tuples for names": saved({(1, 2): ONE}),
    "a list": saved([ONE]),
    "a tensor": saved(ONE),
    "a number": saved(7),
    "no tensors": saved({"model": {"a": 1, "b": {"c": ONE}}}),
    "models within models": saved({"model": {"model": {"model": {"a": ONE}}}}),
    "itself": saved(itself()),
    "nested": saved({"model": nested(60)}),
    "an ordered nothing": saved(collections.OrderedDict()),
    # no checkpoint
    "nothing": b"",
    "text": b"hello\nworld\n",
    "random": random.Random(0).randbytes(5000),
    "random, a pickle": b"\x80\x04" + random.Random(1).randbytes(5000),
    "random, a zip": b"PK\x03\x04" + random.Random(2).randbytes(5000),
    "an empty zip": zipped({}),
    "another zip": zipped({"hello.txt": b"hello"}, zipfile.ZIP_STORED),
    "cut": saved({"model": {"a": torch.zeros(1000)}})[:2000],
    "tar": tar(),
    "GIF": b"GIF89a" + bytes(100),
    "many brackets": b"]" * 100_000,
}


@pytest.mark.parametrize("contents", FILES.values(), ids=FILES)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_refused_in_one_sentence(guarded, contents, suffix):
    path = guarded / f"stranger{suffix}"
    path.write_bytes(contents)
    for load in (load_model, vimamba.load_hustvl):
        with pytest.raises(UserError) as refused:
            load(path)
        sentence = str(refused.value)
        assert sentence.startswith(f"{path}: ")
        assert sentence.isprintable()
        assert len(sentence) < 500


@pytest.mark.parametrize(
    "name", ["mkdir", "mkdir, the old format", "mkdir, plain pickle", "mkdir, text pickle", "eval"]
)
def test_what_was_to_be_run_is_named(guarded, name):
    (guarded / "stranger.pth").write_bytes(FILES[name])
    with pytest.raises(UserError, match=r"refused, it asks to run \w+\.(mkdir|eval) on loading; nothing was executed"):
        load_model(guarded / "stranger.pth")


SYSTEM = [
    "/etc/passwd",
    "/bin/sh",
    "/dev/zero",
    "/dev/null",
    "/dev/stdin",
    "/proc/kmsg",
    "/proc/self/maps",
]


@pytest.mark.parametrize("path", SYSTEM)
def test_files_of_the_system_are_refused(path):
    for load in (load_model, vimamba.load_hustvl, lambda name: vimamba.create_model("vim_nano", checkpoint_path=name)):
        with pytest.raises(UserError, match=r"no regular file|not a PyTorch|there is no such"):
            load(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pipe_is_not_waited_for(guarded, suffix):
    os.mkfifo(guarded / f"pipe{suffix}")
    for load in (load_model, vimamba.load_hustvl):
        with pytest.raises(UserError, match="is no regular file"):
            load(guarded / f"pipe{suffix}")


@pytest.mark.parametrize("name", ["bomb", "bomb in the pickle"])
def test_a_bomb_is_not_unpacked(guarded, name):
    (guarded / "bomb.pth").write_bytes(FILES[name])
    with pytest.raises(UserError, match="its archive is compressed or holds more than the file"):
        load_model(guarded / "bomb.pth")


def checkpoint(weights, described, **more):
    """As `vimamba train` leaves it."""
    return {"state_dict": {f"model.{k}": v for k, v in weights.items()}, "vimamba": described, "loops": {}, **more}


DESCRIPTIONS = {
    "a scheme": description(model="hf-hub:evil/x"),
    "an overlay": description(model_args={"pretrained_cfg_overlay": {"file": "evil.pth"}}),
    "a depth": description(model_args={**ARGS, "depth": 10**9}),
    "numbers for keys": {1: 2},
    "nested classes": description(class_names=nested(60)),
    "nested arguments": description(model_args={"paths": nested(60)}),
    "arguments by number": description(model_args={1: 2}),
    "a tensor for a number": description(model_args={**ARGS, "depth": torch.tensor(1)}),
    "a tensor for a crop": description(crop_pct=torch.tensor(0.9)),
    "text": "evil",
    "a Namespace": argparse.Namespace(model="vim_nano"),
}


@pytest.mark.parametrize("described", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_checkpoint_says_no_more_than_a_safetensors_file(guarded, weights, described):
    torch.save(checkpoint(weights, described), guarded / "last.ckpt")
    with pytest.raises(UserError) as refused:
        load_model(guarded / "last.ckpt")
    assert str(refused.value).startswith(f"{guarded / 'last.ckpt'}: ")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 700


def test_a_checkpoint_as_it_should_be_loads(guarded, weights):
    described = description(mean=(0.5,), std=(0.5,), img_size=(16, 16))
    torch.save(checkpoint(weights, described, args=argparse.Namespace(a=1)), guarded / "last.ckpt")
    model, card = load_model(guarded / "last.ckpt")
    assert model.head.weight.equal(weights["head.weight"])
    assert card.preprocessing.img_size == (16, 16)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_the_grid_travels_with_our_own_files(guarded, kind, square):
    """9 × 16 patches are 12 × 12 in number."""
    size = (36, 36) if square else (27, 48)
    sizes = {**ARGS, "patch_size": 3, "stride": 3}
    source = vimamba.create_model("vim_nano", img_size=size, in_chans=1, num_classes=3, **sizes)
    described = description(model_args=sizes, img_size=list(size))
    path = guarded / f"model.{kind}"
    if kind == "ckpt":
        torch.save(checkpoint(source.state_dict(), described), path)
    else:
        save_file(source.state_dict(), path, metadata={"vimamba": json.dumps(described)})
    # Another size of the same number of patches, and one of another number.
    for other in ((36, 36), (54, 96)):
        model = vimamba.create_model("vim_nano", img_size=other, in_chans=1, num_classes=3, **sizes)
        load_start(model, path)
        want = vimamba.create_model("vim_nano", img_size=size, in_chans=1, num_classes=3, **sizes)
        want.load_state_dict(source.state_dict())
        want.set_input_size(other)
        torch.testing.assert_close(model.pos_embed, want.pos_embed)
        if kind == "safetensors":
            made = vimamba.create_model(
                "vim_nano", checkpoint_path=str(path), img_size=other, in_chans=1, num_classes=3, **sizes
            )
            torch.testing.assert_close(made.pos_embed, want.pos_embed)
