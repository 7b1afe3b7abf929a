"""timm's models in other inference libraries, OpenVINO and ONNX Runtime, each in a process of its own.

Their threads spin between calls and would slow down what runs beside them in one process. `Elsewhere` starts such a
process and runs the model there, once a call.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vimamba.benchmark.entries import DTYPES

PACKAGES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


class Elsewhere:
    """A model in another process: call it to run it once; leave the context to end it.

    Args:
        runtime: "openvino" or "onnxruntime".
        model: a name of timm.
        size, batch: of the images, random ones.
        dtype: "float32" or "bfloat16", in which OpenVINO computes; ONNX Runtime has float32 only on a CPU.
    """

    def __init__(self, runtime: str, model: str, size: int, batch: int = 1, dtype: str = "float32") -> None:
        settings = (runtime, model, size, batch, dtype, torch.get_num_threads())
        command = [sys.executable, __file__, *map(str, settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self()  # ready when it answers

    def __call__(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError(f"the process of {self.process.args[2]} ended with {self.process.wait()}")  # type: ignore[index]

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
        torch.onnx.export(model.eval(), (x,), path, dynamo=True, external_data=False, verbose=False)
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
    import onnxruntime

    if dtype != "float32":
        raise ValueError(f"ONNX Runtime computes in float32 on a CPU, not in {dtype}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x.numpy()})


def main() -> None:
    """Run the model once for each line on standard input, and answer each with a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=PACKAGES)
    parser.add_argument("model")
    parser.add_argument("size", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    model = timm.create_model(options.model, img_size=options.size)
    x = torch.randn(options.batch, 3, options.size, options.size)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        path = exported(model, x, folder)
        make = step_in_openvino if options.runtime == "openvino" else step_in_onnxruntime
        step = make(path, x, options.dtype, options.threads)
        for _ in sys.stdin:
            step()
            print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
