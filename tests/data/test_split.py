"""What is held out stays held out, and a run keeps which images those were."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.cli.runs import train_arguments, write_photos
from tests.data.folders import make
from vimamba.data.sources import open_data
from vimamba.data.split import HELD_OUT, HeldOut, hold_out, hold_out_as_0_1, how_drawn
from vimamba.errors import UserError


@pytest.mark.parametrize("inside", ["", "train/"])
def test_one_folder_is_split_by_the_seed(tmp_path, inside):
    make(tmp_path, {f"{inside}cat": 60, f"{inside}dog": 2})
    first, again, other = (open_data(str(tmp_path), 0.3, seed) for seed in (0, 0, 1))
    learnt, held_out = {*first.train.keys()}, {*first.val.keys()}
    assert not learnt & held_out
    assert len(learnt | held_out) == 62
    assert np.bincount(first.train.targets).min() >= 1
    assert np.bincount(first.val.targets).min() == 1  # of the two dogs
    assert first.val.paths.tolist() == again.val.paths.tolist()
    assert first.val.paths.tolist() != other.val.paths.tolist()


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.95])
def test_the_share_held_out_is_close_to_the_one_asked_for(fraction):
    names = [f"{i}.png" for i in range(4000)]
    shares = [len(hold_out(0, name, names, fraction, seed)) / 4000 for name in ("cat", "dog") for seed in (0, 1)]
    assert np.abs(np.array(shares) - fraction).max() < 0.03  # four standard deviations
    assert len({*map(frozenset, (hold_out(0, name, names, fraction, 0) for name in ("cat", "dog")))}) == 2
    for few in range(1, 6):
        assert min(1, few - 1) <= len(hold_out(0, "cat", names[:few], fraction, 0)) <= max(few - 1, 0)


def test_no_image_changes_sides_when_others_come_and_go(tmp_path):
    make(tmp_path, {"cat": 40, "dog": 40})
    before = {*open_data(str(tmp_path)).val.keys()}
    make(tmp_path, {"ant": 5, "cat": 70, "dog": 40})
    (tmp_path / sorted(before)[0]).unlink()
    data = open_data(str(tmp_path))
    assert {*data.val.keys()} & before == before - {sorted(before)[0]}
    assert not {*data.train.keys()} & before


def photos_of(root, count=12):
    return write_photos(root, halves=((".", count),))


@pytest.fixture
def run(tmp_path, vimamba):
    """A run of an epoch on a folder without halves, beside it: (run, photos)."""
    photos = photos_of(tmp_path / "photos")
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", "--epochs", 1, "--val_fraction", 0.3))
    assert (status, err) == (0, "")
    return tmp_path / "run", photos


def test_a_run_keeps_what_it_held_out(run):
    folder, photos = run
    kept = json.loads((folder / HELD_OUT).read_text())
    data = open_data(str(photos), 0.3)
    assert kept["drawn"] is True
    assert (kept["train"], kept["held_out"]) == (data.train.keys(), data.val.keys())
    assert how_drawn(folder)["kept"] == data.held_out()


def measured(vimamba, *arguments):
    status, out, err = vimamba("eval", *arguments, "--json")
    assert status == 0, err
    return json.loads(out), err


def test_eval_measures_the_images_that_the_run_held_out(run, vimamba, tmp_path):
    folder, photos = run
    held_out = HeldOut.read(folder).held_out
    before, err = measured(vimamba, folder)
    assert (before["images"], err) == (len(held_out), "")
    for i in range(100, 140):
        Image.new("RGB", (20, 24), "blue").save(photos / "blue" / f"{i}.png")
    after, err = measured(vimamba, folder)
    assert (after["images"], after["loss"]) == (before["images"], before["loss"])
    assert "since the run began, images were 40 added; those added are learnt from, not held out" in err
    (photos / held_out[0]).unlink()
    after, err = measured(vimamba, folder)
    assert after["images"] == len(held_out) - 1
    assert f"40 added and 1 removed; those added are learnt from, not held out; {len(held_out) - 1} of the" in err
    assert measured(vimamba, folder, "--split", "all")[0]["images"] == 36 + 40 - 1


def test_eval_says_that_files_have_changed(run, vimamba):
    folder, photos = run
    Image.new("RGB", (200, 24), "red").save(photos / "red" / "0.png")
    assert "since the run began, files have changed under their old names" in measured(vimamba, folder)[1]


def test_eval_knows_the_data_of_the_run_in_another_place(run, vimamba, tmp_path):
    folder, photos = run
    copy = shutil.copytree(photos, tmp_path / "elsewhere")
    assert measured(vimamba, folder, "--data", copy)[0]["images"] == len(HeldOut.read(folder).held_out)
    Image.new("RGB", (20, 24), "red").save(copy / "red" / "new.png")  # now another data set
    assert measured(vimamba, folder, "--data", copy)[0]["images"] == 37


def test_eval_refuses_when_no_held_out_image_is_left(run, vimamba):
    folder, photos = run
    for name in HeldOut.read(folder).held_out:
        (photos / name).unlink()
    status, _, err = vimamba("eval", folder)
    assert status == 2
    assert "images that the run held out is there any more" in err
    assert err.count("\n") == 1


def test_resuming_holds_out_the_same_images_and_learns_from_new_ones(run, vimamba):
    folder, photos = run
    held_out = HeldOut.read(folder).held_out
    for i in range(100, 110):
        Image.new("RGB", (20, 24), "blue").save(photos / "blue" / f"{i}.png")
    status, _, err = vimamba("train", "--resume", folder, "--epochs", 2)
    assert status == 0, err
    assert "images were 10 added" in err
    kept = HeldOut.read(folder)
    assert kept.held_out == held_out
    assert len(kept.train) == 36 + 10 - len(held_out)
    assert measured(vimamba, folder)[1] == ""


def test_a_run_of_version_0_1_is_split_as_it_was(run, vimamba):
    folder, photos = run
    (folder / HELD_OUT).unlink()
    data = open_data(str(photos), 0.3, **how_drawn(folder))
    # (seed + position of the class) and the classes' images in natural order, which that version drew from
    order = [np.random.RandomState(position).permutation(12)[:4] for position in range(3)]
    names = [
        f"{name}/{i}.png" for name, drawn in zip(("blue", "green", "red"), order, strict=True) for i in sorted(drawn)
    ]
    assert data.val.keys() == names
    found, err = measured(vimamba, folder)
    assert found["images"] == 12
    assert "the run is of version 0.1, which kept no list of its held-out images" in err


def test_the_images_of_a_half_may_be_exchanged_but_that_is_said(tmp_path, vimamba):
    photos, folder = write_photos(tmp_path / "photos"), tmp_path / "run"
    assert vimamba(*train_arguments(photos, folder, "--epochs", 1))[0] == 0
    Image.new("RGB", (20, 24), "red").save(photos / "val" / "red" / "new.png")
    found, err = measured(vimamba, folder)
    assert found["images"] == 13
    assert "images were 1 added; those added are in the half that they lie in" in err


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"drawn": true}', '{"drawn": true, "fingerprint": "", "held_out": [1], "train": []}',
             "[" * 100_000, '{"drawn": 1, "fingerprint": "", "held_out": 3, "train": []}'],
)  # fmt: skip
def test_a_damaged_list_of_held_out_images_is_refused(run, vimamba, text):
    folder, _ = run
    (folder / HELD_OUT).write_text(text)
    status, _, err = vimamba("eval", folder)
    assert status == 2
    assert f"{HELD_OUT}: does not tell the run's held-out images" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("halves", [True, False])
def test_copies_in_both_halves_are_counted_once(tmp_path, halves):
    root = make(tmp_path, {"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 2} if halves else {"a": 9, "b": 9})
    assert open_data(str(root)).notes == []
    source = sorted(root.rglob("*.png"))[0]
    for i in range(8):
        shutil.copy(source, root / ("val/dog" if halves else "a") / f"copy{i}.png")
    (note,) = open_data(str(root)).notes
    assert "held-out images are copies of images to learn from (" in note
    if halves:
        assert note.startswith(f"{root}: 8 of the 12 held-out images")
        assert f"({root}/val/dog/copy0.png = {source})" in note
    assert open_data(str(root), strict=False).notes == []


def test_hub_data_without_a_split_to_hold_out_are_split(tmp_path, vimamba):
    make(tmp_path / "data", {"train/cat": 30, "train/dog": 30})
    name = f"hfds/{tmp_path / 'data'}"
    first, other = open_data(name, 0.3, 0), open_data(name, 0.3, 1)
    assert first.val.keys() == open_data(name, 0.3, 0).val.keys() != other.val.keys()
    assert len(first.train) + len(first.val) == 60
    assert not {*first.train.keys()} & {*first.val.keys()}
    assert {*first.val.targets.tolist()} == {0, 1}
    assert first.val.target(0) == first.val.targets[0]
    assert f"{len(first.val)} images of its train split are held out" in first.notes[0]
    assert len(open_data(name, 1.0, strict=False).val) == 60
    assert vimamba(*train_arguments(name, tmp_path / "run", "--val_fraction", 0.3))[0] == 0
    found, _ = measured(vimamba, tmp_path / "run", "--data", name)
    assert found["images"] == len(first.val)


@pytest.mark.parametrize(
    ("label", "message"),
    [("-1", "has the label [-1]"), ("7", "has the label [7]"), ("", "has the label [-1]"), ("cat", "no class numbers")],
)
def test_labels_of_hub_data_are_checked_at_once(tmp_path, label, message):
    make(tmp_path / "train", {".": 4})
    rows = "".join(f"{i}.png,{label if i == 3 else i % 2}\n" for i in range(4))
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,label\n{rows}")
    (tmp_path / "names.txt").write_text("even\nodd\n")
    with pytest.raises(UserError) as refused:
        open_data(f"hfds/{tmp_path}", class_names=str(tmp_path / "names.txt"))
    assert message in str(refused.value)


def test_draws_of_0_1_are_those_of_its_random_numbers():
    names = list("abcdefghij")
    assert hold_out_as_0_1(1, "x", names, 0.3, 4) == {*np.random.RandomState(5).permutation(10)[:3].tolist()}
    with pytest.raises(UserError, match="`val_fraction` is 0"):
        open_data("mnist", 0.0)
