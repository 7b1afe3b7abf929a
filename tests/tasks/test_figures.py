"""Pictures with names that people have."""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache

import matplotlib
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from vimamba.cli import ablate_page
from vimamba.tasks import figures
from vimamba.tasks.figures import _drawable, save_confusion, save_curves
from vimamba.tasks.record import Record

LONG = "a name that goes on and on, and on, " * 9
NAMES = {
    "mathematics": ["$x_2$", "$", "50 $ or 60 $"],
    "long": [LONG, LONG + "!"],
    "other scripts": ["猫", "שלום", "قطة", "кошка", "🐈"],
    "not characters": ["", "\udcff", "a\tb\nc", "\x1b[31m"],
    "many": [f"class {i}" for i in range(60)],
    "very many": [f"class {i}" for i in range(1000)],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_confusion_matrix_is_drawn_whatever_the_names(names, tmp_path):
    confusion = torch.eye(len(names), dtype=torch.int64) * 9
    confusion[0, -1] = 5
    save_confusion(tmp_path / "confusion.png", confusion, names, f"vim_nano on {names[0]}: 97.1%")
    picture = Image.open(tmp_path / "confusion.png")
    assert max(picture.size) < 4000  # pixels: a name does not make it any larger
    assert len(picture.convert("RGB").getcolors(10**6)) > 9


def test_nothing_confused_and_no_images(tmp_path):
    save_confusion(tmp_path / "a.png", torch.zeros(100, 100, dtype=torch.int64), [str(i) for i in range(100)], "")
    assert (tmp_path / "a.png").stat().st_size


def test_curves_of_one_epoch_with_a_name_of_mathematics(tmp_path):
    record = Record()
    record.add({"epoch": 1, "train_loss": 1.0, "val_loss": 2.0, "val_top1": 0.5}, [], "val_top1", "max")
    save_curves(tmp_path / "curves.png", record, r"vim_nano on $\frac{1}$ 猫", "top-1 %")
    assert (tmp_path / "curves.png").stat().st_size


def test_what_no_font_has_is_written_as_its_number():
    (dollar, tab, surrogate, beyond), _ = _drawable(["a $ b", "\t", "\udcff", "\U0010ffff9"])
    assert (dollar, tab, surrogate, beyond) == (r"a \$ b", r"\u0009", r"\udcff", r"\U0010ffff9")


def drawn_of_fonts(monkeypatch, listed):
    """How 猫 is drawn where matplotlib's list of fonts is this, and which fonts it knows after."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    figures._unlisted_fonts.cache_clear()
    figures._characters.cache_clear()
    (drawn,), families = _drawable(["猫"])
    return drawn, families


@pytest.fixture
def fonts():
    """The fonts that have no 猫, and one that says it has."""
    plain = [font for font in font_manager.fontManager.ttflist if "猫" not in figures._characters(font.fname)]
    sans = next(font for font in plain if font.name == "DejaVu Sans")
    return plain, dataclasses.replace(sans, fname="/fonts/cats.ttf", name="Cats")


def test_a_font_that_came_after_matplotlibs_list_is_found(fonts, monkeypatch):
    plain, cats = fonts
    characters = figures._characters.__wrapped__
    monkeypatch.setattr(figures, "_characters", cache(lambda file: {"猫"} if file == cats.fname else characters(file)))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/fonts/damaged.ttf", cats.fname])

    def add(file):
        if file != cats.fname:
            raise RuntimeError("no font")
        font_manager.fontManager.ttflist.append(cats)

    monkeypatch.setattr(font_manager.fontManager, "addfont", add)
    drawn, families = drawn_of_fonts(monkeypatch, [*plain])
    assert (drawn, families) == ("猫", ["DejaVu Sans", "Cats"])


def test_a_font_that_is_gone_from_matplotlibs_list_is_passed_over(fonts, monkeypatch):
    plain, cats = fonts
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    drawn, families = drawn_of_fonts(monkeypatch, [cats, *plain])
    assert (drawn, families) == (r"\u732b", ["DejaVu Sans"])


def test_labels_of_designs_that_are_worth_the_same_do_not_collide():
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    at = [(1.0, 1.0), (1.0, 1.0), (1.0, 1.001), (1.01, 1.0), (2.0, 2.0)]
    labels = [axes.annotate("design", place, (5, 4), textcoords="offset points") for place in at]
    axes.plot(*zip(*at, strict=True), "o")
    ablate_page._spread(figure, labels)
    boxes = [label.get_window_extent() for label in labels]
    assert [boxes[i].count_overlaps(boxes[:i]) for i in range(len(boxes))] == [0] * len(boxes)
    assert labels[-1].xyann == (5, 4)  # alone: it stays


@pytest.mark.parametrize("module", [figures, ablate_page])
def test_the_backend_stays_the_users(module):
    before = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        importlib.reload(module)
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
