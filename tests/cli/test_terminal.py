"""What people see: bars in a terminal, lines where there is none, option names with their dashes."""

import io

import pytest
from rich.console import Console
from rich.progress import TextColumn

from tests.cli.runs import train_arguments
from vimamba.cli import terminal
from vimamba.cli.spelling import dashed


def progress(is_terminal):
    """A bar over five things, and what was written of it."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=120)
    bar = terminal.progress_bar(console, TextColumn("loss {task.fields[loss]}"))
    with bar:
        task = bar.add_task("counting", total=5, loss="0.5")
        for _ in range(5):
            bar.advance(task)
    return out.getvalue()


def test_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    lines = progress(is_terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"counting: {n} of 5 ({20 * n} %)" for n in range(1, 6)]
    assert all(line.endswith(("gone", "left")) for line in lines)
    assert "left" in lines[-2]


def test_no_line_before_its_time():
    assert progress(is_terminal=False) == ""


def test_a_bar_in_a_terminal():
    assert "counting" in progress(is_terminal=True)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1:00"), (185, "3:05"), (7384, "2:03:04")]
)
def test_durations(seconds, said):
    assert terminal.duration(seconds) == said


def test_training_into_a_file_says_how_far_it_is(vimamba, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    status, out, _ = vimamba(*train_arguments(photos, tmp_path / "run"))
    assert status == 0
    assert "epoch 2/2: " in out
    assert " s left" in out


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("`epochs` is 0", "--epochs is 0"),
        ("`model_args.depth`: no; give `img_size`", "--model_args.depth: no; give --img_size"),
        ("`vimamba models` lists them", "`vimamba models` lists them"),
        ("`Upper` and `9x` and `` and `a", "`Upper` and `9x` and `` and `a"),
    ],
)
def test_arguments_are_spelt_as_options(message, typed):
    assert dashed(message) == typed
