"""The convolution, the norm and the whole mixer of every backend, against their plain twins in float64."""

from __future__ import annotations

import pytest
import torch

from vimamba.ops import Direction, backends, causal_conv1d, linear, mixer, reference, rms_norm

USABLE = [name for name, reason in backends.status("cpu").items() if reason is None and name != "reference"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
DTYPES = list(TOLERANCE)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def gradients(outputs, leaves):
    loss = sum((out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
    return torch.autograd.grad(loss, leaves)


def compare(function, twin, tensors, tolerance):
    """Outputs and gradients of `function` on `tensors` against those of `twin` on their float64 copies."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    found, truth = function(*leaves), twin(*doubles)
    for got, want in zip(found, truth, strict=True):
        assert error(got, want) < tolerance
    pairs = zip(gradients(found, leaves), gradients(truth, doubles), strict=True)
    for i, (got, want) in enumerate(pairs):
        assert error(got, want) < tolerance, f"gradient {i}"


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("length", "width", "dim"), [(70, 4, 12), (1, 4, 5), (2, 3, 33), (9, 1, 16), (130, 7, 3), (40, 20, 8)]
)
def test_convolution(length, width, dim, activation, reverse, dtype, backend):
    x = rand(2, length, dim).to(dtype).transpose(1, 2)
    weight, bias = rand(dim, width).float(), rand(dim).float()
    compare(
        lambda *t: (causal_conv1d(*t, activation=activation, reverse=reverse, backend=backend),),
        lambda *t: (reference.causal_conv1d(*t, activation, reverse=reverse),),
        (x, weight, bias),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("backend", USABLE)
def test_convolution_of_any_strides_without_bias(backend):
    x, weight = rand(2, 6, 40).float(), rand(6, 4).float()
    for view in (
        x,
        x[:, ::2, ::3],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:, :1].expand(-1, 6, -1),
    ):
        found = causal_conv1d(view, weight[: view.shape[1]], backend=backend)
        truth = reference.causal_conv1d(view.double(), weight[: view.shape[1]].double())
        assert error(found, truth) < 1e-6


def test_a_reversed_convolution_is_the_flipped_one_flipped_back():
    x, weight = rand(1, 3, 10), rand(3, 4)
    torch.testing.assert_close(causal_conv1d(x, weight, reverse=True), causal_conv1d(x.flip(-1), weight).flip(-1))


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 33), (1, 1, 192), (300, 8)])
def test_norm(shape, with_residual, dtype, backend):
    x, weight = rand(*shape).to(dtype), rand(shape[-1]).float()
    residual = (rand(*shape, seed=1).float(),) if with_residual else ()
    compare(
        lambda x, w, *r: rms_norm(x, w, *r, backend=backend),
        lambda x, w, *r: reference.rms_norm(x, w, *r),
        (x, weight, *residual),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("backend", USABLE)
def test_norm_keeps_the_residual_in_float32(backend):
    normed, total = rms_norm(rand(3, 8).bfloat16(), torch.ones(8), rand(3, 8).float(), backend=backend)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert rms_norm(rand(3, 8).float(), torch.ones(8), out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norm_chooses_a_backend_that_knows_both_types(dtype, out_dtype):
    x = rand(50, 33).to(dtype).requires_grad_()
    normed, _ = rms_norm(x, torch.ones(33), out_dtype=out_dtype)
    assert normed.dtype == out_dtype
    assert error(normed, reference.rms_norm(x.double(), torch.ones(33))[0]) < 1e-3
    normed.float().square().sum().backward()
    assert x.grad.isfinite().all()


FLAGS = {
    "none": [(False, False)],
    "ssm": [(False, False), (False, True)],
    "ssm_conv": [(False, False), (True, True)],
}


def direction_weights(dim: int, state: int, rank: int, count: int, width: int = 4) -> list[torch.Tensor]:
    weights = []
    for i in range(count):
        weights += [
            rand(dim, width, seed=i) / width**0.5, rand(dim, seed=i) * 0.1,
            rand(rank + 2 * state, dim, seed=i) / dim**0.5, rand(dim, rank, seed=i) / rank**0.5,
            rand(dim, seed=i) - 2, rand(dim, state, seed=i), rand(dim, seed=i + 9),
        ]  # fmt: skip
    return [w.float() for w in weights]


def directions_of(weights, flags):
    return [Direction(*weights[7 * i : 7 * i + 7], *flag) for i, flag in enumerate(flags)]


def run_mixer(function, flags, scale):
    return lambda xz, *weights: (function(xz, directions_of(weights, flags), scale),)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", FLAGS)
@pytest.mark.parametrize(
    ("batch", "length", "dim", "state", "rank"),
    [(2, 70, 24, 16, 3), (1, 197, 32, 16, 2), (3, 1, 7, 3, 1), (1, 33, 48, 5, 6)],
)
def test_mixer(batch, length, dim, state, rank, mode, dtype, backend):
    flags = FLAGS[mode]
    xz = rand(batch, length, 2 * dim).to(dtype)
    weights = direction_weights(dim, state, rank, len(flags))
    fused = run_mixer(lambda *a: mixer(*a, backend=backend), flags, 0.5)
    plain = run_mixer(lambda *a: reference.mixer(*a), flags, 0.5)
    # In bfloat16 the activations between the steps are rounded as well as the ends.
    compare(fused, plain, (xz, *weights), 3e-6 if dtype == torch.float32 else 3e-2)
    with torch.no_grad():
        assert error(fused(xz, *weights)[0], plain(xz.double(), *(w.double() for w in weights))[0]) < (
            1e-6 if dtype == torch.float32 else 1e-2
        )


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("per", ["image", "token"])
@pytest.mark.parametrize("mode", FLAGS)
def test_gated_mixer(mode, per, backend):
    flags = FLAGS[mode]
    xz, weights = rand(3, 70, 48).float(), direction_weights(24, 16, 3, len(flags))
    gates = rand(3, 70 if per == "token" else 1, len(flags), seed=4).float().sigmoid()

    def gated(function):
        return lambda xz, gates, *weights: (function(xz, directions_of(weights, flags), 0.5, gates),)

    fused = gated(lambda *a: mixer(*a, backend=backend))
    compare(fused, gated(reference.mixer), (xz, gates, *weights), 3e-6)
    with torch.no_grad():
        truth = gated(reference.mixer)(*(t.double() for t in (xz, gates, *weights)))[0]
        assert error(fused(xz, gates, *weights)[0], truth) < 1e-6
        ways = directions_of(weights, flags)
        if backend == "cpu":
            ones = torch.ones_like(gates)
            assert torch.equal(mixer(xz, ways, 0.5, ones, backend=backend), mixer(xz, ways, 0.5, backend=backend))


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_a_closed_gate_is_not_computed(batch, backend):
    xz, weights = rand(batch, 70, 48).float(), direction_weights(24, 16, 3, 2)
    gates = torch.ones(batch, 1, 2)
    ways = directions_of(weights, FLAGS["ssm_conv"])
    broken = [way._replace(D=torch.full_like(way.D, torch.nan)) for way in ways]
    for closed in (0, 1):
        gates = torch.ones(batch, 1, 2)
        gates[0, 0, closed] = 0.0
        some = mixer(xz, ways, 0.5, gates, skip=True, backend=backend)
        alone = mixer(xz[:1], [ways[1 - closed]], 0.5, backend=backend)
        torch.testing.assert_close(some[:1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(some[1:], mixer(xz[1:], ways, 0.5, backend=backend), rtol=1e-4, atol=1e-5)
        mixed = [broken[0] if closed == 0 else ways[0], broken[1] if closed == 1 else ways[1]]
        assert mixer(xz, mixed, 0.5, gates, skip=True, backend=backend)[:1].isfinite().all()
    assert not mixer(xz, broken, 0.5, torch.zeros(batch, 1, 2), skip=True, backend=backend).any()


@pytest.mark.parametrize("backend", USABLE)
def test_mixer_registration(backend):
    xz, weights = rand(2, 70, 48).float(), direction_weights(24, 16, 3, 2)
    args = (xz, weights, [0, 3], 0.5, None, True, backend)
    torch.library.opcheck(torch.ops.vimamba.mixer.default, args)


def x_of(*shape: int) -> torch.Tensor:
    return rand(*shape).float()


def spoilt(**weights: object) -> list[Direction]:
    """Two directions of 8 channels, the second with some weights replaced."""
    way = Direction(*direction_weights(8, 4, 2, 1))
    return [way, way._replace(**weights)]


BAD = {
    "norm of a list": (lambda: rms_norm([1.0], x_of(1)), "x must be a tensor, got list"),
    "norm without a weight": (lambda: rms_norm(x_of(2, 3), None), "weight must be a tensor, got NoneType"),
    "norm of an array": (lambda: rms_norm(x_of(2, 3).numpy(), x_of(3)), "x must be a tensor, got ndarray"),
    "norm of whole numbers": (lambda: rms_norm(x_of(2, 3).long(), x_of(3)), "x must be a floating-point tensor"),
    "norm of no channels": (
        lambda: rms_norm(x_of(2, 0), x_of(0)),
        r"x must have .* at least one channel, got \(2, 0\)",
    ),
    "norm of a scalar": (lambda: rms_norm(torch.tensor(1.0), x_of(1)), r"x must have shape \(\.\.\., channels\)"),
    "norm with eps below 0": (
        lambda: rms_norm(x_of(2, 3), x_of(3), eps=-1),
        "eps must be a finite number of at least 0",
    ),
    "norm with eps NaN": (lambda: rms_norm(x_of(2, 3), x_of(3), eps=float("nan")), "eps must be .* got nan"),
    "norm to whole numbers": (
        lambda: rms_norm(x_of(2, 3), x_of(3), out_dtype=torch.int32),
        "out_dtype must be a floating type, got torch.int32",
    ),
    "norm of two devices": (lambda: rms_norm(x_of(2, 3), x_of(3).to("meta")), "weight is on meta, but x is on cpu"),
    "linear of complex": (lambda: linear(x_of(2, 3).cfloat(), x_of(4, 3)), "x is torch.complex64, but linear is real"),
    "linear of other sizes": (
        lambda: linear(x_of(40, 4), x_of(3, 5)),
        r"x must have shape .*\(\.\.\., 5\), got \(40, 4\)",
    ),
    "linear of a vector": (
        lambda: linear(x_of(40, 4), x_of(4)),
        r"weight must have shape \(out_features, in_features\)",
    ),
    "linear with a short bias": (
        lambda: linear(x_of(40, 4), x_of(3, 4), x_of(2)),
        r"bias must have .*\(3,\), got \(2,\)",
    ),
    "convolution of no width": (lambda: causal_conv1d(x_of(1, 3, 5), x_of(3, 0)), r"weight must have .* got \(3, 0\)"),
    "convolution of a text": (lambda: causal_conv1d("x", x_of(3, 4)), "x must be a tensor, got str"),
    "convolution, reverse a text": (
        lambda: causal_conv1d(x_of(1, 3, 5), x_of(3, 4), reverse="yes"),
        "reverse must be True or False, got 'yes'",
    ),
    "mixer of no directions": (lambda: mixer(x_of(1, 5, 16), []), r"directions must be .* got \[\]"),
    "mixer of None": (lambda: mixer(x_of(1, 5, 16), None), "directions must be a sequence"),
    "mixer of a list": (lambda: mixer([1], spoilt()), "xz must be a tensor, got list"),
    "mixer of tensors": (lambda: mixer(x_of(1, 5, 16), [x_of(3)]), r"directions\[0\] must be a Direction, got Tensor"),
    "mixer of no steps": (lambda: mixer(x_of(1, 0, 16), spoilt()), "xz must have .* at least one step"),
    "mixer with an infinite scale": (lambda: mixer(x_of(1, 5, 16), spoilt(), float("inf")), "scale must be a finite"),
    **{
        f"mixer with a wrong {name}": (
            lambda name=name, shape=shape: mixer(x_of(1, 5, 16), spoilt(**{name: x_of(*shape)})),
            rf"directions\[1\]\.{name} must have .* got {shape}".replace("(", r"\(").replace(")", r"\)"),
        )
        for name, shape in {
            "conv_weight": (8, 0), "conv_bias": (1,), "x_proj_weight": (1, 8), "dt_proj_weight": (7, 2),
            "dt_bias": (1,), "A_log": (8, 3), "D": (1,),
        }.items()
    },
    "mixer with a None among the weights": (
        lambda: mixer(x_of(1, 5, 16), spoilt(D=None)),
        r"directions\[1\]\.D must be a tensor, got NoneType",
    ),
    "mixer with directions of other widths": (
        lambda: mixer(x_of(1, 5, 16), spoilt(conv_weight=x_of(8, 3))),
        r"conv_weight must have the first direction's shape \(8, 4\), got \(8, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_arguments_are_named(case, grad):
    call, message = BAD[case]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_idx", torch.zeros(1, 5)), ("initial_states", torch.zeros(1, 3, 3)), ("return_final_states", True),
        ("final_states_out", torch.zeros(1, 3, 3)),
    ],
)  # fmt: skip
def test_what_the_convolution_does_not_have_is_refused(name, value):
    with pytest.raises(NotImplementedError, match=f"causal_conv1d has no {name}"):
        causal_conv1d(x_of(1, 3, 5), x_of(3, 4), **{name: value})


def test_the_convolution_takes_causal_conv1d_fns_arguments_in_its_order():
    x, weight, bias = x_of(2, 3, 9), x_of(3, 4), x_of(3)
    want = causal_conv1d(x, weight, bias, activation="swish")
    assert torch.equal(causal_conv1d(x, weight, bias, None, None, False, None, "silu"), want)
    with pytest.warns(DeprecationWarning, match="give activation by name"):
        assert torch.equal(causal_conv1d(x, weight, bias, "silu"), want)


def test_forward_mode_is_refused():
    weights = direction_weights(8, 4, 2, 1)
    for call in (
        lambda x: rms_norm(x, x_of(16)),
        lambda x: causal_conv1d(x, x_of(5, 4)),
        lambda x: mixer(x, [Direction(*weights)]),
    ):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(call, (x_of(1, 5, 16),), (torch.ones(1, 5, 16),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_type_changes_nothing(dtype):
    xz, weights = rand(2, 70, 48).float(), direction_weights(24, 16, 3, 2)

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (xz, *weights)]
        out = mixer(leaves[0], directions_of(leaves[1:], FLAGS["ssm_conv"]), 0.5)
        normed, total = rms_norm(out, leaves[5])
        conv = causal_conv1d(normed.transpose(1, 2), leaves[1], activation="silu")
        return [out, total, *torch.autograd.grad((conv.square().mean() + total.mean()), leaves[:6])]

    want = run()
    torch.set_default_dtype(dtype)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for got, wanted in zip(found, want, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight must have shape \(dim, width\) = \(3, width\), got \(4, 4\)"):
        causal_conv1d(rand(1, 3, 5), rand(4, 4))
    with pytest.raises(ValueError, match=r"activation must be None or \"silu\", got 'relu'"):
        causal_conv1d(rand(1, 3, 5), rand(3, 4), activation="relu")
    with pytest.raises(ValueError, match=r"residual must have x's shape \(2, 3\), got \(2, 4\)"):
        rms_norm(rand(2, 3), rand(3), rand(2, 4))
    ways = [Direction(*direction_weights(8, 4, 1, 1))]
    with pytest.raises(ValueError, match=r"xz must have shape .*16\), got \(1, 5, 8\)"):
        mixer(rand(1, 5, 8), ways)
    with pytest.raises(ValueError, match=r"gates must have shape .* = \(2, 5 or 1, 1\), got \(2, 5, 3\)"):
        mixer(rand(2, 5, 16), ways, gates=rand(2, 5, 3))
