"""The operators vimamba::*: the same with and without the CPU library, and running where only that library is."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vimamba
from tests.ops.test_neighbours import FLAGS, direction_weights, directions_of, rand
from tests.ops.test_selective_scan import make_inputs
from vimamba.ops import causal_conv1d, linear, mixer, operators, rms_norm
from vimamba.ops.blocks import traced_as_one
from vimamba.ops.cpu import library
from vimamba.ops.direction import WEIGHTS, Direction

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


def differentiable() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every operator with a gradient: optional tensors given and left out, one output of several, tensors in a list."""
    scan = make_inputs(groups=(1, 2), constant="B")
    weights = direction_weights(24, 16, 3, 2)
    ways = [f"{i}.{field}" for i in range(2) for field in Direction._fields[:WEIGHTS]]

    def mixed(xz: Tensor, **w: Tensor) -> Tensor:
        return mixer(xz, directions_of(list(w.values()), FLAGS["ssm_conv"]), 0.5, backend="cpu")

    return {
        "scan": (functools.partial(vimamba.selective_scan, delta_softplus=True, backend="cpu"), scan),
        "scan of less": (
            functools.partial(vimamba.selective_scan, return_last_state=True, reverse=True, backend="cpu"),
            {name: scan[name] for name in ["u", "delta", "A", "B", "C"]},
        ),
        "convolution": (
            functools.partial(causal_conv1d, activation="silu", backend="cpu"),
            {"x": rand(2, 5, 9).float(), "weight": rand(5, 4).float(), "bias": rand(5).float()},
        ),
        "convolution without a bias": (
            functools.partial(causal_conv1d, reverse=True, backend="cpu"),
            {"x": rand(2, 5, 9).float(), "weight": rand(5, 4).float()},
        ),
        "norm": (
            functools.partial(rms_norm, backend="cpu"),
            {"x": rand(2, 8).float(), "weight": rand(8).float(), "residual": rand(2, 8, seed=1).float()},
        ),
        "norm in bfloat16": (
            functools.partial(rms_norm, backend="cpu"),
            {"x": rand(2, 8).bfloat16(), "weight": rand(8).float()},
        ),
        "mixer": (mixed, {"xz": rand(2, 70, 48).float(), **dict(zip(ways, weights, strict=True))}),
    }  # fmt: skip


@built
@pytest.mark.parametrize("name", differentiable())
def test_autograd_alone_finds_what_it_finds_through_the_operator(name):
    """What records an operator where nothing else looks, against the registered one, which a mode sees."""
    function, inputs = differentiable()[name]

    def gradients(frozen: str, mode: contextlib.AbstractContextManager[Any]) -> tuple[Any, list[Tensor]]:
        leaves = {key: t.detach().clone().requires_grad_(key != frozen) for key, t in inputs.items()}
        given = {key: t * 1 for key, t in leaves.items()}  # results, as a model's are, not leaves
        with mode:
            out = function(**given)
            first = out if isinstance(out, Tensor) else out[0]
            wanted = [t for t in leaves.values() if t.requires_grad]
            found = torch.autograd.grad(first, wanted, torch.ones_like(first), retain_graph=True, create_graph=True)
        return first, list(found)

    for frozen in ("", *list(inputs)[:2]):
        out, found = gradients(frozen, contextlib.nullcontext())
        assert type(out.grad_fn).__name__ == "_RecordedBackward"
        registered, wanted = gradients(frozen, FlopCounterMode(display=False))
        assert type(registered.grad_fn).__name__ != "_RecordedBackward"
        assert torch.equal(out, registered)
        assert len(found) == len(wanted) == len(inputs) - bool(frozen)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="_backward has no derivative: vimamba's ops have first derivatives only"):
        found[0].sum().backward()


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
