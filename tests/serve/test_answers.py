"""What a server answers: to each way of asking, and exactly what `vimamba predict --json` prints."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.serve.servers import Server, form
from vimamba import explain, load_run
from vimamba.cli import main
from vimamba.inference.explain import report

ROUNDING = 2e-6  # of the sixth digit: a batch may be summed up otherwise than an image alone


def predicted(capsys, *words):
    """What the command prints, by image."""
    assert main(["predict", *map(str, words), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line.pop("image"): line for line in lines}


def test_every_way_to_ask_gives_what_predict_prints(server, trained, photographs, capsys):
    path, data = next(iter(photographs.items()))
    expected = predicted(capsys, trained, path)[path]
    body, kind = form(("ä .png", data))
    text = base64.b64encode(data).decode()
    ways = [
        ("image", data, {}),
        ("image", data, {"content_type": "image/png"}),
        ("image", io.BytesIO(data), {"transfer_encoding": "chunked"}),
        ("ä .png", body, {"content_type": kind}),
        ("image", json.dumps({"image": text}), {"content_type": "application/json"}),
        ("image", json.dumps({"image": f"data:image/png;base64,{text}"}), {"content_type": "application/json"}),
    ]
    for name, sent, headers in ways:
        found = server.predict(sent, **headers)
        assert (found.status, found.json) == (200, {"image": name, **expected})


def test_several_images_in_one_request_are_answered_in_their_order(server, photographs):
    single = [server.predict(data).json["predictions"] for data in photographs.values()]
    body, kind = form(*photographs.items())
    texts = [base64.b64encode(data).decode() for data in photographs.values()]
    of_form = server.predict(body, content_type=kind).json["results"]
    of_json = server.predict(json.dumps({"images": texts}), content_type="application/json").json["results"]
    assert [line["image"] for line in of_form] == list(photographs)
    assert [line["image"] for line in of_json] == [f"images[{i}]" for i in range(len(texts))]
    for found in (of_form, of_json):
        assert all(close(line, {"predictions": lines}) for line, lines in zip(found, single, strict=True))


def test_a_heat_map_is_that_of_the_image(server, trained, photographs):
    predictor = load_run(trained)
    side = report.enlarged(Image.new("RGB", predictor.card.preprocessing.img_size)).size
    for data in photographs.values():
        answer = server.predict(data, "?heat_map=true").json
        with Image.open(io.BytesIO(base64.b64decode(answer.pop("heat_map")))) as picture:
            assert (picture.format, picture.size) == ("PNG", side)
            seen = predictor.item(Image.open(io.BytesIO(data))).image
            values = explain(predictor.model, seen[None], "attention")[0].numpy()
            wanted = report.overlay(report.as_picture(seen, predictor.card.preprocessing), values)
            assert np.abs(np.asarray(picture, int) - np.asarray(wanted, int)).max() <= 1
        assert close(answer, server.predict(data).json)
    body, kind = form(("bad.png", b"no image"), *photographs.items())
    lines = server.predict(body, "?heat_map=true", content_type=kind).json["results"]
    assert ["heat_map" in line for line in lines] == [False, *(True for _ in photographs)]


def close(one, other):
    """The same answer, up to the rounding of a batch."""
    pairs = list(zip(one["predictions"], other["predictions"], strict=True))
    return all(a["class"] == b["class"] and abs(a["probability"] - b["probability"]) < ROUNDING for a, b in pairs)


def test_a_bad_image_among_several_leaves_the_others_their_answers(server, photograph):
    body, kind = form(("good.png", photograph), ("bad.png", b"nothing"), ("empty.png", b""))
    found = server.predict(body, content_type=kind)
    good, bad, empty = found.json["results"]
    assert found.status == 200
    assert close(good, server.predict(photograph).json)
    assert bad == {"image": "bad.png", "error": "bad.png: is not an image in a format that Pillow reads"}
    assert empty["error"] == "empty.png: is empty (0 bytes)"


def test_what_is_asked_for_is_answered(server, photograph):
    assert len(server.predict(photograph, "?top=1").json["predictions"]) == 1
    assert len(server.predict(photograph, "?top=99").json["predictions"]) == 3


def test_answers_are_never_mixed(server, photographs):
    """Many clients, images of many sizes, bad ones between them: each gets the answer to its own."""
    expected = {data: server.predict(data).json for data in photographs.values()}
    assert len({str(answer) for answer in expected.values()}) == len(expected)
    asked = [*expected, b"nothing"] * 25
    before = server.number("vimamba_batch_images_count"), server.number("vimamba_batch_images_sum")
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(server.predict, asked))
    for data, answer in zip(asked, found, strict=True):
        if data in expected:
            assert answer.status == 200
            assert close(answer.json, expected[data])
        else:
            assert (answer.status, answer.error) == (422, "image: is not an image in a format that Pillow reads")
    batches, images = (
        server.number(f"vimamba_batch_images_{name}") - old for name, old in zip(("count", "sum"), before, strict=True)
    )
    assert images == 25 * len(expected)
    assert batches < images  # some were looked at together


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_tasks_answer_with_what_predict_prints_and_with_masks(task, request, tmp_path, capsys):
    run = request.getfixturevalue({"segment": "segmented", "detect": "detected"}[task])
    paths = sorted(
        (run.parent / "data").glob("val*/images/*.png")
        if task == "segment"
        else (run.parent / "data").glob("val2017/*")
    )
    least = ["--min_score", "0.2"] if task == "detect" else []
    expected = predicted(capsys, run, *paths[:4], *least)
    predictor = load_run(run)
    with Server(run, log=tmp_path / "log") as server:
        refused = server.predict(paths[0].read_bytes(), "?heat_map=true")
        assert (refused.status, refused.json["error"].split()[0]) == (422, "heat_map:")
        for path in paths[:4]:
            data, query = path.read_bytes(), "?min_score=0.2" if least else ""
            assert server.predict(data, query).json == {"image": "image", **expected[str(path)]}
            answer = predictor.predict(path)
            with_masks = server.predict(data, "?masks=true&top=100").json
            if task == "segment":
                np.testing.assert_array_equal(np.asarray(picture(with_masks["mask"])), answer.mask)
            else:
                check_masks(with_masks["masks"], answer.above(0.5).masks)


def check_masks(found, expected):
    assert len(found) == len(expected)
    for mask, whole in zip(found, expected, strict=True):
        pixels = np.asarray(picture(mask["png"])) == 1
        pasted = np.zeros_like(whole)
        pasted[mask["top"] : mask["top"] + pixels.shape[0], mask["left"] : mask["left"] + pixels.shape[1]] = pixels
        np.testing.assert_array_equal(pasted, whole)


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_other_paths(server, trained):
    health = server.ask("GET", "/health").json
    assert (health["status"], health["task"], health["classes"]) == ("ok", "classification", 3)
    schema = server.ask("GET", "/openapi.json").json
    assert {*schema["paths"]} == {"/", "/health", "/metrics", "/predict"}
    assert {"200", "413", "422", "429", "504"} <= {*schema["paths"]["/predict"]["post"]["responses"]}
    metrics = server.ask("GET", "/metrics").body.decode()
    assert 'vimamba_requests_total{path="/health",status="200"}' in metrics
    page = server.ask("GET", "/")
    for elsewhere in ("http://", "https://", "src=", "@import"):
        assert elsewhere not in page.body.decode()
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_log_tells_of_requests_and_not_of_images(server, photograph):
    body, kind = form(("secret-name.png", photograph))
    answer = server.predict(body, content_type=kind)
    line = server.line(answer)
    assert (line["method"], line["path"], line["status"], line["images"]) == ("POST", "/predict", 200, 1)
    assert line["bytes"] == len(body)
    assert "secret-name" not in server.log.read_text()
