"""vimamba eval and predict on a trained run, and the runs they refuse."""

import csv
import io
import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.cli.runs import write_photos
from vimamba.cli import main


def test_eval_finds_what_training_found(vimamba, trained, tmp_path):
    status, out, _ = vimamba("eval", trained, "--json", "--output", tmp_path)
    found = json.loads(out)
    assert status == 0
    with (trained / "metrics.csv").open() as file:
        best = max(float(row["val_top1"]) for row in csv.DictReader(file))
    assert found["top1"] == pytest.approx(best, abs=1e-5)
    assert found["images"] == 12
    assert [row["name"] for row in found["per_class"]] == ["blue", "green", "red"]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    status, out, _ = vimamba("eval", trained / "checkpoints/best.ckpt", "--output", tmp_path)
    assert status == 0
    assert "top-1" in out


def test_eval_on_other_images_maps_classes_by_name(vimamba, trained, tmp_path):
    two = write_photos(tmp_path / "two", classes=("blue", "green"), halves=((".", 5),))
    (two / "green").rename(two / "a")
    (two / "blue").rename(two / "green")  # blue pictures named green
    (two / "a").rename(two / "blue")
    status, out, _ = vimamba("eval", trained, "--data", two, "--json", "--output", tmp_path)
    found = json.loads(out)
    assert status == 0
    assert found["images"] == 10  # a folder of classes is taken whole
    assert found["top1"] < 0.2


def test_eval_keeps_the_picture_of_the_runs_own_images(vimamba, trained, photos, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    assert vimamba("eval", run)[0] == 0
    own = (run / "confusion.png").read_bytes()
    for arguments, name in (
        (("--data", photos / "val"), "confusion-val.png"),
        (("--data", photos, "--split", "all"), "confusion-photos.png"),
        (("--data", photos / "val", "--output", tmp_path / "other"), "../other/confusion.png"),
    ):
        status, out, _ = vimamba("eval", run, *arguments, "--json")
        assert status == 0
        assert os.path.samefile(json.loads(out)["confusion"], run / name)
        assert (run / "confusion.png").read_bytes() == own


@pytest.mark.parametrize(
    ("most", "message"), [("1.0", "none of the 12 images"), ("0.5", "stopped: "), ("1.5", "give a")]
)
def test_eval_of_nothing_decodable_is_refused(vimamba, trained, photos, most, message):
    for path in (photos / "val").rglob("*.png"):
        path.write_bytes(b"bad")
    status, _, err = vimamba("eval", trained, "--data", photos / "val", "--max_undecodable", most)
    assert status == 2
    assert message in err


def test_eval_refuses_other_classes(vimamba, trained, photos):
    (photos / "val" / "red").rename(photos / "val" / "rot")
    (photos / "train" / "red").rename(photos / "train" / "rot")
    status, _, err = vimamba("eval", trained, "--data", photos)
    assert status == 2
    assert "'rot' is not among the 3 that the model knows" in err
    assert err.count("\n") == 1


def test_predict_names_files_folders_and_patterns(vimamba, trained, photos):
    red = photos / "val" / "red"
    status, out, err = vimamba("predict", trained, red / "0.png", red, f"{photos}/val/gr*/*.png")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 8  # 0.png is named once
    assert all(" red " in line for line in lines[:4])
    assert all(" green " in line.split("%")[0] + "%" for line in lines[4:])


def test_predict_goes_on_past_bad_files(vimamba, trained, photos):
    bad, gone = photos / "val" / "red" / "2.png", photos / "gone.png"
    bad.write_bytes(b"no image")
    status, out, err = vimamba("predict", trained, photos / "val", gone, "--json", "--batch_size", 5)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert len(answers) == 13
    assert {a["image"] for a in answers if "error" in a} == {str(bad), str(gone)}
    assert "2 of 13 images could not be read" in err
    good = next(a for a in answers if a["image"] == str(photos / "val" / "red" / "1.png"))
    assert good["predictions"][0]["class"] == "red"
    assert sum(p["probability"] for p in good["predictions"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("top", [1, 2, 9])
def test_predict_writes_a_table(vimamba, trained, photos, top):
    bad, odd = photos / "val" / "red" / "2.png", photos / "val" / "red" / 'a "red", [red] :dog: one.png'
    bad.write_bytes(b"no image")
    (photos / "val" / "red" / "1.png").rename(odd)
    status, out, err = vimamba("predict", trained, photos / "val", "--csv", "--top", top, "--batch_size", 5)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1
    assert "1 of 12 images could not be read" in err
    shown = min(top, 3)
    columns = [f"{column}_{i}" for i in range(1, shown + 1) for column in ("class", "probability")]
    assert [*rows[0]] == ["image", *columns, "error"]
    by_name = {row["image"]: row for row in rows}
    assert len(by_name) == 12
    assert by_name[str(odd)]["class_1"] == "red"
    assert "is not an image" in by_name[str(bad)]["error"]
    assert not by_name[str(bad)]["class_1"]
    assert f"{odd}  red " in vimamba("predict", trained, odd, "--top", top)[1]
    _, out, _ = vimamba("predict", trained, photos / "val", "--json", "--top", top)
    for line in map(json.loads, out.splitlines()):
        row = by_name[line["image"]]
        for place, answer in enumerate(line.get("predictions", []), start=1):
            assert row[f"class_{place}"] == answer["class"]
            assert float(row[f"probability_{place}"]) == pytest.approx(answer["probability"], abs=1e-5)


ODD_NAMES = [
    b"\xff.png",
    b"caf\xe9.png",
    b"new\nline.png",
    b"\x1b[2J.png",
    "\u202egnp.png".encode(),
    "\u96ea.png".encode(),
]


@pytest.mark.parametrize("how", ["", "--json", "--csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_cannot_be_written_are_escaped(trained, tmp_path, monkeypatch, how, encoding):
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, name in enumerate(ODD_NAMES):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            Image.new("RGB", (8, 8), "red").save(file, "png") if number else file.write(b"bad")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2)]
    for stream, which in zip(streams, ("stdout", "stderr"), strict=True):
        monkeypatch.setattr(sys, which, stream)
    assert main(["predict", str(trained), str(folder), *[how][: bool(how)]]) == 1
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "1 of 6 images could not be read" in err
    assert len(out.splitlines()) == {"": 5, "--json": 6, "--csv": 7}[how]
    assert not {"\x1b", "\u202e"} & {*out}
    if how == "--json":
        assert {json.loads(line)["image"] for line in out.splitlines()} == {
            os.path.join(folder, os.fsdecode(name)) for name in ODD_NAMES
        }
    else:
        for name in (r"caf\udce9.png", r"new\nline.png", r"\x1b[2J.png", r"\u202egnp.png"):
            assert name in out
        assert r"\udcff.png: is not an image" in out + err
        assert ("\u96ea" if encoding == "utf-8" else r"\u96ea") in out


def test_predict_says_what_it_leaves_out_of_a_folder(vimamba, trained, photos):
    os.mkfifo(photos / "val" / "pipe.png")
    (photos / "val" / "notes.txt").touch()
    status, out, err = vimamba("predict", trained, photos / "val")
    assert (status, len(out.splitlines())) == (0, 12)
    assert err.count("\n") == 1
    assert "files of other kinds: 1 (.txt)" in err
    status, _, err = vimamba("predict", trained, photos / "val" / "pipe.png")
    assert status == 1
    assert "pipe.png: is a pipe or a device" in err


def test_predict_does_not_depend_on_batches_or_workers(vimamba, trained, photos):
    lines = [
        vimamba("predict", trained, photos / "val", "--json", "--batch_size", size, "--num_workers", workers)[1]
        for size, workers in ((1, 0), (7, 0), (64, 2))
    ]
    first, *others = [[json.loads(line)["predictions"][0]["class"] for line in text.splitlines()] for text in lines]
    assert all(other == first for other in others)


@pytest.mark.parametrize("size", [(1, 1), (40_000, 10), (10, 40_000)])
def test_images_of_extreme_sizes_are_named(vimamba, trained, tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "odd.png")
    status, out, _ = vimamba("predict", trained, tmp_path / "odd.png")
    assert status == 0
    assert "odd.png" in out


def test_a_decompression_bomb_is_refused(vimamba, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (30, 30)).save(tmp_path / "big.png")
    status, _, err = vimamba("predict", trained, tmp_path / "big.png")
    assert status == 1
    assert "has more pixels than" in err


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def spoil(run, how):
    """Spoil the weights of a copy of a run; returns what to hand to eval."""
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(whole[: len(whole) // 2])
    elif how == "text":
        weights.write_text("not weights")
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing":
        weights.unlink()
    elif how == "bare":
        save_file(load_file(weights), weights)
    elif how == "another model":
        swap_description(weights, '"embed_dim": 16', '"embed_dim": 32')
    elif how == "class counts":
        swap_description(weights, '"class_names": ["blue", ', '"class_names": [')
    elif how == "unknown model":
        swap_description(weights, "vim_nano", "vim_nono")
    elif how == "hostile":
        with (run / "weights.pth").open("wb") as file:
            pickle.dump({"model": Hostile()}, file)
        return run / "weights.pth"
    elif how == "hostile torch":
        torch.save({"model": Hostile()}, run / "weights.pth")
        return run / "weights.pth"
    elif how == "truncated torch":
        whole = (run / "checkpoints/last.ckpt").read_bytes()
        (run / "weights.pth").write_bytes(whole[: len(whole) // 2])
        return run / "weights.pth"
    elif how == "text torch":
        (run / "weights.pth").write_text("not weights")
        return run / "weights.pth"
    return run


def swap_description(weights, old, new):
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        described = file.metadata()["vimamba"]
    assert old in described
    save_file(load_file(weights), weights, metadata={"vimamba": described.replace(old, new)})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a PyTorch or safetensors checkpoint, or a damaged one"),
        ("text", "not a PyTorch or safetensors checkpoint"),
        ("empty", "0 bytes"),
        ("missing", "holds no model.safetensors"),
        ("bare", "not vimamba's description"),
        ("another model", "is of another model"),
        ("class counts", "head.bias has shape (3,), the model has (2,)"),
        ("unknown model", "there is no such model; did you mean vim_nano"),
        ("hostile", "refused"),
        ("hostile torch", "refused"),
        ("truncated torch", "damaged"),
        ("text torch", "damaged"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_spoilt_runs_are_refused_and_nothing_is_run(vimamba, trained, tmp_path, monkeypatch, command, how, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    run = spoil(tmp_path / "run", how)
    status, _, err = vimamba(command, run, *(["picture.png"] if command == "predict" else []))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", ["hostile", "truncated", "text", "another model", "foreign"])
def test_a_spoilt_checkpoint_is_not_resumed(vimamba, trained, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = run / "checkpoints/last.ckpt"
    for other in ("previous", "best"):  # to which it would fall back
        (run / f"checkpoints/{other}.ckpt").unlink()
    more = []
    if how == "hostile":
        torch.save({"state_dict": Hostile()}, last)
    elif how == "truncated":
        last.write_bytes(last.read_bytes()[:5000])
    elif how == "text":
        last.write_text("nothing")
    elif how == "another model":
        more = ["--model_args.depth", 2]
    else:
        torch.save({"state_dict": {"a": torch.zeros(1)}}, last)
    status, _, err = vimamba("train", "--resume", run, *more)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "there is no such run or file"),
        (["predict", "RUN", "nothing*.png"], "no file matches"),
        (["predict", "RUN", "x.png", "--top", "0"], "--top is 0"),
        (["predict", "RUN", "x.png", "--device", "abacus"], "--device abacus"),
        (["predict", "RUN"], "required"),
        (["predict", "RUN", "x.png", "--csv", "--json"], "--json and --csv: choose one"),
        (["eval", "RUN", "--split", "test"], "--split: expected auto or val or all, got test"),
        (["prdict", "RUN"], "did you mean predict"),
    ],
)
def test_wrong_calls_are_refused(vimamba, trained, arguments, message):
    status, _, err = vimamba(*[trained if a == "RUN" else a for a in arguments])
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
