"""Backends from outside: what one must have, what it may have, and how it is chosen."""

from __future__ import annotations

import pytest
import torch

import vimamba
from tests.ops.test_neighbours import FLAGS, direction_weights, directions_of, rand
from tests.ops.test_selective_scan import check, make_inputs
from vimamba.errors import UserError
from vimamba.ops import backends, mixer, reference, rms_norm
from vimamba.ops.backends import Backend
from vimamba.ops.pytorch import PyTorch


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """The backends that a test registers are gone after it."""
    monkeypatch.setattr(backends, "_known", dict(backends._known))
    monkeypatch.setattr(backends, "FASTEST", dict(backends.FASTEST))
    yield
    backends._fastest.cache_clear()


class Mine(Backend):
    """The three functions that a backend must have, in ordinary PyTorch; counts its scans."""

    name = "mine"
    differentiable = True

    def __init__(self) -> None:
        self.scans = 0

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
        self.scans += 1
        out, last = reference.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, reverse=reverse
        )  # fmt: skip
        return out, last, A.new_empty(0)

    def conv_forward(self, x, weight, bias, silu, reverse):
        return reference.causal_conv1d(x, weight, bias, "silu" if silu else None, reverse=reverse)

    def norm_forward(self, x, residual, weight, eps, out_dtype):
        total = x if residual is None else x + residual
        rstd = torch.rsqrt(total.square().mean(-1) + eps)
        return (total * rstd[..., None] * weight).to(out_dtype), total, rstd


class ValuesOnly(Mine):
    """The same as kernels: nothing of theirs can be differentiated."""

    name = "values"
    differentiable = False


class Recomputing(PyTorch):
    """A backend that saves no states, and computes them again in its backward pass."""

    name = "recomputing"

    def saved_states(self, length: int) -> int:
        return 0

    def scan_forward(self, u, delta, A, *rest):
        *inputs, save_states = rest
        out, last, _ = PyTorch.scan_forward(u, delta, A, *inputs, False)
        return out, last, A.new_empty((len(u), 0, *A.shape) if save_states else 0)

    def scan_backward(self, dout, dlast, *rest):
        *inputs, _, softplus, reverse = rest
        states = PyTorch.scan_forward(*inputs, softplus, reverse, True)[2]
        return PyTorch.scan_backward(dout, dlast, *inputs, states, softplus, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_three_functions_make_a_backend(reverse):
    mine = Mine()
    backends.register(mine)
    assert backends.status()["mine"] is None
    check(make_inputs(length=9), "mine", delta_softplus=True, reverse=reverse)
    assert mine.scans == 1


@pytest.mark.parametrize("gates", [None, torch.tensor([0.25, 0.75]).expand(2, 1, 2)], ids=["plain", "gated"])
@pytest.mark.parametrize("backend", [Mine, Recomputing])
def test_the_mixer_is_composed_of_a_backends_functions(backend, gates):
    backends.register(backend())
    xz, weights = rand(2, 70, 16).float(), [w.requires_grad_() for w in direction_weights(8, 4, 2, 2)]
    ways = directions_of(weights, FLAGS["ssm_conv"])
    out, want = mixer(xz, ways, 0.5, gates, backend=backend.name), reference.mixer(xz, ways, 0.5, gates)
    torch.testing.assert_close(out, want)
    for got, wanted in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (out, want)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(mixer(xz, ways, 0.5, gates, backend=backend.name), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "torch", "mine"])
def test_a_named_backend_compiles_as_one_graph(name):
    backends.register(Mine())
    inputs = {k: v.requires_grad_() for k, v in make_inputs(length=9).items()}

    def scan(**inputs: torch.Tensor) -> torch.Tensor:
        return vimamba.selective_scan(**inputs, delta_softplus=True, backend=name)

    out, want = torch.compile(scan, fullgraph=True, backend="aot_eager")(**inputs), scan(**inputs)
    for got, wanted in zip(*(torch.autograd.grad(y.sum(), list(inputs.values())) for y in (out, want)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_backend_without_gradients_computes_values_and_says_so():
    backends.register(ValuesOnly())
    inputs = make_inputs(length=9)
    out = vimamba.selective_scan(**inputs, delta_softplus=True, backend="values")
    torch.testing.assert_close(out, vimamba.selective_scan(**inputs, delta_softplus=True))
    inputs["u"].requires_grad_()
    out = vimamba.selective_scan(**inputs, delta_softplus=True, backend="values")
    with pytest.raises(UserError, match=r"backend='values' has no scan_backward.*train with another"):
        out.sum().backward()


def test_a_backend_saves_the_states_that_it_wants_to():
    backends.register(Recomputing())
    check(make_inputs(), "recomputing", delta_softplus=True)
    inputs = make_inputs()
    args = [inputs[k] for k in ("u", "delta", "A")] + [inputs[k][:, None] for k in "BC"]
    args += [inputs["D"], inputs["z"], inputs["delta_bias"], True, False, True, "recomputing"]
    torch.library.opcheck(torch.ops.vimamba.selective_scan.default, args)


def test_a_backend_may_be_the_one_to_choose():
    class Float32(Mine):
        def supports(self, dtype: torch.dtype) -> bool:
            return dtype == torch.float32

    mine = Float32()
    backends.register(mine, fastest_on=["cpu"])
    assert backends.resolve("", torch.device("cpu"), torch.float32) is mine
    assert backends.resolve("", torch.device("cpu"), torch.float64).name == "torch"
    check(make_inputs(length=9), None, delta_softplus=True)
    assert mine.scans == 1
    with pytest.raises(UserError, match="backend='mine' cannot run on cpu: it has no float64 kernels"):
        rms_norm(torch.ones(2, 3).double(), torch.ones(3).double(), backend="mine")


def test_what_a_backend_lacks_is_named():
    class Half(Backend):
        name = "half"

    with pytest.raises(TypeError, match="scan_forward"):
        Half()
    backends.register(Mine())
    with pytest.raises(UserError, match="there is a backend 'mine' already"):
        backends.register(Mine())
    with pytest.raises(UserError, match=r"one of reference, torch, cpu, triton, mine, got 'mime'.*did you mean mine"):
        vimamba.selective_scan(**make_inputs(length=2), backend="mime")
