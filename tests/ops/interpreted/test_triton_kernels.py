"""The Triton kernels on small shapes, every option: in Triton's interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton_cases import DEVICE, TOLERANCE, check_scan, error, kernels, rand, scan_case
from vimamba.ops import reference, sizes
from vimamba.ops.direction import Direction, flat
from vimamba.ops.triton import scan, tiling


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def short_chunks(monkeypatch):
    """States every 8 steps instead of 64, so that a few steps make several chunks."""
    monkeypatch.setattr(sizes, "CHUNK", 8)


CASES = {
    "plain": {},
    "odd sizes": dict(batch=2, dim=3, length=11, state=3),
    "one step": dict(length=1),
    "one channel": dict(dim=1, length=5, state=1),
    "many channels": dict(dim=41, length=5, state=16),
    "two groups": dict(dim=6, groups=2),
    "constant B": dict(constant="B"),
    "constant C": dict(constant="C"),
    "constant B and C": dict(constant="BC"),
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "large state": dict(dim=3, length=6, state=40),
    "no gradient of the last state": dict(last=False),
}


def forward_in(tile: tiling.ForwardTiling):
    """Always chooses `tile`, with the rows of states that the state at hand needs."""

    def choose(sequences, groups, group_dim, length, state, processors):
        return tile._replace(block_n=tiling.padded_states(state))

    return choose


WHOLE = tiling.ForwardTiling(32, 1, 8, 0, 1 << 20)
SEGMENTED = tiling.ForwardTiling(32, 2, 4, 0, 8)


@pytest.fixture(params=[WHOLE, SEGMENTED], ids=["whole", "segmented"])
def either_way(request, monkeypatch):
    """One channel a thread and all of time, or two, and segments of 8 steps."""
    monkeypatch.setattr(tiling, "forward_tiling", forward_in(request.param))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scan(case, reverse, either_way):
    check_scan(scan_case(**case), reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_scan_over_several_chunks(reverse, short_chunks, either_way):
    check_scan(scan_case(batch=2, dim=3, length=37, state=3), reverse=reverse)


TURNS = [(2, 2), *((sets, unroll) for sets in (1, 2, 3) for unroll in (1, 2, 4, 8) if (sets, unroll) != (2, 2))]


@pytest.mark.parametrize(
    ("sets", "unroll"), [pytest.param(*turn, marks=[pytest.mark.slow] if i else []) for i, turn in enumerate(TURNS)]
)
def test_turns_and_sets(sets, unroll, monkeypatch):
    """Several turns, of which the states before every 16 steps are kept, and channels in some sets only."""
    monkeypatch.setattr(sizes, "CHUNK", 16)
    monkeypatch.setattr(tiling, "forward_tiling", forward_in(tiling.ForwardTiling(32, sets, unroll, 0, 16)))
    check_scan(scan_case(dim=35, length=35, state=3) | {"z": None})


@pytest.mark.parametrize("lanes_first", [False, True])
def test_tiles_of_older_and_newer_compilers(lanes_first, monkeypatch, short_chunks):
    monkeypatch.setattr(scan, "LANES_FIRST", lanes_first)
    monkeypatch.setattr(tiling, "forward_tiling", forward_in(WHOLE))
    check_scan(scan_case(dim=41, length=19, state=3))


def test_parts_instead_of_atomics(monkeypatch):
    """The deterministic backward pass, of two groups with several blocks of channels each."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_scan(scan_case(dim=80, length=5, state=2, groups=2))


def test_nothing_passes_from_one_sequence_to_the_next():
    """The steps past the end of a sequence, where the next one lies in memory, do not reach it."""
    case = scan_case(batch=2, length=11)
    u, delta, A, B, C, D, z, bias = (case[k].float().to(DEVICE) for k in case if k != "options")
    arguments = [u, delta, A, B, C, D, z, bias]
    for tensor in (u, delta, B, C, z):
        tensor[1] = float("nan")
    for tile in (WHOLE._replace(block_n=4), SEGMENTED._replace(block_n=4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiling, "forward_tiling", lambda *_, tile=tile: tile)
            for reverse in (False, True):
                out, last, _ = kernels.scan_forward(*arguments, True, reverse, False)
                assert out[0].isfinite().all()
                assert last[0].isfinite().all()
                assert out[1].isnan().all()


@pytest.mark.parametrize("missing", ["D", "z", "bias", "softplus"])
def test_scan_options(missing, either_way):
    case = scan_case()
    if missing in case:
        case[missing] = None
    if missing == "softplus":
        case["delta"] = case["delta"].abs() + 1e-3
        case["bias"] = case["bias"].abs()
    check_scan(case, softplus=missing != "softplus")


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_scan_in_segments_of_time(gate, reverse, monkeypatch, short_chunks):
    monkeypatch.setattr(tiling, "forward_tiling", forward_in(WHOLE))
    choose = tiling.backward_tiling
    monkeypatch.setattr(tiling, "backward_tiling", lambda *args: choose(*args)._replace(segment=8))
    case = scan_case(dim=2, length=19, state=2)
    if not gate:
        case["z"] = None
    check_scan(case, reverse=reverse)


def test_scan_takes_channels_that_are_not_contiguous():
    case = scan_case()
    case["u"], case["z"] = case["u"].contiguous(), case["z"].contiguous()
    check_scan(case)


def test_small_steps_keep_their_precision():
    """softplus(-15) is 3e-7: computed as log(1 + exp(x)) in float32 it would be wrong by a fifth."""
    u, delta = rand(1, 3, 4), torch.full((1, 3, 4), -15.0)
    A, matrix = -torch.ones(3, 2), torch.ones(3, 2)
    give = [t.float().to(DEVICE) for t in (u, delta, A, matrix, matrix)]
    out, *_ = kernels.scan_forward(*give, None, None, None, True, False, False)
    truth = reference.selective_scan(*(t.double().cpu() for t in give), delta_softplus=True)
    assert error(out, truth) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_conv(reverse, silu, bias):
    width = 4 if silu else 3
    x, weight = rand(2, 19, 5).transpose(1, 2).requires_grad_(), rand(5, width).requires_grad_()
    shift = rand(5).requires_grad_() if bias else None
    leaves = [t for t in (x, weight, shift) if t is not None]
    y = reference.causal_conv1d(x, weight, shift, "silu" if silu else None, reverse=reverse)
    dy = rand(*y.shape)
    wants = torch.autograd.grad(y, leaves, dy)
    arguments = [None if t is None else t.detach().float().to(DEVICE) for t in (x, weight, shift)]
    assert error(kernels.conv_forward(*arguments, silu, reverse), y) < 1e-6
    found = kernels.conv_backward(dy.float().to(DEVICE), *arguments, silu, reverse)
    assert (found[2] is None) == (not bias)
    for got, want in zip(found, wants, strict=False):
        assert error(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [True, False])
def test_norm(residual, dtype):
    x, weight = rand(7, 12, dtype=dtype).requires_grad_(), rand(12).requires_grad_()
    before = rand(7, 12) if residual else None
    normed, total = reference.rms_norm(x, weight, before)
    dnormed, dtotal = rand(7, 12, dtype=dtype), rand(7, 12) if residual else None
    loss = (normed * dnormed).sum() + ((total * dtotal).sum() if dtotal is not None else 0)
    wants = torch.autograd.grad(loss, (x, weight))
    put = lambda t, kind=torch.float32: None if t is None else t.detach().to(kind).to(DEVICE)  # noqa: E731
    found, sums, rstd = kernels.norm_forward(put(x, dtype), put(before), put(weight), 1e-5, dtype)
    assert found.dtype == dtype
    assert error(found, normed) < TOLERANCE[dtype]
    assert error(sums, total) < 1e-6
    grads = kernels.norm_backward(put(dnormed, dtype), put(dtotal), sums, put(weight), rstd)
    for got, want in zip(grads, wants, strict=True):
        assert error(got, want) < 1e-6


@pytest.mark.parametrize("flags", [[(0, 0), (1, 1)], [(0, 0), (0, 1)], [(0, 0)]], ids=["ssm_conv", "ssm", "none"])
def test_mixer(flags):
    dim, state, rank, width = 5, 3, 2, 4
    ways = [
        Direction(rand(dim, width), rand(dim), rand(rank + 2 * state, dim) * 0.4, rand(dim, rank), rand(dim),
                  rand(dim, state), rand(dim), bool(conv), bool(way))
        for conv, way in flags
    ]  # fmt: skip
    xz = rand(1, 9, 2 * dim).requires_grad_()
    leaves = [xz, *(t.requires_grad_() for way in ways for t in way[:7])]
    truth = reference.mixer(xz, ways, 0.5)
    dout = rand(*truth.shape)
    wants = torch.autograd.grad(truth, leaves, dout)
    single = [Direction(*(t.detach().float().to(DEVICE) for t in way[:7]), *way[7:]) for way in ways]
    given = xz.detach().float().to(DEVICE)
    out, states = kernels.mixer_forward(given, *flat(single), 0.5, None, True)
    dxz, grads = kernels.mixer_backward(dout.float().to(DEVICE), given, *flat(single), states, 0.5)
    assert error(out, truth) < 1e-6
    for got, want in zip([dxz, *grads], wants, strict=True):
        assert error(got, want) < 2e-6
    assert torch.equal(out, kernels.mixer_forward(given, *flat(single), 0.5, None, False)[0])
