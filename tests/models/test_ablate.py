"""vimamba ablate: resumable, and a page from what it found."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("lightning")

from vimamba.cli import ablate, main
from vimamba.cli.ablate_page import write_page
from vimamba.tasks.ablation import DESIGNS, Run

RUN = Run("ssm_conv", 0, 0.003, 10, 0.5, 1000, 0.01, 1.0, 2.0, 3.0)


def test_finished_runs_are_read_back_and_a_cut_row_is_not(tmp_path):
    gated = dataclasses.replace(RUN, design="gate", skip_share=0.3, skip_top1=0.4, skip_forward_ms=0.8)
    for run in (RUN, gated):
        ablate.append_run(tmp_path, run)
    with (tmp_path / "runs.csv").open("a") as file:
        file.write("none,0,10")
    assert ablate.read_runs(tmp_path) == {("ssm_conv", 0, 0.003): RUN, ("gate", 0, 0.003): gated}


def test_a_finished_study_is_not_trained_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "run_design", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(ablate, "design_costs", lambda: {"ssm_conv": 1.0, "none": 0.75})
    folder = tmp_path / "ablate-mnist"
    for name in DESIGNS:
        for seed, top1 in enumerate((0.5, 0.7) if name == "none" else (0.8, 0.9)):
            ablate.append_run(folder, dataclasses.replace(RUN, design=name, seed=seed, top1=top1))
    page = tmp_path / "docs" / "designs.md"
    ablate.append_run(folder, dataclasses.replace(RUN, design="none", lr=0.01, top1=0.1))  # a worse learning rate
    options = ["--lr", "[0.003, 0.01]", "--designs", "[none]"]
    assert main(["ablate", "--seeds", "2", *options, "--output", str(folder), "--page", str(page)]) == 0
    assert "60.00" in capsys.readouterr().out
    text = page.read_text()
    assert "none is below ssm_conv (-25.00 points)" in text
    assert "| none | 0.75 |" in text
    assert "snake is not told apart from ssm_conv" in text
    assert all((page.parent / name).stat().st_size for name in ("paths.svg", "designs-mnist.png"))


def test_runs_of_another_version_are_refused(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("design,seed,top1\nnone,0,0.5\n")
    assert main(["ablate", "--output", str(tmp_path)]) == 2
    assert "another version" in capsys.readouterr().err


def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    assert main(["ablate", "--designs", "[snak]", "--output", str(tmp_path)]) == 2
    assert "did you mean snake" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no finished study"):
        write_page(tmp_path / "page.md", tmp_path, {})
