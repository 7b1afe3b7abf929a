"""The linear layer's own product: the right numbers, and only where nothing but numbers is wanted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vimamba.ops import backends, linear
from vimamba.ops.cpu import library

cpu = backends.load("cpu")

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    ran = []
    kernel = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *args: ran.append(args) or kernel(*args))
    return ran


@pytest.mark.parametrize("kind", library.instruction_sets() if cpu.unavailable() is None else ["none"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 1, 1), (7, 5, 3), (33, 50, 44), (197, 192, 100), (300, 513, 49), (2, 20, 97)]
)
def test_product(rows, inner, outer, bias, threads, kind):
    before = torch.get_num_threads(), library.instruction_set()
    try:
        torch.set_num_threads(threads)
        library.use_instruction_set(kind)
        x, weight, b = rand(2, rows, inner), rand(outer, inner, seed=1), rand(outer, seed=2) if bias else None
        out = cpu.linear(x, weight, b)
    finally:
        torch.set_num_threads(before[0])
        library.use_instruction_set(before[1])
    truth = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert (out - truth).abs().max() / truth.abs().max() < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_inference_and_training_take_the_kernel(calls, bias):
    layer, x, dout = torch.nn.Linear(48, 80, bias), rand(3, 40, 48).requires_grad_(), rand(3, 40, 80, seed=1)
    with torch.no_grad():
        out = linear(x, layer.weight, layer.bias)
    assert len(calls) == 1
    trained = linear(x, layer.weight, layer.bias)
    inputs = [x, *layer.parameters()]
    grads = torch.autograd.grad(trained, inputs, dout)
    assert len(calls) == 3  # and that of x
    assert torch.equal(out, trained)
    for found, wanted in zip(grads, torch.autograd.grad(layer(x), inputs, dout), strict=True):
        torch.testing.assert_close(found, wanted)
    frozen = torch.autograd.grad(linear(x.detach(), layer.weight, layer.bias), layer.weight, dout)[0]
    assert len(calls) == 4  # no gradient of x
    torch.testing.assert_close(frozen, grads[1])


def test_second_derivatives():
    given, penalties = (rand(40, 48), rand(80, 48, seed=1), rand(80, seed=2)), []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in given]
        grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    for found, wanted in zip(*penalties, strict=True):
        assert (found - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize(("rows", "inner", "outer"), [(7, 5, 3), (197, 100, 192), (300, 49, 513)])
def test_a_transposed_weight_is_read_as_it_is(rows, inner, outer):
    x, weight = rand(rows, inner), rand(inner, outer, seed=1).t()
    truth = F.linear(x.double(), weight.double())
    assert (cpu.linear(x, weight, None) - truth).abs().max() / truth.abs().max() < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_without_instructions_are_multiplied_in_float32(monkeypatch, calls, dtype, autocast):
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: False)
    x, weight, bias, dout = (t.to(dtype) for t in (rand(3, 40, 48), rand(80, 48, seed=1), rand(80), rand(3, 40, 80)))
    truth = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.linear(*truth)
    grads = torch.autograd.grad(expected, truth, dout.double())
    leaves = [t.requires_grad_() for t in (x, *(t.float() if autocast else t for t in (weight, bias)))]
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = linear(*leaves)
        assert out.grad_fn.saved_tensors[0].dtype == dtype
        found = torch.autograd.grad(out, leaves, dout)  # a step may lie within autocast as a whole
        with torch.no_grad():
            assert torch.equal(linear(*leaves), out)
            assert linear(x[:1, :3], weight.to(leaves[1].dtype)).dtype == dtype  # few rows are PyTorch's, in float32
    assert len(calls) == 3
    assert all(t.dtype == torch.float32 for call in calls for t in call if t is not None)
    assert out.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=0)
    for leaf, one, wanted in zip(leaves, found, grads, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), wanted, rtol=1e-5 if one.dtype == torch.float32 else step, atol=1e-5)


@torch.no_grad()
def test_what_exported_programs_call_keeps_the_type_that_it_was_exported_with(monkeypatch, calls):
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: False)
    x, weight = rand(40, 48), rand(80, 48, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.vimamba.linear(x, weight, None), cpu.linear(x, weight, None))
    lower = torch.ops.vimamba.linear(x.bfloat16(), weight.bfloat16(), None)
    assert torch.equal(lower, cpu.linear(x.bfloat16().float(), weight.bfloat16().float(), None).bfloat16())
    assert {t.dtype for call in calls for t in call if t is not None} == {torch.float32}


def test_float64_stays_under_autocast_without_instructions(monkeypatch):
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: False)
    x, weight = rand(40, 48).double(), rand(80, 48).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@torch.no_grad()
def test_what_the_kernel_does_not_do_goes_to_pytorch(monkeypatch, calls):
    monkeypatch.setattr(backends, "_has_instructions", lambda dtype: True)
    weight, x = rand(80, 48), rand(40, 48)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x[:3], weight).shape == (3, 80)  # too few rows to be worth packing the weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 40 * 48 * 80
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert torch.func.vmap(linear, in_dims=(0, None))(rand(2, 40, 48), weight).shape == (2, 40, 80)
    assert calls == []


@torch.no_grad()
def test_any_layout_and_any_number():
    x, weight = rand(48, 40).t(), rand(48, 80).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    x = x.clone()
    x[5, 7], x[6, 7] = float("nan"), float("inf")
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), equal_nan=True)
