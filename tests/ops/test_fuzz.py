"""Every op of every backend against its plain twin in float64, on drawn shapes, groups, layouts, types and gradients.

The draws are seeded by their number: `pytest tests/ops/test_fuzz.py -k scan-17` repeats one. FUZZ_CASES sets how many
each op gets (`make test-sanitized` runs the same tests with the kernels built under the sanitizers).
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vimamba.ops import Direction, backends, causal_conv1d, linear, mixer, reference, rms_norm, selective_scan

CASES = int(os.environ.get("FUZZ_CASES", "100"))
USABLE = [name for name, reason in backends.status("cpu").items() if reason is None and name != "reference"]
# One rounding of each result to its type, beside sums in float32: half a unit is 2**-9 and 2**-12. Sums that cancel
# (over a single channel, say) lose a few digits more: the tests beside this one look at the last digit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Draws(random.Random):
    """Draws of sizes, types and tensors."""

    def __init__(self, seed: tuple[str, int]) -> None:
        super().__init__(repr(seed))
        self.generator = torch.Generator().manual_seed(self.getrandbits(60))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def laid_out(self, *shape: int) -> Tensor:
        """Random numbers in any order of axes, with gaps, or repeated along an axis."""
        axes = self.sample(range(len(shape)), len(shape))
        gaps = [self.choice((1, 1, 2)) for _ in shape]
        whole = self.normal(*(shape[axis] * gap for axis, gap in zip(axes, gaps, strict=True)))
        tensor = whole[tuple(slice(None, None, gap) for gap in gaps)].permute([axes.index(i) for i in range(len(axes))])
        if self.random() < 0.9 or 0 in shape:
            return tensor
        return tensor.narrow(self.randrange(len(shape)), 0, 1).expand(shape)

    def activations(self, *shape: int) -> Tensor:
        """As `laid_out`, mostly in one of the two usual layouts."""
        layout = self.random()
        if layout < 0.4:
            return self.normal(*shape)
        return self.normal(shape[0], *shape[:0:-1]).transpose(1, -1) if layout < 0.7 else self.laid_out(*shape)


@contextlib.contextmanager
def defaults(draw: Draws) -> Iterator[None]:
    """Another default type and device than usual, as other people's programs set them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)))
    try:
        with torch.device("meta") if draw.random() < 0.2 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference beside the truth's, or beside a tenth of a unit an element where that is more."""
    truth = truth.detach()
    scale = truth.norm().clamp(min=0.1 * max(1, truth.numel()) ** 0.5)
    return float((found.detach().double() - truth).norm() / scale)


def compare(draw: Draws, function: Callable, twin: Callable, inputs: dict[str, Tensor], roundings: int = 1) -> None:
    """Outputs and some of the gradients of a function on typed tensors against its twin on the same in float64.

    `roundings`: how many times a value is rounded to its type between the inputs and a gradient.
    """
    wanted = {name for name in inputs if draw.random() < 0.6}
    leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    doubles = {name: value.double().requires_grad_(name in wanted) for name, value in inputs.items()}
    truths = twin(**doubles)
    with defaults(draw):
        founds = function(**leaves)
    weights = [draw.normal(*truth.shape).to(f.dtype).double() for f, truth in zip(founds, truths, strict=True)]
    if wanted:
        with defaults(draw):
            sum((f.double() * w).sum() for f, w in zip(founds, weights, strict=True)).backward()
    for found, truth in zip(founds, truths, strict=True):
        assert found.device.type == "cpu"
        assert found.shape == truth.shape
        assert error(found.detach(), truth.detach()) < TOLERANCE[found.dtype]
    if wanted:
        sum((t * w).sum() for t, w in zip(truths, weights, strict=True)).backward()
    bound = 2 * roundings * max(TOLERANCE[t.dtype] for t in (*leaves.values(), *founds))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), name
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert error(leaf.grad, doubles[name].grad.detach()) < bound, name


def backend_for(draw: Draws, dtype: torch.dtype) -> str | None:
    return draw.choice([None, *(name for name in USABLE if backends.load(name).supports(dtype))])


def sizes(draw: Draws) -> tuple[int, int, int]:
    """Batch, channels and steps: around the kernels' vectors, tiles and chunks."""
    length = draw.choice((1, 2, 5, 16, 31, 32, 33, 63, 64, 65, 100, 130))
    return draw.choice((0, 1, 1, 2, 3)), draw.choice((1, 2, 4, 6, 12, 16, 24, 33, 48)), length


@pytest.mark.parametrize("case", range(CASES), ids=lambda i: f"scan-{i}")
def test_selective_scan(case):
    draw = Draws(("scan", case))
    (batch, dim, length), state = sizes(draw), draw.choice((1, 3, 4, 8, 16, 17, 20))
    dtype = draw.choice(tuple(TOLERANCE))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    divisors = [n for n in range(1, dim + 1) if dim % n == 0]

    def matrix() -> Tensor:
        kind = draw.random()
        if kind < 0.2:
            return draw.laid_out(dim, state).to(wide)
        if kind < 0.5:
            return draw.activations(batch, state, length).to(dtype)
        return draw.activations(batch, draw.choice(divisors), state, length).to(dtype)

    inputs = {
        "u": draw.activations(batch, dim, length).to(dtype),
        "delta": draw.activations(batch, dim, length).abs().to(dtype) * 0.5,
        "A": -draw.laid_out(dim, state).abs().to(wide),
        "B": matrix(),
        "C": matrix(),
    }
    if draw.random() < 0.5:
        inputs["D"] = draw.normal(dim).to(draw.choice((wide, dtype)))
    if draw.random() < 0.5:
        inputs["z"] = draw.activations(batch, dim, length).to(dtype)
    if softplus := draw.random() < 0.5:
        inputs["delta_bias"] = draw.normal(dim).to(wide)
    options = dict(delta_softplus=softplus, return_last_state=True, reverse=draw.random() < 0.5)
    backend = backend_for(draw, dtype)
    names = {"D": "D_D", "z": "z_BDL", "delta_bias": "delta_bias_D", "u": "u_BDL", "delta": "delta_BDL", "A": "A_DN"}
    compare(
        draw,
        lambda **t: selective_scan(**t, **options, backend=backend),
        lambda **t: reference.selective_scan(**{names.get(k, k): v for k, v in t.items()}, **options),
        inputs,
    )


@pytest.mark.parametrize("case", range(CASES), ids=lambda i: f"conv-{i}")
def test_causal_conv1d(case):
    draw = Draws(("conv", case))
    (batch, dim, length), width = sizes(draw), draw.choice((1, 2, 3, 4, 4, 4, 7, 16, 19))
    dtype = draw.choice(tuple(TOLERANCE))
    inputs = {
        "x": draw.activations(batch, dim, length).to(dtype),
        "weight": draw.laid_out(dim, width).to(dtype) / width**0.5,
    }
    if draw.random() < 0.5:
        inputs["bias"] = draw.normal(dim).to(dtype)
    options = dict(activation=draw.choice((None, "silu")), reverse=draw.random() < 0.5)
    backend = backend_for(draw, dtype)
    compare(
        draw,
        lambda **t: (causal_conv1d(**t, **options, backend=backend),),
        lambda x, weight, bias=None: (reference.causal_conv1d(x, weight, bias, **options),),
        inputs,
    )


@pytest.mark.parametrize("case", range(CASES), ids=lambda i: f"norm-{i}")
def test_rms_norm(case):
    draw = Draws(("norm", case))
    shape = [draw.choice((0, 1, 2, 5)) for _ in range(draw.randrange(3))] + [draw.choice((1, 3, 16, 33, 192))]
    dtype = draw.choice(tuple(TOLERANCE))
    inputs = {"x": draw.laid_out(*shape).to(dtype), "weight": draw.normal(shape[-1]).to(draw.choice(tuple(TOLERANCE)))}
    if draw.random() < 0.6:
        inputs["residual"] = draw.laid_out(*shape).to(draw.choice((dtype, torch.float32)))
    eps, out_dtype = draw.choice((1e-5, 1e-2)), draw.choice((None, dtype, torch.float32, torch.bfloat16))
    backend = backend_for(draw, dtype)
    if backend is not None and out_dtype is not None and not backends.load(backend).supports(out_dtype):
        out_dtype = None
    compare(
        draw,
        lambda x, weight, residual=None: rms_norm(x, weight, residual, eps, out_dtype=out_dtype, backend=backend),
        lambda x, weight, residual=None: reference.rms_norm(x, weight, residual, eps),
        inputs,
    )


@pytest.mark.parametrize("case", range(CASES), ids=lambda i: f"linear-{i}")
def test_linear(case):
    draw = Draws(("linear", case))
    rows = [draw.choice((0, 1, 2, 20, 50)) for _ in range(draw.randrange(1, 3))]
    wide_in, wide_out = draw.choice((1, 3, 16, 37, 192)), draw.choice((1, 5, 16, 48, 101))
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    inputs = {
        "x": draw.laid_out(*rows, wide_in).to(dtype),
        "weight": draw.laid_out(wide_out, wide_in).to(dtype) / wide_in**0.5,
    }
    if draw.random() < 0.5:
        inputs["bias"] = draw.normal(wide_out).to(dtype)
    compare(draw, lambda **t: (linear(**t),), lambda **t: (torch.nn.functional.linear(*t.values()),), inputs)
    with torch.no_grad(), defaults(draw):
        found = linear(**inputs)
    assert error(found, torch.nn.functional.linear(*(t.double() for t in inputs.values()))) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", range(CASES), ids=lambda i: f"mixer-{i}")
def test_mixer(case):
    draw = Draws(("mixer", case))
    batch, dim, length = sizes(draw)
    state, rank, width = draw.choice((1, 4, 16, 17)), draw.choice((1, 3, 5)), draw.choice((1, 4, 4, 7, 18))
    dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16))
    flags = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(draw.choice((1, 2, 2, 3)))]
    inputs = {"xz": draw.laid_out(batch, length, 2 * dim).to(dtype)}
    if draw.random() < 0.3:
        inputs["gates"] = draw.laid_out(batch, draw.choice((1, length)), len(flags)).sigmoid()
        inputs["gates"] = inputs["gates"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    scales = {"conv_weight": 0.5, "conv_bias": 0.1, "x_proj": dim**-0.5, "dt_proj": rank**-0.5}
    for i in range(len(flags)):
        shapes = {
            "conv_weight": draw.choice(((dim, width), (dim, 1, width))) if i == 0 else inputs["0.conv_weight"].shape,
            "conv_bias": (dim,), "x_proj": (rank + 2 * state, dim), "dt_proj": (dim, rank), "dt_bias": (dim,),
            "A_log": (dim, state), "D": (dim,),
        }  # fmt: skip
        for name, shape in shapes.items():
            weight = draw.laid_out(*shape) * scales.get(name, 1.0) - 2.0 * (name == "dt_bias")
            inputs[f"{i}.{name}"] = weight.to(draw.choice((torch.float32, torch.float32, dtype)))
    backend = backend_for(draw, dtype)

    def run(function: Callable, **options) -> Callable:
        def call(xz: Tensor, gates: Tensor | None = None, **weights: Tensor) -> tuple[Tensor]:
            values = list(weights.values())
            ways = [Direction(*values[7 * i : 7 * i + 7], *flag) for i, flag in enumerate(flags)]
            return (function(xz, ways, 0.5, gates, **options),)

        return call

    compare(draw, run(mixer, backend=backend), run(reference.mixer), inputs, roundings=4)
    plain = run(reference.mixer)(**{name: value.double() for name, value in inputs.items()})[0]
    with torch.no_grad(), defaults(draw):
        found = run(mixer, backend=backend)(**inputs)[0]
    assert error(found, plain) < TOLERANCE[dtype]
