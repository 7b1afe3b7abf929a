"""Every backend against the plain loop in float64, over shapes, types and options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vimamba
from vimamba.ops import backends, reference

USABLE = [name for name, reason in backends.status("cpu").items() if reason is None and name != "reference"]
# Rounding to bfloat16 (8 bits) and float16 (11 bits) once on the way out; float32 sums of up to 200 steps.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def make_inputs(
    batch=2,
    dim=12,
    length=70,
    state=5,
    groups=None,
    constant="",
    dtype=torch.float32,
    gate=True,
    channels_last=True,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(batch + dim + length + state)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def sequence() -> Tensor:
        return (
            rand(batch, length, dim).to(dtype).transpose(1, 2) if channels_last else rand(batch, dim, length).to(dtype)
        )

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"u": sequence(), "delta": sequence(), "A": -rand(dim, state).exp().to(wide)}
    for name, own in zip("BC", groups if isinstance(groups, tuple) else (groups, groups), strict=True):
        matrix = (batch, length, state) if own is None else (batch, own, length, state)
        inputs[name] = rand(dim, state).to(wide) if name in constant else rand(*matrix).to(dtype).transpose(-1, -2)
    inputs |= {"D": rand(dim).to(wide), "delta_bias": (rand(dim) - 2).to(wide)}
    return inputs | {"z": sequence()} if gate else inputs


def error(found: Tensor, truth: Tensor) -> float:
    scale = truth.double().norm()
    return float((found.double() - truth.double()).norm() / (scale if scale > 0 else 1))


def run(scan, inputs: dict[str, Tensor], **options):
    """Output, last state and all gradients of a loss that uses both."""
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in inputs.items()}
    out, last = scan(**leaves, return_last_state=True, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    loss = (out.double() * weight).sum() + (last.double() * 0.1).sum()
    return (
        out.detach(),
        last.detach(),
        dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)),
    )


def truth_of(inputs: dict[str, Tensor], **options):
    doubled = {k: v.double() for k, v in inputs.items()}
    softplus = options.pop("delta_softplus", False)
    options.pop("backend", None)

    def scan(delta_bias=None, **kwargs):
        return reference.selective_scan(
            kwargs.pop("u"), kwargs.pop("delta"), kwargs.pop("A"), kwargs.pop("B"), kwargs.pop("C"),
            kwargs.pop("D", None), kwargs.pop("z", None), delta_bias, softplus, kwargs.pop("return_last_state"),
            **kwargs,
        )  # fmt: skip

    return run(scan, doubled, **options)


def check(inputs: dict[str, Tensor], backend: str | None, **options) -> None:
    out, last, grads = run(vimamba.selective_scan, inputs, backend=backend, **options)
    want_out, want_last, want_grads = truth_of(inputs, **options)
    tolerance = TOLERANCE[out.dtype]
    assert out.dtype == inputs["u"].dtype
    assert error(out, want_out) < tolerance
    assert error(last, want_last) < tolerance
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert error(grad, want_grads[name]) < tolerance, name


SHAPES = {
    "usual": {},
    "one step": dict(length=1),
    "one channel": dict(dim=1),
    "one chunk": dict(length=64),
    "many steps": dict(batch=1, dim=3, length=197),
    "odd": dict(batch=3, dim=17, length=129, state=16),
    "wide": dict(batch=1, dim=40, length=33, state=16),
    "large state": dict(dim=5, length=20, state=70),
    "one state": dict(state=1),
    "two groups": dict(groups=2),
    "three groups": dict(groups=3, batch=1),
    "one and two groups": dict(groups=(1, 2)),
    "four and two groups": dict(groups=(4, 2)),
    "two and three groups": dict(groups=(2, 3), batch=1),
    "groups of B alone": dict(groups=(12, None)),
    "constant B": dict(constant="B"),
    "constant C": dict(constant="C"),
    "constant B and C": dict(constant="BC"),
    "constant B, groups": dict(constant="B", groups=4),
    "channels first": dict(channels_last=False),
    "no gate": dict(gate=False),
}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_match_the_plain_loop(shape, reverse, backend):
    check(make_inputs(**shape), backend, reverse=reverse, delta_softplus=True)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype, backend):
    if not backends.load(backend).supports(dtype):
        with pytest.raises(ValueError, match="kernels"):
            vimamba.selective_scan(**make_inputs(dtype=dtype), backend=backend)
    else:
        check(make_inputs(dtype=dtype), backend, delta_softplus=True)


@pytest.mark.parametrize("backend", USABLE)
def test_optional_arguments_may_be_left_out(backend):
    inputs = make_inputs(gate=False)
    inputs["delta"] = inputs["delta"].abs()
    del inputs["D"], inputs["delta_bias"]
    check(inputs, backend)


@pytest.mark.parametrize("backend", USABLE)
def test_strides_are_taken_as_they_are(backend):
    wide = make_inputs(dim=24, length=40)
    inputs = make_inputs(length=40)
    xz = torch.cat([wide["u"], wide["z"]], dim=1).transpose(1, 2).contiguous()
    inputs |= {"u": xz[..., 5:17].transpose(1, 2), "z": xz[..., 20:32].transpose(1, 2)}
    inputs["delta"] = inputs["delta"][:, :1].expand(-1, 12, -1)
    inputs["A"] = inputs["A"].t().contiguous().t()
    options = dict(delta_softplus=True)
    found = vimamba.selective_scan(**inputs, **options, backend=backend)
    dense = {k: v.contiguous() for k, v in inputs.items()}
    assert error(found, truth_of(dense, **options)[0]) < 1e-6


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_passes_through_from_its_step_on(bad, backend):
    inputs = make_inputs()
    inputs["u"][0, 3, 10] = bad
    out = vimamba.selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert not out[0, 3, 10].isfinite()
    assert out[0, 3, :10].isfinite().all()
    assert out[0, 4].isfinite().all()
    truth = reference.selective_scan(*(inputs[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), True)
    assert torch.equal(out.isnan(), truth.isnan())


@pytest.mark.parametrize("backend", USABLE)
def test_extreme_steps_underflow_and_do_not_overflow(backend):
    inputs = make_inputs()
    inputs["delta"] = inputs["delta"] * 1e4
    check(inputs, backend, delta_softplus=True)
    inputs["A"] = torch.zeros_like(inputs["A"])
    inputs["delta"] = inputs["delta"] * 1e-6
    check(inputs, backend, delta_softplus=True)


@pytest.mark.parametrize("backend", USABLE)
def test_empty_batch(backend):
    inputs = {k: v.requires_grad_() for k, v in make_inputs(batch=0).items()}
    out, last = vimamba.selective_scan(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    assert out.shape == (0, 12, 70)
    assert last.shape == (0, 12, 5)
    out.sum().backward()
    assert inputs["A"].grad.abs().sum() == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    inputs = make_inputs(batch=1, dim=4, length=9, state=3, groups=2, dtype=torch.float64)
    names, leaves = list(inputs), [v.requires_grad_() for v in inputs.values()]

    def scan(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return vimamba.selective_scan(
            **named, delta_softplus=True, return_last_state=True, reverse=reverse, backend="torch"
        )

    assert torch.autograd.gradcheck(scan, leaves)


def test_gradients_across_chunks_match_a_numerical_derivative():
    inputs = make_inputs(batch=1, dim=2, length=66, state=2, constant="BC", dtype=torch.float64)
    names, leaves = list(inputs), [v.requires_grad_() for v in inputs.values()]

    def scan(*tensors):
        return vimamba.selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


def test_second_derivatives_are_refused():
    inputs = {k: v.requires_grad_() for k, v in make_inputs().items()}
    (grad,) = torch.autograd.grad(vimamba.selective_scan(**inputs).sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize("reverse", [False, True])
def test_compiles_as_one_graph(reverse):
    inputs = make_inputs()

    def scan(**kwargs):
        return vimamba.selective_scan(**kwargs, delta_softplus=True, reverse=reverse) * 2

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    compiled(**leaves).sum().backward()
    plain = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    scan(**plain).sum().backward()
    for name in inputs:
        torch.testing.assert_close(leaves[name].grad, plain[name].grad)


@pytest.mark.parametrize("backend", USABLE)
def test_registration(backend):
    inputs = make_inputs()
    args = [inputs[k] for k in ("u", "delta", "A")] + [inputs[k][:, None] for k in "BC"]
    args += [inputs["D"], inputs["z"], inputs["delta_bias"], True, False, False, backend]
    torch.library.opcheck(torch.ops.vimamba.selective_scan.default, args)


def test_under_autocast_mixed_types_are_brought_together():
    inputs = make_inputs()
    mixed = inputs | {k: inputs[k].bfloat16() for k in ("u", "B")}
    with torch.autocast("cpu", torch.bfloat16):
        out = vimamba.selective_scan(**mixed, delta_softplus=True)
    assert out.dtype == torch.float32
    with pytest.raises(ValueError, match="delta must have u's type"):
        vimamba.selective_scan(**mixed, delta_softplus=True)


BAD = {
    "u": (lambda t: t[0], r"u must have shape \(batch, dim, length\), got \(12, 70\)"),
    "delta": (lambda t: t[..., 1:], r"delta must have u's shape \(2, 12, 70\), got \(2, 12, 69\)"),
    "A": (lambda t: t.t(), r"A must have shape .*\(12, state\), got \(5, 12\)"),
    "B": (lambda t: t[:1], r"B must have shape .*\(2, 5, 70\).*got \(1, 5, 70\)"),
    "C": (lambda t: t[:, None].expand(-1, 5, -1, -1), r"C has 5 groups.*12 channels"),
    "D": (lambda t: t[:3], r"D must have shape \(dim,\) = \(12,\), got \(3,\)"),
    "z": (lambda t: t.bfloat16(), r"z must have u's type torch.float32, got torch.bfloat16"),
    "delta_bias": (lambda t: t.to("meta"), r"delta_bias is on meta, but u is on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    spoil, message = BAD[name]
    inputs = make_inputs()
    inputs[name] = spoil(inputs[name])
    with pytest.raises(ValueError, match=message):
        vimamba.selective_scan(**inputs)


def test_complex_and_integer_and_unknown_backend_are_refused():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"A is torch.complex64.*complex A"):
        vimamba.selective_scan(**inputs | {"A": inputs["A"].to(torch.complex64)})
    with pytest.raises(ValueError, match=r"u must be a floating-point tensor, got torch.int64"):
        vimamba.selective_scan(**inputs | {"u": inputs["u"].long()})
    with pytest.raises(ValueError, match=r"backend must be None or one of .*'tritn'.*did you mean triton"):
        vimamba.selective_scan(**inputs, backend="tritn")


def test_forward_mode_is_refused():
    inputs = make_inputs()

    def scan(u: Tensor) -> Tensor:
        return vimamba.selective_scan(**inputs | {"u": u})

    with pytest.raises(NotImplementedError, match="selective_scan has no forward-mode derivative"):
        torch.func.jvp(scan, (inputs["u"],), (torch.ones_like(inputs["u"]),))


@pytest.mark.parametrize("backend", USABLE)
def test_an_exported_graph_keeps_no_states_and_can_be_differentiated_all_the_same(backend):
    class Scan(torch.nn.Module):
        def forward(self, u: Tensor, rest: dict[str, Tensor]) -> Tensor:
            return vimamba.selective_scan(u, **rest, delta_softplus=True, backend=backend)

    rest = make_inputs()
    u = rest.pop("u").requires_grad_()
    program = torch.export.export(Scan(), (u, rest))
    (call,) = (node for node in program.graph.nodes if "selective_scan" in str(node.target))
    assert call.args[10] is False  # save_states
    want = vimamba.selective_scan(u, **rest, delta_softplus=True, backend=backend)
    found = program.module()(u, rest)
    torch.testing.assert_close(found, want)
    (wanted,), (got,) = (torch.autograd.grad(y.square().sum(), u) for y in (want, found))
    torch.testing.assert_close(got, wanted)
