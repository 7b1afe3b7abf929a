"""vimamba train, eval and predict of masks and objects: what they print and write, and what they refuse."""

import contextlib
import csv
import errno
import io
import json
import os
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.dense import DETECT, SEGMENT, SIDE, scene, write_masks, write_objects
from vimamba.inference import tiles
from vimamba.inference.tiles import Tiling
from vimamba.tasks.detection import DetectionTask
from vimamba.tasks.results import Detections, Segmentation
from vimamba.tasks.segmentation import SegmentationTask

TASKS = ("segment", "detect")


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture
def run(task, request):
    return request.getfixturevalue({"segment": "segmented", "detect": "detected"}[task])


@pytest.fixture
def images(run, task):
    """The folder of the held-out images."""
    return run.parent / "data" / ("val/images" if task == "segment" else "val2017")


def words(options):
    """Options as they are typed."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def large_image(path, rows=3, columns=4, first=0):
    parts = [np.concatenate([scene(first + 4 * row + i)[0] for i in range(columns)], 1) for row in range(rows)]
    tifffile.imwrite(path, np.concatenate(parts), photometric="rgb", tile=(16, 16))
    return path


# -- train and eval


def test_a_run_from_beginning_to_end(vimamba, tmp_path, task):
    data = (write_masks if task == "segment" else write_objects)(tmp_path / "data")
    options = {k: v for k, v in (SEGMENT if task == "segment" else DETECT).items() if k != "progress"}
    run = tmp_path / "run"
    status, out, err = vimamba("train", "--data", data, "--output", run, *words(options))
    assert (status, err) == (0, "")
    assert "8 images to learn from, 4 held out, " in out
    assert ("mean IoU" if task == "segment" else "box AP") in out
    assert f"Next: vimamba eval {run}" in out
    wanted = {"model.safetensors", "config.yaml", "metrics.csv", "per_class.csv", "curves.png"}
    assert wanted <= {path.name for path in run.iterdir()}
    status, out, err = vimamba("train", "--resume", run, "--epochs", 3)
    assert (status, err) == (0, "")
    with (run / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"val_miou", "val_pixel_accuracy"} <= {*rows[0]} or {"val_map", "val_mask_map"} <= {*rows[0]}


def test_built_in_scenes_are_shown_beside_the_run(vimamba, tmp_path, task, monkeypatch):
    from vimamba.data import scenes

    monkeypatch.setattr(scenes, "COUNTS", {"train": 4, "val": 2})
    options = {k: v for k, v in (SEGMENT if task == "segment" else DETECT).items() if k != "progress"}
    name = {"segment": "scenes-seg", "detect": "scenes-det"}[task]
    status, out, err = vimamba("train", "--data", name, "--output", tmp_path / "run", *words(options | {"epochs": 1}))
    assert (status, err) == (0, "")
    pictures = [*(tmp_path / "run" / "scenes").glob("*.png")]
    assert f"vimamba predict {tmp_path}/run {tmp_path}/run/scenes/*.png" in out
    status, out, err = vimamba("predict", tmp_path / "run", *pictures)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == len(pictures) > 0


NUMBERS = {
    "segment": {"miou", "pixel_accuracy", "loss"},
    "detect": {"map", "map_50", "map_75", "mask_map", "mask_map_50", "mask_map_75"},
}


def test_eval_prints_numbers(vimamba, run, task, tmp_path):
    status, out, err = vimamba("eval", run, "--json", "--output", tmp_path)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert NUMBERS[task] <= {*found}
    assert found["images"] == {"segment": 4, "detect": 8}[task]
    names = {"segment": ["background", "square", "disc"], "detect": ["square", "disc"]}[task]
    assert [row["name"] for row in found["per_class"]] == names
    assert all(0 <= found[name] <= 1 for name in NUMBERS[task] - {"loss"})
    status, out, err = vimamba("eval", run)
    assert (status, err) == (0, "")
    heading, *rows = [line for line in out.splitlines() if line][: 1 + len(names)]
    assert [row.split()[0] for row in rows] == names
    main = found["miou" if task == "segment" else "map"]
    assert f"{100 * main:.2f}% {'mIoU' if task == 'segment' else 'AP'}, " in out
    assert ("IoU %" if task == "segment" else "mask AP50 %") in heading
    assert "held-out images" in out


def test_eval_names_classes_that_are_not_there(vimamba, run, task, tmp_path):
    data = shutil.copytree(run.parent / "data", tmp_path / "data")
    if task == "segment":
        for path in (data / "val/masks").iterdir():
            mask = np.array(Image.open(path))
            Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    else:
        path = data / "annotations/instances_val2017.json"
        known = json.loads(path.read_text())
        known["annotations"] = [one for one in known["annotations"] if one["category_id"] == 1]
        path.write_text(json.dumps(known))
    status, out, _ = vimamba("eval", run, "--data", data, "--split", "val")
    assert status == 0
    assert f"no {'pixels' if task == 'segment' else 'objects'} of: disc" in out


def test_eval_of_images_without_objects_shows_no_number(vimamba, detected, tmp_path):
    data = shutil.copytree(detected.parent / "data", tmp_path / "data")
    path = data / "annotations/instances_val2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    status, out, err = vimamba("eval", detected, "--data", data, "--split", "val")
    assert (status, err) == (0, "")
    assert "-% AP, " in out


def test_windows_and_mirrors_change_what_is_measured(vimamba, segmented, tmp_path):
    data = shutil.copytree(segmented.parent / "data", tmp_path / "data")
    for path in [*data.rglob("val/*/*.png")]:
        image = Image.open(path)
        image.resize((3 * SIDE, 2 * SIDE), Image.Resampling.NEAREST).save(path)
    found = [
        json.loads(vimamba("eval", segmented, "--data", data, "--split", "val", "--json", *more)[1])["loss"]
        for more in ((), ("--window", "slide"), ("--window", "whole"), ("--flip", "true"))
    ]
    assert len({*found}) == len(found) - (found[0] == found[1])


def test_masks_of_another_number_that_does_not_count(vimamba, segmented, tmp_path):
    data = shutil.copytree(segmented.parent / "data", tmp_path / "data")
    for path in (data / "val/masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 7, mask).astype(np.uint8)).save(path)
    given = ("eval", segmented, "--data", data, "--split", "val", "--json")
    assert vimamba(*given)[0] == 2
    status, out, _ = vimamba(*given, "--ignore_index", 7)
    assert status == 0
    wanted = json.loads(vimamba("eval", segmented, "--json")[1])
    assert json.loads(out)["miou"] == pytest.approx(wanted["miou"])


# -- predict


def test_predict_names_what_it_finds(vimamba, run, images, task):
    status, out, err = vimamba("predict", run, images)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len([*images.iterdir()])
    assert all("%" in line or " nothing " in line for line in lines)
    names = ("background",) if task == "segment" else ("square", "disc", "nothing")
    assert all(line.split()[1] in names for line in lines)
    status, out, err = vimamba("predict", run, images, "--json", *([] if task == "segment" else ["--min_score", 0.3]))
    answers = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert all((answer["height"], answer["width"]) == (SIDE, SIDE) for answer in answers)
    if task == "segment":
        assert all(sum(one["share"] for one in answer["classes"]) == pytest.approx(1, abs=1e-5) for answer in answers)
    else:
        assert all(0.3 <= one["score"] <= 1 for answer in answers for one in answer["objects"])
        assert any(answer["objects"] for answer in answers)


def test_predict_writes_a_table(vimamba, run, images, task):
    bad = images.parent.parent / "bad.png"
    bad.write_bytes(b"bad")
    try:
        status, out, err = vimamba("predict", run, images, bad, "--csv", "--top", 2)
    finally:
        bad.unlink()
    rows = [*csv.DictReader(io.StringIO(out))]
    assert status == 1
    assert "1 of " in err
    columns = ["class", "share"] if task == "segment" else ["class", "score", "left", "top", "right", "bottom"]
    assert [*rows[0]] == ["image", *columns, "error"]
    assert [row["image"] for row in rows if row["error"]] == [str(bad)]
    counts = [sum(row["image"] == str(path) for row in rows) for path in images.iterdir()]
    assert max(counts) == 2


def test_top_is_how_many_are_told(vimamba, run, images, task):
    what = "classes" if task == "segment" else "objects"
    more = [] if task == "segment" else ["--min_score", 0.0]
    lines = vimamba("predict", run, images, "--json", *more)[1].splitlines()
    # Which has enough is not the same on all processors.
    path = max(map(json.loads, lines), key=lambda answer: len(answer[what]))["image"]
    counts = [
        len(json.loads(vimamba("predict", run, path, "--json", *more, *top)[1])[what])
        for top in (["--top", 1], ["--top", 2], [])
    ]
    assert counts[:2] == [1, 2]
    assert counts[2] > 2 or task == "segment"


def test_predict_writes_pictures(vimamba, run, images, task, tmp_path):
    path = images / {"segment": "8.png", "detect": "24.png"}[task]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    names = ["a/sm\u00f8rbr\u00f8d \u96ea.png", "b/sm\u00f8rbr\u00f8d \u96ea.png", "a/[red] $x_2$.png",
             f"a/{'n' * 240}.png"]  # fmt: skip
    for name in names:
        shutil.copy(path, tmp_path / name)
    (tmp_path / "a/bad.png").write_bytes(b"bad")
    output = tmp_path / "out/deep"
    given = [tmp_path / name for name in (*names, "a/bad.png")]
    status, out, err = vimamba("predict", run, *given, "--output", output, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert "1 of 5 images could not be read" in err
    assert [answer["image"] for answer in answers] == [str(path) for path in given]
    assert "error" in answers[-1]
    kinds = ("overlay", "mask") if task == "segment" else ("overlay",)
    written = [answer[kind] for answer in answers[:4] for kind in kinds]
    expected = {*written, *([] if task == "segment" else [str(output / "predictions.json")])}
    assert {str(path) for path in output.iterdir()} == expected
    assert len({*written}) == 4 * len(kinds)
    overlay = np.asarray(Image.open(answers[0]["overlay"]))
    assert overlay.shape[0] >= SIDE
    if task == "segment":
        masks = [np.asarray(Image.open(answer["mask"])) for answer in answers[:4]]
        assert all(np.array_equal(mask, masks[0]) for mask in masks)
        assert masks[0].shape == (SIDE, SIDE)
        assert {*masks[0].ravel().tolist()} <= {0, 1, 2}
        shares = {one["class"]: one["share"] for one in answers[0]["classes"]}
        assert shares["background"] == pytest.approx((masks[0] == 0).mean(), abs=1e-5)


def loaded(path):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        return coco, coco.loadRes(json.loads(path.read_text())["annotations"])


@pytest.mark.parametrize("how", [[], ["--tile", 32, "--overlap", 8]], ids=["whole", "tiles"])
def test_what_was_found_is_written_as_coco_has_it(vimamba, detected, tmp_path, how):
    images = detected.parent / "data/val2017"
    status, out, err = vimamba("predict", detected, images, "--output", tmp_path, "--json", "--min_score", 0.0, *how)
    assert (status, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    coco, found = loaded(tmp_path / "predictions.json")
    written = coco.dataset["annotations"]
    assert [image["file_name"] for image in coco.dataset["images"]] == [answer["image"] for answer in answers]
    assert [one["name"] for one in coco.dataset["categories"]] == ["square", "disc"]
    counts = [len(found.getAnnIds(imgIds=[image["id"]])) for image in coco.dataset["images"]]
    assert counts == [len(answer["objects"]) for answer in answers]
    assert sum(counts) > 0
    assert all(coco.annToMask(one).sum() == one["area"] for one in written)
    assert any(one["area"] for one in written)
    wanted = json.loads(vimamba("eval", detected, "--json")[1])
    truth_file = detected.parent / "data/annotations/instances_val2017.json"
    numbers = {image["file_name"]: image["id"] for image in json.loads(truth_file.read_text())["images"]}
    own = {image["id"]: numbers[os.path.basename(image["file_name"])] for image in coco.dataset["images"]}
    results = [{**one, "image_id": own[one["image_id"]]} for one in written]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        for kind, name in (("bbox", "map"), ("segm", "mask_map")):
            judge = COCOeval(truth, truth.loadRes(results), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            assert judge.stats[0] == pytest.approx(wanted[name], abs=0.02)  # boxes are written with two digits


# -- in tiles


def test_large_images_go_in_tiles(vimamba, run, task, tmp_path):
    path, other = large_image(tmp_path / "large.tif"), large_image(tmp_path / "second.tif", first=20)
    large_image(tmp_path / "a.tif", 1, 1)
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no more")
    given = ["predict", run, path, tmp_path / "bad.tif", other, tmp_path / "a.tif", "--tile", 64, "--overlap", 16]
    output = tmp_path / "out"
    status, out, err = vimamba(*given, "--output", output, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert "1 of 4 images could not be read" in err
    assert ["error" in answer for answer in answers] == [False, True, False, False]
    assert (answers[0]["height"], answers[0]["width"]) == (3 * SIDE, 4 * SIDE)
    assert Image.open(answers[0]["overlay"]).width >= 4 * SIDE
    names = ["large", "second", "a"]
    if task == "segment":
        mask = tifffile.imread(answers[0]["mask"])
        assert mask.shape == (3 * SIDE, 4 * SIDE)
        assert {*np.unique(mask).tolist()} == {0, 1, 2}
        expected = {f"{name}-{what}" for name in names for what in ("mask.tif", "overlay.png")}
    else:
        assert len(loaded(output / "predictions.json")[0].dataset["images"]) == 3
        expected = {*(f"{name}-overlay.png" for name in names), "predictions.json"}
    assert {path.name for path in output.iterdir()} == expected
    status, out, _ = vimamba("predict", run, path, "--tile", 64, "--output", tmp_path / "again", "--overlap", 16)
    assert status == 0
    assert str(path) in out


def test_a_call_that_was_stopped_goes_on(vimamba, run, task, tmp_path, monkeypatch):
    paths = [large_image(tmp_path / "one.tif"), large_image(tmp_path / "two.tif", first=20)]
    given = ["predict", run, *paths, "--tile", 32, "--overlap", 8, "--json"]
    wanted = vimamba(*given, "--output", tmp_path / "whole")[1]
    count = len(tiles.spans(3 * SIDE, 32, 8)) * len(tiles.spans(4 * SIDE, 32, 8))
    outputs, seen, limit = Tiling.outputs, [], [0]

    def stopping(tiling, number):
        if len(seen) == limit[0]:
            raise KeyboardInterrupt
        seen.append((tiling.name, number))
        return outputs(tiling, number)

    monkeypatch.setattr(Tiling, "outputs", stopping)
    for stop, said in ((3, f"3 of {count} tiles of {paths[0]}"), (count + 2, f"2 of {count} tiles of {paths[1]}")):
        limit[0] = stop
        status, _, err = vimamba(*given, "--output", tmp_path / "out")
        assert status == 130
        assert err == f"\nstopped at {said}; the same command goes on there\n"
    limit[0] = -1
    status, out, err = vimamba(*given, "--output", tmp_path / "out")
    assert (status, err) == (0, "")
    assert seen == [(name, number) for name in ("one", "two") for number in range(count)]  # each tile once
    assert out == wanted.replace(str(tmp_path / "whole"), str(tmp_path / "out"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_what_was_found_before_a_stop_is_written(vimamba, detected, tmp_path, monkeypatch):
    images = sorted((detected.parent / "data/val2017").iterdir())
    infer = DetectionTask.infer.__func__
    calls = []

    def stopping(cls, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return infer(cls, *arguments)

    monkeypatch.setattr(DetectionTask, "infer", classmethod(stopping))
    status, out, err = vimamba("predict", detected, *images, "--output", tmp_path, "--batch_size", 2)
    assert (status, err) == (130, "\nstopped\n")
    assert len(out.splitlines()) == 4
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert [image["file_name"] for image in written["images"]] == [str(path) for path in images[:4]]


@pytest.mark.parametrize("how", [[], ["--tile", 32]], ids=["whole", "tiles"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_too_little_memory_is_said_with_what_needs_less(vimamba, run, images, task, tmp_path, monkeypatch, how, error):
    def infer(cls, *arguments):
        raise error
        yield

    monkeypatch.setattr({"segment": SegmentationTask, "detect": DetectionTask}[task], "infer", classmethod(infer))
    output = ["--output", tmp_path] if how else []
    status, _, err = vimamba("predict", run, images, *how, *output)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: out of memory by ")
    assert "32 x 32 pixels; give " in err
    assert "a --tile of 1024 pixels or, if you did, of fewer" in err
    assert ("a smaller --batch_size than" in err) == (not how)


def test_too_little_memory_for_a_picture_is_said(vimamba, run, images, task, tmp_path, monkeypatch):
    def draw(result, image):
        raise MemoryError

    monkeypatch.setattr({"segment": Segmentation, "detect": Detections}[task], "draw", draw)
    status, _, err = vimamba("predict", run, images, "--output", tmp_path)
    assert status == 2
    assert err.startswith("error: out of memory by 1 image of up to 32 x 32 pixels; give a --tile of 1024 pixels")


@pytest.mark.parametrize("what", ["files", "folder"])
def test_a_full_disk_is_said(vimamba, segmented, tmp_path, monkeypatch, what):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = large_image(tmp_path / "large.tif")
    if what == "files":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        (tmp_path / "out").touch()
    status, _, err = vimamba("predict", segmented, path, "--tile", 32, "--overlap", 0, "--output", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert ("cannot be written (No space left on device)" if what == "files" else "is a file; give a folder") in err


# -- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tile", 64], "--tile: give --output"),
        (["--tile", 64, "--output", "OUT", "--csv"], "--csv: goes without --tile"),
        (["--tile", 64, "--output", "OUT", "--batch_size", 2], "leave --batch_size and --num_workers out"),
        (["--tile", 64, "--output", "OUT", "--num_workers", 1], "leave --batch_size and --num_workers out"),
        (["--tile", 8, "--output", "OUT"], "--tile is 8; it must be at least 32"),
        (["--tile", 64, "--overlap", 40, "--output", "OUT"], "--overlap is 40; give 0 to half of --tile, 32"),
        (["--overlap", 40], "--overlap 40: goes with --tile"),
        (["--top", 0], "--top is 0"),
        (["--window", "large"], "--window: expected auto or whole or slide, got large"),
        (["--min_score", 1.5], "--min_score is 1.5; give a share from 0 to 1"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(vimamba, run, images, tmp_path, options, said):
    status, out, err = vimamba("predict", run, images, *[tmp_path / "out" if o == "OUT" else o for o in options])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("run_of", "options", "said"),
    [
        ("segmented", ["--min_score", 0.7], "--min_score: is for runs that detect objects"),
        ("detected", ["--window", "slide"], "--window slide: is of no use to --task detect"),
        ("detected", ["--flip", "true"], "--flip True: is of no use to --task detect"),
        ("trained", ["--flip", "true"], "--flip True: is of no use to --task classification"),
        ("trained", ["--tile", 64, "--output", "out"], "--tile: is for runs that segment or detect"),
        ("trained", ["--min_score", 0.7], "--min_score: is for runs that detect objects"),
    ],
)  # fmt: skip
def test_options_of_another_task_are_refused(vimamba, request, monkeypatch, tmp_path, run_of, options, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = vimamba("predict", request.getfixturevalue(run_of), "image.png", *options)
    assert (status, out, err) == (2, "", f"error: {said}\n") or (status == 2 and err.startswith(f"error: {said}"))
    assert not (tmp_path / "out").exists()


BAD = {
    "text.txt": b"no image",
    "text.png": b"no image",
    "film.mp4": b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
    "empty.png": b"",
    "empty.tif": b"",
    "header.tif": b"II*\0\x08\0\0\0",
}


@pytest.mark.parametrize("how", [[], ["--tile", 32, "--output", "out"]], ids=["whole", "tiles"])
def test_what_is_no_image_is_named_and_the_rest_goes_on(vimamba, run, images, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    whole = (images / os.listdir(images)[0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    large_image(tmp_path / "cut.tif")
    cut = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(cut[: len(cut) // 2])
    good = {"1x1.png": (1, 1), "strip.png": (700, 3), "grey.png": (40, 33)}
    for name, size in good.items():
        Image.new("L" if name == "grey.png" else "RGB", size, 99).save(tmp_path / name)
    bad = [*BAD, "half.png", "cut.tif", "gone.png"]
    status, out, err = vimamba("predict", run, *bad, *good, "--json", *how)
    answers = {answer["image"]: answer for answer in map(json.loads, out.splitlines())}
    assert status == 1
    assert err.count("\n") == 1
    assert f"{len(bad)} of {len(bad) + len(good)} images could not be read" in err
    assert all(answers[name]["error"].startswith(f"{name}: ") for name in bad)
    assert all((answers[name]["width"], answers[name]["height"]) == size for name, size in good.items())
    assert not [*tmp_path.rglob(".*.tiles")]


@pytest.mark.parametrize("arguments", [["predict", "RUN", "EMPTY"], ["eval", "RUN", "--data", "EMPTY"],
                                       ["eval", "RUN", "--data", "gone"], ["predict", "gone", "EMPTY"]])  # fmt: skip
def test_folders_of_nothing_are_named(vimamba, run, tmp_path, arguments):
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "EMPTY": tmp_path / "empty"}
    status, out, err = vimamba(*[places.get(a, a) for a in arguments])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
