"""Models out of PyTorch: how far from its logits, and how long beside it: `python benchmarks/runtimes.py` (see --help).

Each model of the list has its whole depth, weights that tell channels and directions apart, and logits as large as
trained models' are. Each format is what `vimamba export` writes of it, held against PyTorch as the command does, on
scenes of photographs and digits. Times are taken in turns with PyTorch's, in blocks of seven runs, see
`benchmarks/models.py`, which measures timm's models in OpenVINO and ONNX Runtime beside ours by `Elsewhere`.

Those two run in processes of their own: their threads spin between calls and would slow down what runs beside them in
one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from vimamba import onnx_library
from vimamba.benchmark import Entry, machine, report
from vimamba.benchmark.entries import build, images, step_of
from vimamba.benchmark.script import script
from vimamba.benchmark.timing import BLOCK, alternate, quartiles, ratios
from vimamba.data.samples import Samples
from vimamba.data.scenes import open_scenes
from vimamba.errors import UserError
from vimamba.export import export_aoti, export_onnx, export_pt2, load_source
from vimamba.export.check import prepared
from vimamba.export.onnx import session
from vimamba.ops.cpu import library

PACKAGES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}

OF_ONNX, OF_PROGRAMS = 1e-4, 1e-5
FORMATS: dict[str, tuple[Callable[..., Any], dict[str, Any], float, float | None]] = {
    "onnx": (export_onnx, {}, OF_ONNX, 6.0),
    "microsoft": (export_onnx, {"operator": "microsoft"}, OF_ONNX, None),
    "vimamba": (export_onnx, {"operator": "vimamba"}, OF_ONNX, 1.15),
    "portable": (export_onnx, {"portable": True}, OF_ONNX, None),
    "pt2": (export_pt2, {}, OF_PROGRAMS, None),
    "aoti": (export_aoti, {}, OF_PROGRAMS, 1.0),
}
"""What writes each, its arguments, and the most there may be: of the difference, and of PyTorch's times, of `TIMED`."""


def vim_tiny(**args: Any) -> Entry:
    return Entry("vim_tiny_patch16_224", 224, model_args=args)


TIMED = "224"
MODELS = {
    TIMED: vim_tiny(),
    "512": Entry("vim_tiny_patch16_224", 512),
    "stride8": Entry("vim_tiny_patch16_stride8_224", 224),
    "pyramid": Entry("vim_pyramid_tiny", 224),
    "gate": vim_tiny(merge="gate"),
    "token-gate": vim_tiny(merge="gate", gate="token", paths=["row", "column"]),
    "none": vim_tiny(bidirectional="none"),
    "layer": vim_tiny(bidirectional="layer"),
    "ssm": vim_tiny(bidirectional="ssm"),
    "every2nd": vim_tiny(bidirectional="every 2nd"),
    "alternate": vim_tiny(bidirectional="none", alternate=True, pooled_token=True),
    "sum": vim_tiny(merge="sum"),
    "head": vim_tiny(class_token="head"),
    "double": vim_tiny(class_token="double"),
    "no-token": vim_tiny(class_token="none"),
    "column": vim_tiny(paths=["row", "column"]),
    "snake": vim_tiny(paths=["snake", "column"], path_weights="shared"),
    "window": vim_tiny(paths=["row:forward", "window7:backward"]),
    "nano": Entry("vim_nano", 28),
}
"""By the names of `--models`; every one but "nano" is a Vim-Ti, or as large."""
NOISE, SPREAD = 0.05, 2.0  # added to every weight; of the logits


def weighted(entry: Entry, samples: Samples, folder: Path) -> Any:
    """The entry's model as it is exported: a name, and a checkpoint in the folder."""
    model: Any = build(entry).eval()
    draw = torch.Generator().manual_seed(0)
    args = {**entry.model_args, "img_size": entry.size}
    file = folder / "weights.safetensors"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=draw)
        save_file(model.state_dict(), file)
        source = load_source(entry.model, file, args).sized(entry.size)
        batch = prepared(source, [samples.image(i) for i in range(4)], False)
        times = SPREAD / model(batch).std()
        for parameter in model.get_classifier().parameters():
            parameter *= times
    save_file(model.state_dict(), file)
    return load_source(entry.model, file, args).sized(entry.size)


def beside_pytorch(entry: Entry, model: nn.Module, kind: str, path: Path, seconds: float) -> dict[str, float]:
    """Seconds of a file for one image, PyTorch's, and by the rounds' quotients how many times as long it takes."""
    ours = step_of(entry, model)
    with contextlib.ExitStack() as open_processes:
        if FORMATS[kind][0] is export_onnx:
            theirs: Callable[[], Any] = open_processes.enter_context(Elsewhere("onnxruntime", str(path), entry.size))
        else:
            load = torch._inductor.aoti_load_package if kind == "aoti" else torch.export.load
            loaded: Any = load(str(path))
            run, x = loaded if kind == "aoti" else loaded.module(), images(entry)

            def theirs() -> None:
                with torch.inference_mode():
                    run(x)

        for warm_up in (ours, theirs):
            warm_up()
        of_pytorch, of_file = alternate([ours, theirs], 30, seconds, block=BLOCK)
    low, times, high = ratios(of_file, of_pytorch)
    return {
        "seconds": quartiles(of_file)[1], "seconds_of_pytorch": quartiles(of_pytorch)[1],
        "times": times, "lower_quartile": low, "upper_quartile": high,
    }  # fmt: skip


def rows_of(name: str, kinds: list[str], samples: Samples, seconds: float | None) -> Iterator[dict[str, Any]]:
    """What is found of a model in each format; its times too, unless `seconds` is None."""
    entry = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        source = weighted(entry, samples, Path(folder))
        for kind in kinds:
            export, args, least, _ = FORMATS[kind]
            row: dict[str, Any] = {"model": name, "format": kind, "difference": None, "at_most": least, "error": None}
            path = Path(folder) / ("model.onnx" if export is export_onnx else "model.pt2")
            try:
                row["difference"] = export(source, path, samples=samples, **args).difference
                if seconds is not None:
                    row |= beside_pytorch(entry, source.model, kind, path, seconds)
            except UserError as error:
                row["error"] = str(error)
            yield row


def main() -> None:
    """Export and compare, print the table, write the JSON file; or answer as the process of an `Elsewhere`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = dict(choices=MODELS, metavar="NAME")
    parser.add_argument("--models", nargs="+", default=[*MODELS], **names, help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS], help="of each model")
    parser.add_argument("--timed", nargs="*", default=[TIMED], **names, help="those whose times are taken too")
    parser.add_argument("--seconds", type=float, default=20, help="time for the rounds of a format that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's own choice by default")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark-runtimes.json"), help="file to write")
    parser.add_argument("--answer", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return answer(*options.answer)
    torch.set_num_threads(options.threads)
    report.check_writable(options.json, "--json", parents=True)
    facts, samples, rows = machine.describe("cpu"), open_scenes("scenes-seg").val, []
    console = Console(highlight=False, width=200)
    console.print(machine.heading(facts) + "\n", markup=False)
    table = Table("model", *options.formats, box=None, pad_edge=False, header_style="bold")
    for name in options.models:
        cells = []
        for row in rows_of(name, options.formats, samples, options.seconds if name in options.timed else None):
            rows.append(row)
            cells.append(_cell(row))
            console.print(f"{name}, {row['format']}: {_said(row)}", markup=False)
            options.json.write_text(json.dumps({"schema": 1, "machine": facts, "rows": rows}, indent=1) + "\n")
        table.add_row(name, *cells)
    console.print("\nlargest difference of logits from PyTorch's")
    console.print(table)
    console.print(f"\nmeasurements: {options.json}", markup=False)


def _cell(row: dict[str, Any]) -> str:
    return "[red]refused[/]" if row["difference"] is None else f"[green]{row['difference']:.1e}[/]"


def _said(row: dict[str, Any]) -> str:
    found = row["error"] or f"{row['difference']:.1e} (at most {row['at_most']:.0e})"
    if "times" not in row:
        return found
    bound = FORMATS[row["format"]][3] if row["model"] == TIMED else None
    return (
        f"{found}; {1000 * row['seconds']:.0f} ms, {row['times']:.2f} times PyTorch's "
        f"{1000 * row['seconds_of_pytorch']:.0f} (quartiles {row['lower_quartile']:.2f} and "
        f"{row['upper_quartile']:.2f})" + ("" if bound is None else f", at most {bound:g}")
    )


class Elsewhere:
    """A model in another process: call it to run it once; leave the context to end it.

    Args:
        runtime: "openvino" or "onnxruntime".
        model: a name of timm, or an ONNX file.
        size, batch: of the images, random ones.
        dtype: "float32" or "bfloat16", in which OpenVINO computes; ONNX Runtime has float32 only on a CPU.
    """

    def __init__(self, runtime: str, model: str, size: int, batch: int = 1, dtype: str = "float32") -> None:
        settings = (runtime, model, size, batch, dtype, torch.get_num_threads())
        command = [sys.executable, __file__, "--answer", *map(str, settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self()  # ready when it answers

    def __call__(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError(f"the process of {self.process.args[3]} ended with {self.process.wait()}")  # type: ignore[index]

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def missing(runtime: str) -> str | None:
    """A sentence if the runtime, or what models reach it by, is not installed."""
    lacking = [package for package in (runtime, "onnx", "onnxscript") if find_spec(package) is None]
    return f"not measured: {PACKAGES[runtime]} needs pip install {' '.join(lacking)}" if lacking else None


def exported(model: nn.Module, x: Tensor, folder: str) -> Path:
    """The model as an ONNX file."""
    path = Path(folder) / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model.eval(), (x,), path, dynamo=True, external_data=False, verbose=False, input_names=["images"]
        )
    return path


def step_in_openvino(path: Path, x: Tensor, dtype: str, threads: int) -> Callable[[], object]:
    """A function that runs the file once in OpenVINO."""
    import openvino

    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda: request.infer([x.numpy()])


def step_in_onnxruntime(path: Path, x: Tensor, dtype: str, threads: int) -> Callable[[], object]:
    """A function that runs the file once in ONNX Runtime."""
    if dtype != "float32":
        raise ValueError(f"ONNX Runtime computes in float32 on a CPU, not in {dtype}")
    torch.set_num_threads(threads)  # of which a session has as many
    run = session(path, onnx_library() if library.ONNX_PATH.exists() else None)
    return lambda: run(x)


def answer(runtime: str, model: str, size: str, batch: str, dtype: str, threads: str) -> None:
    """Run the model once for each line on standard input, and answer each with a line."""
    x = torch.randn(int(batch), 3, int(size), int(size))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        path = Path(model)
        if path.suffix != ".onnx":
            path = exported(timm.create_model(model, img_size=int(size)), x, folder)
        make = step_in_openvino if runtime == "openvino" else step_in_onnxruntime
        step = make(path, x, dtype, int(threads))
        for _ in sys.stdin:
            step()
            print("done", file=answers, flush=True)


if __name__ == "__main__":
    script(main)
