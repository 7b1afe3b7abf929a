"""The page in a browser, of a server and of a folder: `make test-browser` installs Chromium and what drives it."""

import base64
import dataclasses
import functools
import http.server
import io
import json
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.runs import write_photos
from tests.dense import LEARN
from tests.serve.servers import Server
from vimamba import load_run, train
from vimamba.cli import main
from vimamba.data.scenes import open_scenes
from vimamba.export.web import INTEGRITY, SCRIPT, VERSION, WASM, export_web, integrity
from vimamba.inference.evaluation import open_for_eval
from vimamba.tasks.find import find_task
from vimamba.tasks.weights import load_model, save_model

HERE = Path(__file__).parent
MODULES = Path(os.environ.get("BROWSER_MODULES", HERE / "node_modules"))
RUNTIME = MODULES / "onnxruntime-web" / "dist"
LONG = "a working dog of medium size with short hair and an " + "unbreakable" * 10
NAMES = [LONG, "$x_2$ 日本語 اسم </script>", " "]
ROUNDING = 0.15  # of a percentage with one digit, and of another float32 model

pytestmark = pytest.mark.browser


def visit(url, shot, *files, width=1100, scheme="light"):
    """What a person finds."""
    command = ["node", HERE / "browser.mjs", url, shot, str(width), scheme, *files]
    script = MODULES.parent / "browser.mjs"
    if script != HERE / "browser.mjs":  # node looks for modules beside a script
        script.write_text((HERE / "browser.mjs").read_text())
        command[1] = script
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@contextmanager
def served(folder):
    """A folder at an address."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=folder))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{files.server_address[1]}/"
    files.shutdown()


def check_whole(seen, count):
    """What holds of every visit."""
    assert seen["faults"] == []
    assert seen["overflow"] <= 0
    assert [text for text, _ in seen["reached"]] == ["Skip to the results", "Choose images", "Use the camera"]
    assert all(outline == "solid" for _, outline in seen["reached"])
    assert seen["camera"].startswith("camera ")
    assert seen["left"] == count  # one came from the camera, one was removed


def percentages(lines):
    return {name: float(share.removesuffix(" %")) for name, share in lines}


def check_scores(found, predictor, paths):
    """The page shows what the model says in Python."""
    for path, entry in zip(paths, found, strict=True):
        assert entry["name"] == path.name
        shown, result = percentages(entry["lines"]), predictor.predict(path)
        expected = {name.strip() or "(no name)": 100 * share for name, share in result.top(12)}
        assert shown.keys() == expected.keys()
        assert all(abs(shown[name] - expected[name]) < ROUNDING for name in shown)


@pytest.mark.parametrize(
    ("width", "scheme", "ground"), [(1100, "light", "rgb(247, 247, 245)"), (375, "dark", "rgb(22, 23, 26)")]
)
def test_classes_with_any_names(trained, tmp_path, width, scheme, ground):
    model, card = load_model(str(trained))
    run = tmp_path / "model.safetensors"
    save_model(run, model, dataclasses.replace(card, class_names=NAMES))
    photos = sorted((trained.parent / "photos" / "val").glob("*/0.png"))
    copies = [tmp_path / f"{i}.png" for i in range(len(photos))]
    for photo, copy in zip(photos, copies, strict=True):
        copy.write_bytes(photo.read_bytes())
    bad = tmp_path / "bad.png"
    bad.write_text("not an image")
    with Server(run, log=tmp_path / "log") as server:
        seen = visit(
            f"http://{server.host}:{server.port}/", tmp_path / "page.png", *copies, bad, width=width, scheme=scheme
        )
    check_whole(seen, 4)
    check_scores(seen["found"][:3], load_run(run), copies)
    assert [entry["heat"] >= 224 for entry in seen["found"]] == [True, True, True, False]
    assert seen["found"][3]["error"] == "It is not an image in a format that Pillow reads"
    assert seen["said"].startswith("bad.png: ")
    assert seen["about"] == "vim_nano tells apart 3 classes."
    assert seen["ground"] == ground


def test_masks_and_boxes(segmented, detected, tmp_path):
    for run, what in ((segmented, "val/images/10.png"), (detected, "val2017/24.png")):
        path = run.parent / "data" / what
        with Server(run, log=tmp_path / "log") as server:
            seen = visit(f"http://{server.host}:{server.port}/", tmp_path / "page.png", path)
        check_whole(seen, 1)
        result = load_run(run).predict(path)
        result = result.above(0.5) if hasattr(result, "above") else result
        expected = [name for name, _ in result.top(12)] or ["Nothing was found."]
        assert seen["found"][0]["heat"] == 0
        assert [name for name, _ in seen["found"][0]["lines"]] == expected


def pixels(entry):
    """What is painted on the canvas."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["pixels"].split(",")[1]))).convert("RGB")).astype(
        int
    )


@pytest.mark.parametrize(
    ("width", "scheme", "sides"), [(1100, "light", {}), (375, "dark", {"short_side": 40, "long_side": 200})]
)
def test_a_folder_segments_as_the_server_does(width, scheme, sides, segmented, tmp_path):
    """A small image, larger ones, and one over which windows slide; by its own size, and scaled before."""
    model, card = load_model(str(segmented))
    prep = dataclasses.replace(card.preprocessing, **sides)
    run = tmp_path / "model.safetensors"
    save_model(run, model, dataclasses.replace(card, class_names=["background", *NAMES[:2]], preprocessing=prep))
    picture = Image.open(segmented.parent / "data" / "val" / "images" / "10.png")
    paths = [tmp_path / f"{w} by {h}.png" for w, h in ((32, 32), (70, 45), (61, 90), (150, 101))]
    for path in paths:
        wide, high = map(int, path.stem.split(" by "))
        picture.resize((wide, high), Image.Resampling.BICUBIC).save(path)
    web(run, tmp_path / "page")
    with served(tmp_path / "page") as address, Server(run, log=tmp_path / "log") as server:
        seen = visit(address, tmp_path / "page.png", *paths, width=width, scheme=scheme)
        wanted = visit(f"http://{server.host}:{server.port}/", tmp_path / "server.png", *paths, width=width)
    check_whole(seen, len(paths))
    check_scores(seen["found"], load_run(run), paths)
    assert seen["about"] == "vim_nano finds, pixel by pixel, 3 classes."
    for found, other in zip(seen["found"], wanted["found"], strict=True):
        painted, same = pixels(found), pixels(other)
        assert painted.shape == same.shape
        assert (abs(painted - same).max(-1) > 8).mean() < 0.002
        assert len(found["lines"]) == 3
    assert all(request.startswith(("GET " + address, "GET blob:", "GET data:")) for request in seen["requests"])


def web(run, folder):
    assert main(["export", str(run), "--format", "web", "--output", str(folder), "--runtime", str(RUNTIME)]) == 0


def masked(entry, height, width):
    """The masks of a page's objects in their image, (n, height, width)."""
    found_NHW = np.zeros((len(entry["masks"]), height, width), bool)
    for mask_HW, mask in zip(found_NHW, entry["masks"], strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(mask["png"].split(",")[1])))
        mask_HW[mask["top"] :, mask["left"] :][: picture.height, : picture.width] = np.asarray(picture)[..., 3] > 0
    return found_NHW


@pytest.mark.parametrize(
    ("head", "width", "scheme", "sides"),
    [
        ("mask_rcnn", 1100, "light", {}),
        ("mask_rcnn", 375, "dark", {"short_side": 40, "long_side": 120}),
        ("faster_rcnn", 1100, "light", {"short_side": 40, "long_side": 120}),
        ("cascade_mask_rcnn", 375, "dark", {"short_side": 40, "long_side": 120}),
    ],
)
def test_a_folder_detects_as_the_command_does(head, width, scheme, sides, detected, tmp_path, capsys):
    """Pictures across and upright, real ones, and one where nothing is; by their own size, and scaled."""
    if head != "mask_rcnn":
        learnt = train(data=detected.parent / "data", output=tmp_path / "run", **LEARN | {"head": head}).folder
    else:
        learnt = detected
    near = 1e-3 if head.startswith("cascade") else 2e-5  # a cascade multiplies what is added in another order
    model, card = load_model(str(learnt))
    prep = dataclasses.replace(card.preprocessing, **sides)
    run = tmp_path / "model.safetensors"
    save_model(run, model, dataclasses.replace(card, class_names=NAMES[:2], preprocessing=prep))
    data = open_for_eval(detected, find_task("detect"), str(detected.parent / "data"))[0]
    picture, scenes = data.val.image(0), open_scenes("scenes-det").val
    pictures = {
        f"{w} by {h}": picture.resize((w, h), Image.Resampling.BICUBIC) for w, h in ((32, 32), (70, 45), (61, 90))
    }
    pictures |= {f"scene {i}": scenes.image(i) for i in range(2)} | {"black": Image.new("RGB", (48, 32))}
    paths = [tmp_path / f"{name}.png" for name in pictures]
    for path in paths:
        pictures[path.stem].save(path)
    export_web(run, tmp_path / "page", runtime=RUNTIME, samples=data.val)
    with served(tmp_path / "page") as address, Server(run, log=tmp_path / "log") as server:
        seen = visit(address, tmp_path / "page.png", *paths, width=width, scheme=scheme)
        wanted = visit(f"http://{server.host}:{server.port}/", tmp_path / "server.png", *paths, width=width)
    check_whole(seen, len(paths))
    assert seen["about"] == "vim_nano finds objects of 2 classes."
    capsys.readouterr()
    assert main(["predict", str(run), *map(str, paths), "--json", "--min_score", "0.05"]) == 0
    printed = {Path(line["image"]).stem: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    predictor = load_run(run)
    for path, entry, of_server in zip(paths, seen["found"], wanted["found"], strict=True):
        said, result = printed[path.stem]["objects"], predictor.predict(path).above(0.05)
        assert [line["class"] for line in entry["objects"]] == [line["class"] for line in said]
        for found, line in zip(entry["objects"], said, strict=True):
            assert found["score"] == pytest.approx(line["score"], abs=near)
            assert found["box"] == pytest.approx(line["box"], abs=max(0.02, 100 * near))
        assert len(entry["masks"]) == (len(said) if head != "faster_rcnn" else 0)
        if entry["masks"]:
            differ_N = (masked(entry, *result.size) != result.masks).sum((1, 2))
            assert (differ_N <= 1 + 0.002 * result.masks.sum((1, 2))).all()
        assert entry["lines"] == of_server["lines"]
        painted, same = pixels(entry), pixels(of_server)
        assert painted.shape == same.shape
        assert (abs(painted - same).max(-1) > 8).mean() < 0.002
    counts = {path.stem: len(entry["objects"]) for path, entry in zip(paths, seen["found"], strict=True)}
    assert counts["32 by 32"] > 0
    assert counts["70 by 45"] > 0
    assert counts["scene 0"] + counts["scene 1"] > 0
    assert all(found["score"] < 0.5 for found in seen["found"][-1]["objects"])  # the least that the page shows
    assert seen["found"][-1]["lines"] == [["Nothing was found.", None]]
    assert all(request.startswith(("GET " + address, "GET blob:", "GET data:")) for request in seen["requests"])


@pytest.mark.parametrize("kind", ["vim_nano", "vim_tiny"])
def test_a_folder_runs_the_model_in_the_browser(kind, trained, tmp_path, photo_folder):
    run = trained
    if kind == "vim_tiny":
        run = tmp_path / "run"
        words = [
            "--epochs",
            "1",
            "--num_workers",
            "0",
            "--accelerator",
            "cpu",
            "--batch_size",
            "8",
            "--img_size",
            "224",
        ]
        data = ["--data", str(photo_folder), "--model", "vim_tiny_patch16_224", "--output", str(run)]
        assert main(["train", *data, *words]) == 0
    folder = tmp_path / "page"
    web(run, folder)
    paths = sorted(photo_folder.glob("val/*/0.*"))
    copies = [tmp_path / f"{i}{path.suffix}" for i, path in enumerate(paths)]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    with served(folder) as address:
        seen = visit(address, tmp_path / "page.png", *copies)
    check_whole(seen, len(copies))
    check_scores(seen["found"], load_run(run), copies)
    assert all(request.startswith(("GET " + address, "GET blob:", "GET data:")) for request in seen["requests"])


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """Pictures that have to be scaled down, upright and across."""
    root = write_photos(tmp_path_factory.mktemp("large"), halves=(("train", 4), ("val", 1)))
    for i, path in enumerate(sorted(root.glob("*/*/*.png"))):
        Image.open(path).resize([(500, 400), (260, 640)][i % 2], Image.Resampling.BICUBIC).save(path)
    return root


def test_the_runtime_of_the_cdn_is_the_one_that_was_tried():
    assert json.loads((RUNTIME.parent / "package.json").read_text())["version"] == VERSION
    assert {SCRIPT: integrity(RUNTIME / SCRIPT), WASM: integrity(RUNTIME / WASM)} == INTEGRITY
