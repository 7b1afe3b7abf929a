"""The benchmark's own arithmetic, on tiny models; no test looks at how long anything takes."""

import dataclasses
import json
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vimamba.benchmark import Entry, machine, measure, memory, report
from vimamba.benchmark.entries import build, cost, step_of
from vimamba.benchmark.run import plan
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import alternate, quartiles, ratio
from vimamba.data.mnist import load_mnist
from vimamba.errors import UserError
from vimamba.export.check import compare

TINY = {"depth": 1, "embed_dim": 12}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEER = {"depth": 1, "embed_dim": 12, "num_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make tiny models slow on a machine that is in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(size: int = 28, **options) -> Entry:
    return Entry("vim_nano", size, model_args=TINY, **options)


def peer(size: int = 32, **options) -> Entry:
    return Entry("deit_tiny_patch16_224", size, model_args=PEER, **options)


def test_functions_run_in_turns_and_every_other_round_backwards():
    calls: list[str] = []
    times = alternate([lambda: calls.append("a"), lambda: calls.append("b")], repeats=4, seconds=1e9)
    assert "".join(calls) == "abbaabba"
    assert [len(t) for t in times] == [4, 4]


def test_rounds_end_with_the_time_but_there_are_three():
    now = iter(range(10_000))
    times = alternate([lambda: None], repeats=100, seconds=0, clock=lambda: float(next(now)))
    assert times == [[1.0, 1.0, 1.0]]


def test_in_a_block_the_first_two_runs_do_not_count():
    seconds = iter([50.0, 40.0, 1.0, 3.0, 2.0] * 3)
    now = 0.0

    def clock() -> float:
        return now

    def step() -> None:
        nonlocal now
        now += next(seconds)

    assert alternate([step], repeats=3, seconds=1e9, clock=clock, block=5) == [[2.0, 2.0, 2.0]]


def test_statistics():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    # A round disturbed for both leaves the ratio as it is.
    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize(("passes", "dtype"), [("forward", "float32"), ("train", "bfloat16")])
def test_every_combination_is_measured(passes, dtype):
    entries = [
        e for size in (32, 48) for e in (tiny(size, passes=passes, dtype=dtype), peer(size, passes=passes, dtype=dtype))
    ]
    results = measure(entries, repeats=3, seconds=0, with_memory=False)
    assert [(r.entry.model, r.entry.size) for r in results] == [(e.model, e.size) for e in entries]
    for result in results:
        assert result.error is None
        assert len(result.seconds) == 3
        assert result.median == statistics.median(result.seconds)
        assert result.images_per_second == result.entry.batch / result.median
    assert [r.relative for r in results if r.entry.model == "vim_nano"] == [1.0, 1.0]


def test_a_training_step_changes_the_weights_and_a_forward_pass_does_not():
    for passes in ("forward", "train"):
        entry = tiny(passes=passes)
        model = build(entry)
        before = [p.detach().clone() for p in model.parameters()]
        step_of(entry, model)()
        same = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert same == (passes == "forward")


def test_attention_is_fused_or_eager_as_asked_and_counted_either_way():
    for attention in ("fused", "eager"):
        model = build(peer(attention=attention))
        assert model.blocks[0].attn.fused_attn == (attention == "fused")
    fused, eager = (cost(peer(64, attention=attention)) for attention in ("fused", "eager"))
    assert fused == eager
    tokens, dim = 17, 12
    linear = 2 * (64 * 64 * 3 * dim + tokens * 12 * dim * dim + dim * 1000)
    assert fused.flops == linear + 4 * tokens * tokens * dim


def test_a_model_without_attention_is_measured_once():
    entries = [maker(32, attention=a) for a in ("fused", "eager") for maker in (tiny, peer)]
    assert [result.name for result in plan(entries)] == [
        "vim_nano",
        "deit_tiny_patch16_224 fused",
        "deit_tiny_patch16_224 eager",
    ]


def test_a_network_that_takes_any_size_needs_no_img_size():
    assert cost(Entry("resnet10t", 64)).flops > cost(Entry("resnet10t", 32)).flops


@pytest.mark.parametrize("megabytes", [64, 256])
def test_growth_is_the_memory_a_step_touches(megabytes):
    def step() -> None:
        torch.ones(megabytes * 2**18)

    assert memory.growth(step) == pytest.approx(megabytes * 2**20, rel=0.2)


def test_memory_is_measured_in_a_process_of_its_own():
    tokens_bytes = 8 * 128 * 128 * 12 * 4
    measured = memory.peak(tiny(512, batch=8))
    assert measured is not None
    assert tokens_bytes < measured < 50 * tokens_bytes


def test_a_step_that_breaks_off_says_why(capsys):
    entry = Entry("resnet10t", 32, passes="train")
    memory.main(json.dumps({"entry": dataclasses.asdict(entry), "threads": 1}))
    answer = json.loads(capsys.readouterr().out)
    assert answer["bytes"] is None
    assert "more than 1 value per channel" in answer["error"]


def test_running_out_of_memory_is_a_row_and_the_rest_goes_on(monkeypatch):
    def scarce(entry):
        if entry.model == "vim_nano":
            raise memory.StepError("out of memory")
        return 5_000_000

    monkeypatch.setattr(memory, "peak", scarce)
    failed, ran = measure([tiny(32), peer(32)], repeats=1, seconds=0)
    assert (failed.error, failed.seconds, failed.peak_bytes) == ("out of memory", [], None)
    assert (ran.error, ran.peak_bytes, ran.relative) == (None, 5_000_000, 1.0)
    (table,) = report.tables([failed, ran])
    assert table.row_count == 2


def test_an_allocation_that_cannot_be_is_named_as_such():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert memory.reason(caught.value) == "out of memory"


def test_the_json_file_and_the_plot_hold_every_row(tmp_path):
    results = measure(
        [maker(size) for size in (32, 48) for maker in (tiny, peer)], repeats=2, seconds=0, with_memory=False
    )
    report.write_json(tmp_path / "b.json", machine.describe("cpu"), results)
    content = json.loads((tmp_path / "b.json").read_text())
    assert content["schema"] == report.SCHEMA
    assert {"processor", "threads", "torch", "timm", "vimamba", "backend"} <= content["machine"].keys()
    assert len(content["results"]) == 4
    row = content["results"][0]
    assert row["images_per_s"] == pytest.approx(1 / row["median_s"])
    assert row["lower_quartile_s"] <= row["median_s"] <= row["upper_quartile_s"]
    assert (row["model"], row["model_args"], row["attention"], row["pass"]) == ("vim_nano", TINY, None, "forward")
    report.plot(tmp_path / "b.png", "a machine", results)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (Entry("vim_nanno", 28), "did you mean vim_nano"),
        (tiny(3), "smaller than one patch of 4×4"),
        (peer(8), "smaller than one patch of 16×16"),
        (Entry("vim_nano", 28, model_args={"bidirectional": "both"}), "bidirectional must be one of"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_sentence(entry, said):
    with pytest.raises(UserError, match=said) as caught:
        plan([entry])
    assert "\n" not in str(caught.value)


def test_timm_agrees_on_the_parameters():
    assert cost(Entry("resnet10t", 32)).parameters == sum(
        p.numel() for p in timm.create_model("resnet10t").parameters()
    )


class TestGpuScript:
    """benchmarks/gpu.py, as far as it goes without a GPU."""

    SCRIPT = BENCHMARKS / "gpu.py"

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.SCRIPT), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_without_a_gpu_it_says_so(self):
        done = self.run()
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "needs a GPU" in done.stderr

    @pytest.mark.slow
    def test_cases_are_added_to_earlier_ones(self, tmp_path):
        earlier = {"which": "nano", "name": "vim_nano", "mode": "eager", "pass": "forward", "batch": 1, "error": "none"}
        rows = [{**earlier, "size": size} for size in (32, 48)]
        (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
        options = "--device cpu --models nano --passes forward --modes eager --repeats 1 --sizes 32 --out"
        done = self.run(*options.split(), str(tmp_path))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["rows"][0] == rows[1]
        assert {(row["size"], row["batch"]) for row in found["rows"][1:]} == {(32, 1), (32, 2)}
        assert len(found["rows"]) == 9
        assert all(row["images_per_s"] > 0 for row in found["rows"][1:])
        assert max(found["errors"].values()) < 5e-3
        assert (tmp_path / "results.png").stat().st_size > 0

    @pytest.mark.slow
    def test_what_cannot_be_continued_is_left_alone(self, tmp_path):
        (tmp_path / "results.json").write_text("{")
        done = self.run("--device", "cpu", "--out", str(tmp_path))
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "cannot be continued" in done.stderr


@pytest.mark.slow
def test_formats_are_held_against_pytorch_and_timed(tmp_path):
    """benchmarks/runtimes.py: a file that ONNX Runtime runs in a process of its own, and a program."""
    script = BENCHMARKS / "runtimes.py"
    options = "--models nano --formats onnx pt2 --timed nano --seconds 0 --threads 1 --json"
    command = [sys.executable, str(script), *options.split(), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["model"], row["format"]) for row in rows] == [("nano", "onnx"), ("nano", "pt2")]
    for row in rows:
        assert row["error"] is None
        assert 0 <= row["difference"] <= row["at_most"] <= 1e-4
        assert row["times"] > 0
        assert f"nano, {row['format']}: {row['difference']:.1e}" in done.stdout


@pytest.mark.slow
def test_models_are_measured_beside_other_libraries_and_the_floor(tmp_path):
    """benchmarks/models.py: the rows of OpenVINO, of ONNX Runtime and of the least possible time."""
    options = ["--only", "224 px, float32", "--repeats", "1", "--seconds", "0", "--threads", "1", "--json"]
    command = [sys.executable, str(BENCHMARKS / "models.py"), *options, str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert [what.split(",")[0] for what in rows] == [
        "DeiT-Ti in OpenVINO",
        "DeiT-Ti in ONNX Runtime",
        "multiple of the floor",
    ]
    assert all(row["measured"] > 0 for row in rows.values()), rows


@pytest.mark.parametrize("name", ["models", "runtimes", "scan_torch", "serve", "dense", "large_image"])
def test_a_script_refuses_a_file_that_cannot_be_written_before_it_measures(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, "--json", str(tmp_path / "file" / "found.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(r"error: --json \S+: cannot be written \(\w[\w ]+\)", ended.value.code), ended.value.code
    assert capsys.readouterr().out == ""


def test_a_script_that_is_interrupted_says_so_and_returns_its_mains_status(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    for main, status, said in ((interrupted, 130, "\nstopped\n"), (lambda: 3, 3, ""), (lambda: None, None, "")):
        with pytest.raises(SystemExit) as ended:
            script(main)
        assert (ended.value.code, capsys.readouterr().err) == (status, said)


def test_a_format_that_is_refused_is_a_row_and_the_rest_goes_on(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import runtimes

    def export(source, path, samples, refused=False):
        if refused:
            raise UserError("the exported model differs")
        model = torch.nn.Sequential(source.model, torch.nn.Identity())
        images = runtimes.prepared(source, [samples.image(0)], False)
        return compare(model, source.model, [images], 1e-4)

    formats = {"refused": (export, {"refused": True}, 1e-4, None), "itself": (export, {}, 1e-4, None)}
    monkeypatch.setattr(runtimes, "FORMATS", formats)
    refused, kept = runtimes.rows_of("nano", [*formats], load_mnist()[1], None)
    assert (refused["difference"], refused["error"]) == (None, "the exported model differs")
    assert (kept["difference"], kept["error"], "times" in kept) == (0, None, False)
    assert ("refused" in runtimes._cell(refused), runtimes._said(refused)) == (True, "the exported model differs")


def test_models_of_the_list_can_be_built(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import runtimes

    for entry in runtimes.MODELS.values():
        timm.create_model(entry.model, img_size=entry.size, **entry.model_args)


def test_logits_are_as_large_as_a_trained_models(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import runtimes

    samples = load_mnist()[1]
    source = runtimes.weighted(runtimes.MODELS["nano"], samples, tmp_path)
    with torch.inference_mode():
        logits = source.model(runtimes.prepared(source, [samples.image(i) for i in range(4)], False))
    assert logits.std() == pytest.approx(runtimes.SPREAD, rel=1e-3)
