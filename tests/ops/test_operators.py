"""The operators vimamba::*: the same with and without the CPU library, and running where only that library is."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import vimamba
from tests.ops.test_neighbours import FLAGS, direction_weights, directions_of, rand
from tests.ops.test_selective_scan import make_inputs
from vimamba.ops import causal_conv1d, linear, mixer, operators, rms_norm
from vimamba.ops.blocks import traced_as_one
from vimamba.ops.cpu import library

built = pytest.mark.skipif(library.UNAVAILABLE is not None, reason=str(library.UNAVAILABLE))

SCHEMAS = """
import torch, vimamba
from vimamba.ops import backends
for name in ("selective_scan", "causal_conv1d", "rms_norm", "mixer"):
    for operator in (name, name + "_backward"):
        print(getattr(torch.ops.vimamba, operator).default._schema)
x = torch.ones(1, 1, 3)
print(vimamba.selective_scan(x, x, torch.zeros(1, 1), x, x).flatten().tolist())
print(backends.status()["cpu"])
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.slow
@built
def test_python_defines_what_the_library_would():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(SCHEMAS, {})
    *found, reason = printed.getvalue().splitlines()
    assert reason == "None"
    without = run(SCHEMAS, VIMAMBA_CPU_LIBRARY=os.devnull + "/none")
    assert found[-1] == "[1.0, 2.0, 3.0]"
    *wanted, reason = without.stdout.splitlines()
    assert "were not built" in reason, without.stderr
    assert found == wanted


@built
def test_another_versions_library_is_refused():
    operators.define("mixer", str(torch.ops.vimamba.mixer.default._schema).partition("mixer")[2])
    with pytest.raises(
        ImportError, match=r"_kernels.*defines vimamba::mixer\(.*needs vimamba::mixer\(Tensor x\).*again"
    ):
        operators.define("mixer", "(Tensor x) -> Tensor")


class Call(nn.Module):
    """A function of tensors as a module to export."""

    def __init__(self, function, *weights: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs: Tensor):
        return self.function(*inputs, *self.weights)


def programs() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Every operator with options other than the usual ones, and whole models."""
    torch.manual_seed(0)
    scan = make_inputs(groups=(1, 2), constant="B")
    narrow = make_inputs(dtype=torch.bfloat16, channels_last=False)
    weights = direction_weights(24, 16, 3, 2)
    gates = torch.tensor([[[0.25, 0.75]], [[0.0, 1.0]]])
    gated = vimamba.create_model("vim_nano", merge="gate", paths=["row", "column"])
    image = (torch.randn(2, 3, 28, 28),)

    def scan_of(inputs: dict[str, Tensor], **options):
        options |= dict(delta_softplus=True, return_last_state=True)
        return lambda *t: vimamba.selective_scan(**dict(zip(inputs, t, strict=True)), **options)

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        return causal_conv1d(x, weight, activation="silu", reverse=True)

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual, eps=0.1)

    def narrow_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, out_dtype=torch.bfloat16)

    return {
        "scan": (Call(scan_of(scan, reverse=True)), tuple(scan.values())),
        "narrow scan": (Call(scan_of(narrow)), tuple(narrow.values())),
        "convolution": (Call(convolution, rand(5, 4).float()), (rand(2, 5, 9).float(),)),
        "norm": (Call(norm, rand(8).float()), (rand(2, 3, 8).float(), rand(2, 3, 8, seed=1).float())),
        "narrow norm": (Call(narrow_norm, rand(8).float()), (rand(2, 3, 8).float(),)),
        "linear": (Call(linear, rand(80, 48).float(), rand(80).float()), (rand(40, 48).float(),)),
        "mixer": (
            Call(lambda xz, *w: mixer(xz, directions_of(w, FLAGS["ssm_conv"]), 0.5, gates, skip=True), *weights),
            (rand(2, 70, 48).float(),),
        ),
        "vim_nano": (vimamba.create_model("vim_nano"), image),
        "gated vim_nano": (gated, image),
        "vim_nano as one": (vimamba.create_model("vim_nano"), image),
        "linear as one": (Call(linear, rand(80, 48).float(), rand(80).float()), (rand(2, 20, 48).float(),)),
        "gated vim_nano as one": (gated, image),
        "vim_nano in bfloat16": (vimamba.create_model("vim_nano").bfloat16(), (image[0].bfloat16(),)),
    }  # fmt: skip


ELSEWHERE = """
import sys, torch
folder, library = sys.argv[1:]
torch.ops.load_library(library)
for name in open(f"{folder}/names").read().splitlines():
    inputs = torch.load(f"{folder}/{name}.in")
    with torch.no_grad():
        torch.save(torch.export.load(f"{folder}/{name}.pt2").module()(*inputs), f"{folder}/{name}.out")
assert not any(name.partition(".")[0] == "vimamba" for name in sys.modules)
"""


@pytest.mark.slow
@built
@torch.no_grad()
def test_exported_programs_run_with_the_library_and_none_of_our_python(tmp_path):
    wants = {}
    for name, (module, inputs) in programs().items():
        wants[name] = module.eval()(*inputs)
        with traced_as_one() if "as one" in name else contextlib.nullcontext():
            program = torch.export.export(module, inputs)
        operator = "vimamba.blocks" if name == "vim_nano as one" else "vimamba.linear"
        assert (operator in str(program.graph)) == ("as one" in name)
        assert name == "linear" or "torch.ops.vimamba." in str(program.graph)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        torch.save(inputs, tmp_path / f"{name}.in")
    (tmp_path / "names").write_text("\n".join(wants))
    done = run(ELSEWHERE, str(tmp_path), str(library.PATH))
    assert done.returncode == 0, done.stderr
    for name, want in wants.items():
        # But as one, exported graphs take PyTorch's linear layers, whose sums have another order.
        tolerance = dict(rtol=2e-2, atol=2e-2) if "bfloat16" in name else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), want, **tolerance)


@pytest.mark.slow
@built
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("torch.ops.vimamba.causal_conv1d(x.double(), w, None, True, False, '')", "take float32 and bfloat16"),
        ("torch.ops.vimamba.causal_conv1d(x, w, None, True, False, 'torch')", "have CPU kernels only"),
        ("torch.ops.vimamba.causal_conv1d(x.to('meta'), w, None, True, False, '')", "have CPU kernels only"),
    ],
)
def test_what_the_library_cannot_do_alone_is_said(call, message):
    script = "import sys, torch; torch.ops.load_library(sys.argv[1]); x, w = torch.ones(1, 2, 3), torch.ones(2, 4); "
    done = run(script + call, str(library.PATH))
    assert "vimamba: without `import vimamba`" in done.stderr
    assert message in done.stderr
