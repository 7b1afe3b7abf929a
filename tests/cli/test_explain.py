"""vimamba explain: what it leaves, and what it says of bad input."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from tests.cli.runs import write_photos
from vimamba.inference.explain import report


def test_it_leaves_overlays_a_sheet_a_page_and_numbers(vimamba, trained, photos, tmp_path):
    given = sorted((photos / "val" / "red").glob("*.png"))[:2]
    output = tmp_path / "out"
    status, out, err = vimamba("explain", trained, *given, "--compare", "test_resnet", "--output", output)
    assert status == 0, err
    assert "red" in out
    names = {path.name for path in output.iterdir()}
    pictures = {"000-0-attribution.png", "001-1-token-norms.png", "receptive-field-before-training-backward.png"}
    assert {"report.html", "sheet.png", "explain.npz"} | pictures <= names
    page = (output / "report.html").read_text()
    # Of each image itself, three maps, norms and colours; of fields two of three, and the other model's.
    assert len(re.findall('src="data:image/png;base64,', page)) == 2 * 6 + 2 * 3 + 1
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "deletion" in page
    assert "test_resnet, untrained, both ways" in page
    assert "row forward" in page
    with np.load(output / "explain.npz") as numbers:
        assert numbers["1/attention"].shape == numbers["1/token_norms"].shape
        assert numbers["0/random deletion"].shape == numbers["0/attribution insertion"].shape
        assert numbers["0/directions 0"].sum() == pytest.approx(1)
        fields = [numbers[name] for name in numbers.files if name.startswith("receptive_field/")]
        assert len(fields) == 7
        assert all((field >= 0).all() and field.max() > 0 for field in fields)


def test_a_class_is_asked_about_and_curves_are_left_out(vimamba, trained, photos, tmp_path):
    arguments = ("explain", trained, photos / "val" / "red" / "0.png", "--method", "attribution", "--curves", "false")
    status, out, _ = vimamba(*arguments, "--target", "blue", "--output", tmp_path / "blue")
    assert status == 0
    assert "blue" in out
    assert "insertion" not in (tmp_path / "blue" / "report.html").read_text()
    status, _, err = vimamba(*arguments, "--target", "bleu", "--output", tmp_path / "none")
    assert status == 2
    assert "--target bleu: the run knows no such class; did you mean blue?" in err


def test_bad_images_and_runs_are_said(vimamba, trained, segmented, tmp_path):
    good = write_photos(tmp_path / "more") / "val" / "red" / "0.png"
    (tmp_path / "bad.png").write_bytes(b"no image")
    status, _, err = vimamba("explain", trained, tmp_path / "bad.png", good, "--output", tmp_path / "out")
    assert status == 1
    assert "1 of 2 images could not be read" in err
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "own").mkdir()
    for command in ("explain", "predict"):
        for output in (tmp_path / "new" / "deep", tmp_path / "own"):
            assert vimamba(command, trained, tmp_path / "bad.png", "--output", output)[0] == 1
    assert not (tmp_path / "new").exists()  # nothing was found to write
    assert not list((tmp_path / "own").iterdir())
    status, _, err = vimamba("explain", segmented, good, "--output", tmp_path / "out")
    assert status == 2
    assert "does not classify" in err
    assert err.count("\n") == 1


def test_a_model_to_compare_that_does_not_take_the_images_is_said_first(vimamba, trained, photos, tmp_path):
    image = photos / "val" / "red" / "0.png"
    status, out, err = vimamba(
        "explain", trained, image, "--compare", "vit_small_patch32_224", "--output", tmp_path / "out"
    )
    assert status == 2
    assert "--compare vit_small_patch32_224: takes no images of 16 × 16 pixels (" in err
    assert not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["", "$x_2$", "\u732b\u306e\u5199\u771f", "<script>alert(1)</script>", "long " * 60])
def test_any_class_name_stands_in_the_page_as_it_is(label):
    picture = Image.new("L", (28, 28))
    page = report.page("run", [report.Explained("a<b.png", label, 0.5, picture, {}, {})], [], {})
    assert "<script>" not in page
    assert "a&lt;b.png" in page
    assert (label or "(no name)") in page or "&lt;script&gt;" in page


def test_the_columns_of_a_sheet_stand_under_their_headings_whatever_the_sizes():
    def plain(width, colour):
        return Image.new("RGB", (width, 50), colour)

    rows = [
        ("a.png: $x_2$", {"image": plain(90, "lime"), "rollout": plain(200, "blue")}),
        ("b.png: \u732b", {"image": plain(300, "lime"), "rollout": plain(40, "blue")}),
        ("receptive field", {"forward": plain(90, "lime")}),
    ]
    sheet = np.asarray(report.contact_sheet(rows)).astype(int)
    lime, blue, ink = ((sheet == colour).all(-1) for colour in ([0, 255, 0], [0, 0, 255], [0, 0, 0]))
    assert (lime.sum(), blue.sum()) == (50 * (90 + 300 + 90), 50 * (200 + 40))  # nothing hides another
    second = blue.any(0).argmax()
    assert all(blue[row].argmax() == second for row in np.flatnonzero(blue.any(1)))
    headed = np.flatnonzero(ink.any(1))
    assert headed[0] < lime.any(1).argmax()
    assert ink[:, second : second + 60].any()  # "rollout" over its column
    assert headed[-1] > np.flatnonzero(blue.any(1))[-1]  # other columns have headings of their own


def test_names_of_every_script_keep_the_order_of_a_sheets_titles(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "text_picture", lambda text, *_: drawn.append(text) or Image.new("RGB", (9, 9)))
    picture = Image.new("RGB", (28, 28))
    found = [report.Explained("new/\u05d7\u05ea\u05d5\u05dc.png", "\u0642\u0637\u0629", 0.5, picture, {}, {})]
    report.sheet_of(found, {})
    heading, title = drawn
    assert heading == "image"
    # With a mark on both its sides, a name that is read from the right moves nothing else.
    assert title == "\u200e\u05d7\u05ea\u05d5\u05dc.png\u200e: \u200e\u0642\u0637\u0629\u200e, 50.0%"


def test_gates_stand_beside_the_shares_of_their_directions():
    layers = [("0", {"row forward": 1.0}, {}), ("1", {"row forward": 0.75, "row backward": 0.25}, {"row forward": 0.6})]
    page = report.page("run", [], layers, {})
    assert "<td>0</td><td>100.0%</td><td></td>" in page
    assert "<td>75.0% (gate 0.60)</td><td>25.0%</td>" in page


def test_a_logarithmic_map_shows_four_decades():
    shades = np.asarray(report.logarithmic(np.array([[1.0, 0.1], [1e-4, 0.0]]))).astype(int).sum(-1)
    corners = shades[0, 0], shades[0, -1], shades[-1, 0], shades[-1, -1]
    assert corners[0] > corners[1] > corners[2] == corners[3]


def test_a_map_of_nothing_leaves_the_image_as_it_is():
    picture = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28))
    for nothing in (np.zeros((7, 7)), -np.ones((7, 7)), np.full((7, 7), np.nan)):
        np.testing.assert_array_equal(
            np.asarray(report.overlay(picture, nothing)), np.asarray(report.enlarged(picture))
        )
