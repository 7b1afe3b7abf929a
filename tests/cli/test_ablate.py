"""vimamba ablate: resumable, and a page from what it found."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from vimamba.cli import ablate, main
from vimamba.cli.ablate_page import render, skipping_lines
from vimamba.tasks.ablation import DESIGNS, Trial
from vimamba.tasks.study import Findings, Row, Study, append_run, difference, read_runs, summarise

DOCS = Path(__file__).parents[2] / "docs"

RUN = Trial("ssm_conv", 0, 0.003, 10, 0.5, 1000, 0.01, 1.0, 2.0, 3.0)


def test_finished_runs_are_read_back_and_a_cut_row_is_not(tmp_path):
    gated = dataclasses.replace(RUN, design="gate", skip_share=0.3, skip_top1=0.4, skip_forward_ms=0.8)
    for run in (RUN, gated):
        append_run(tmp_path, run)
    with (tmp_path / "runs.csv").open("a") as file:
        file.write("none,0,10")
    assert read_runs(tmp_path) == {("ssm_conv", 0, 0.003): RUN, ("gate", 0, 0.003): gated}


def test_a_finished_study_is_not_trained_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "run_design", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(ablate, "design_costs", lambda: {"ssm_conv": 1.0, "none": 0.75})
    folder = tmp_path / "ablate-mnist"
    for name in DESIGNS:
        for seed, top1 in enumerate((0.5, 0.7) if name == "none" else (0.8, 0.9)):
            append_run(folder, dataclasses.replace(RUN, design=name, seed=seed, top1=top1))
    page = tmp_path / "docs" / "designs.md"
    append_run(folder, dataclasses.replace(RUN, design="none", lr=0.01, top1=0.1))  # a worse learning rate
    options = ["--lr", "[0.003, 0.01]", "--designs", "[none]"]
    assert main(["ablate", "--seeds", "2", *options, "--output", str(folder), "--page", str(page)]) == 0
    assert "60.00" in capsys.readouterr().out
    text = page.read_text()
    assert "none is below ssm_conv (-25.00 points)" in text
    assert "| none | 0.75 |" in text
    assert "snake is not told apart from ssm_conv" in text
    assert "ssm_conv against none: +25.0 points on mnist; 1.33 of the forward time." in text
    assert all((page.parent / name).stat().st_size for name in ("paths.svg", "designs-mnist.png"))
    assert "60.00" in (folder / "table.md").read_text()


def test_a_page_keeps_the_studies_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "design_costs", lambda: {"ssm_conv": 1.0})
    page, folder = tmp_path / "page.md", tmp_path / "of-mnist"
    for name in ("digits", "mnist"):
        shutil.copy(DOCS / "designs.json", page.with_suffix(".json"))
        for seed in range(2):
            append_run(folder, dataclasses.replace(RUN, seed=seed))
        options = ["--seeds", "2", "--lr", "[0.003]", "--designs", "[ssm_conv]", "--data", name]
        assert main(["ablate", *options, "--output", str(folder), "--page", str(page)]) == 0
        before, after = Findings.read(DOCS / "designs.json"), Findings.read(page.with_suffix(".json"))
        other = {"digits": "mnist", "mnist": "digits"}[name]
        assert after.studies[other] == before.studies[other]
        assert [row.design for row in after.studies[name].rows] == ["ssm_conv"]
        assert "conv stem" in page.read_text() if other == "mnist" else "conv stem" not in page.read_text()


def test_the_page_in_the_repository_is_what_its_numbers_make():
    page = DOCS / "designs.md"
    assert page.read_text(encoding="utf-8") == render(page, Findings.read(page.with_suffix(".json")))


def study(**top1: float) -> Study:
    rows = [Row(name, value, 0.01, 3, 0.003, 10, 1000, 0.01, 1.0, 2.0) for name, value in top1.items()]
    return Study("vim_nano", {}, 32, "steps", 2, [0.003], rows)


def test_sentences_follow_the_numbers(tmp_path):
    """The same page from other numbers says the contrary."""
    for none, points in ((0.9, "+10.0"), (0.7, "-10.0"), (0.79, "-1.0")):
        findings = Findings({"none": 0.5, "ssm_conv": 1.0}, {"mnist": study(none=none, ssm_conv=0.8)})
        text = render(tmp_path / "page.md", findings)
        verdict = {"+10.0": "above", "-10.0": "below", "-1.0": "not told apart from"}[points]
        assert f"none is {verdict} ssm_conv ({points}0 points)" in text
        against = f"ssm_conv against none: {100 * (0.8 - none):+.1f} points on mnist"
        assert f"{against}{', not told apart' if points == '-1.0' else ''}; 2.00 of the forward time." in text
        assert ("Worth most above ssm_conv: none on mnist (+10.0 points)." in text) == (points == "+10.0")


def test_single_runs_claim_no_order(tmp_path):
    one = study(none=0.1, ssm_conv=0.9)
    for row in one.rows:
        row.runs = 1
    text = render(tmp_path / "page.md", Findings({}, {"mnist": one}))
    assert "no order is claimed" in text
    assert "against none" not in text
    assert difference(one.rows[1], one.rows[0])[1] is False


def test_skipping_is_the_mean_of_the_runs_and_its_quickest_time():
    runs = [
        dataclasses.replace(
            RUN, design="gate", seed=seed, skip_share=0.3, skip_top1=0.5 + seed / 10, skip_forward_ms=ms
        )
        for seed, ms in enumerate((0.9, 0.8))
    ]
    assert skipping_lines(dataclasses.replace(study(), rows=summarise(runs))) == [
        "gate: skipping 30% of the directions changes top-1 by +5.00 points and forward time by -20%."
    ]


def test_runs_of_another_version_are_refused(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("design,seed,top1\nnone,0,0.5\n")
    assert main(["ablate", "--output", str(tmp_path)]) == 2
    assert "another version" in capsys.readouterr().err


def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys):
    assert main(["ablate", "--designs", "[snak]", "--output", str(tmp_path)]) == 2
    assert "did you mean snake" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"costs": {}}', '{"costs": {}, "studies": {"mnist": {"rows": [{}]}}}'])
def test_another_json_file_beside_the_page_is_left_alone(tmp_path, capsys, text):
    (tmp_path / "page.json").write_text(text)
    assert main(["ablate", "--page", str(tmp_path / "page.md")]) == 2
    assert "page.json: holds no studies of this version" in capsys.readouterr().err
    assert (tmp_path / "page.json").read_text() == text
