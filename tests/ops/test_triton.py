"""The Triton kernels: in the interpreter on small shapes, every option; compiled ahead of time; and on a GPU.

Whether kernels are interpreted is settled when they are imported, so one test runs this file again in a process of
its own with TRITON_INTERPRET=1; there, the tests marked `interpreted` run and the others are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import vimamba  # noqa: E402
from vimamba.ops import reference  # noqa: E402
from vimamba.ops import triton as kernels  # noqa: E402
from vimamba.ops.mixer import Direction, flat  # noqa: E402
from vimamba.ops.triton import pack, plan, scan  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INSIDE
DEVICE = "cuda" if ON_GPU else "cpu"
interpreted = pytest.mark.skipif(not INSIDE and not ON_GPU, reason="runs in the interpreter, see test_in_interpreter")
outside = pytest.mark.skipif(INSIDE, reason="needs compiled kernels")
# float32: one rounding a step of sums of up to 200 steps, and exp2 within 2 ulp; bfloat16: one rounding at the end.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def error(found: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    return float((found.double().cpu() - truth).norm() / truth.norm().clamp_min(1e-30))


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of `dtype`, held in float64."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def short_chunks(monkeypatch):
    """States every 8 steps instead of 64, so that a few steps make several chunks."""
    monkeypatch.setattr(scan, "CHUNK", 8)
    monkeypatch.setattr(plan, "CHUNK", 8)


@outside
def test_in_interpreter():
    """Run the tests marked `interpreted` with interpreted kernels."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@outside
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(arch, tmp_path):
    """The kernels of a training step, for every architecture (sm_75 has no bfloat16 units); no GPU is needed."""
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py"), "--arch", arch, "--json", str(rows)]
    command += ["--case", "Vim-S 224 px, batch 64, training", "odd sizes, float32, training"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    found = json.loads(rows.read_text())
    assert {row["kernel"] for row in found} >= {
        "scan_forward_kernel", "scan_backward_kernel", "conv_backward_kernel", "pack_kernel",
    }  # fmt: skip
    assert all(row["spilled_bytes"] == 0 for row in found)


def scan_case(batch=1, dim=5, length=7, state=4, groups=1, constant="", dtype=torch.float32, last=True) -> dict:
    def sequence() -> Tensor:
        return rand(batch, length, dim, dtype=dtype).transpose(1, 2)

    case = {"u": sequence(), "delta": sequence() * 0.5, "A": -rand(dim, state).exp()}
    for name in "BC":
        variable = rand(batch, groups, length, state, dtype=dtype).transpose(-1, -2)
        case[name] = rand(dim, state) if name in constant else variable
    case |= {"D": rand(dim), "z": sequence(), "bias": rand(dim)}
    return case | {"options": {"dtype": dtype, "last": last}}


def check_scan(case: dict, softplus: bool = True, reverse: bool = False) -> None:
    options = case.pop("options")
    dtype = options["dtype"]
    names = [name for name, value in case.items() if value is not None]
    leaves = {name: case[name].clone(memory_format=torch.preserve_format).requires_grad_() for name in names}
    get = leaves.get
    arguments = [get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "bias")]
    out, last = reference.selective_scan(*arguments, softplus, True, reverse=reverse)
    dout, dlast = rand(*out.shape, dtype=dtype), rand(*last.shape) * options["last"]
    wants = torch.autograd.grad((out * dout).sum() + (last * dlast).sum(), [leaves[n] for n in names])

    typed = {"u": dtype, "delta": dtype, "z": dtype, "B": dtype, "C": dtype}

    def give(name: str) -> Tensor | None:
        value = case[name]
        if value is None:
            return None
        wide = torch.float32 if value.dim() == 2 else typed.get(name, torch.float32)
        return value.to(wide).to(DEVICE)

    u, delta, A, B, C, D, z, bias = (give(n) for n in ("u", "delta", "A", "B", "C", "D", "z", "bias"))
    found, found_last, states = kernels.scan_forward(u, delta, A, B, C, D, z, bias, softplus, reverse, True)
    gradient = dlast.float().to(DEVICE) if options["last"] else None
    grads = kernels.scan_backward(
        dout.to(dtype).to(DEVICE), gradient, u, delta, A, B, C, D, z, bias, states, softplus, reverse
    )
    tolerance = TOLERANCE[dtype]
    assert found.dtype == dtype
    assert found.stride() == u.stride()
    assert error(found, out) < tolerance
    assert error(found_last, last) < 1e-6
    order = ("u", "delta", "A", "B", "C", "D", "z", "bias")
    by_name = dict(zip(order, grads, strict=True))
    for name, want in zip(names, wants, strict=True):
        assert by_name[name].shape == want.shape
        assert error(by_name[name], want) < tolerance, name
    assert all(by_name[name] is None for name in order if name not in names)


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


def forward_in(tiling: plan.ForwardTiling):
    """A plan that always chooses `tiling`, with the blocks of states that the state at hand needs."""

    def choose(sequences, groups, group_dim, length, state, processors):
        return tiling._replace(block_n=plan.power_of_two(state))

    return choose


@pytest.fixture(params=["channel", "time"])
def either_way(request, monkeypatch):
    """A thread for each channel, and 4 threads a channel along time; 4 or 8 steps each."""
    tiling = plan.ForwardTiling(32, 1, 8, 0) if request.param == "channel" else plan.ForwardTiling(8, 4, 8, 0)
    monkeypatch.setattr(plan, "forward_tiling", forward_in(tiling))


@interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scan(case, reverse, either_way):
    check_scan(scan_case(**case), reverse=reverse)


@interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_scan_over_several_chunks(reverse, short_chunks, either_way):
    check_scan(scan_case(batch=2, dim=3, length=37, state=3), reverse=reverse)


@interpreted
@pytest.mark.parametrize("time", [1, 2, 8, 16])
def test_threads_along_time(time, monkeypatch):
    """Turns of 16 to 256 steps, of which the states before every 64 are kept."""
    monkeypatch.setattr(plan, "forward_tiling", forward_in(plan.ForwardTiling(32 // time, time, 16, 0)))
    check_scan(scan_case(dim=3, length=150, state=3) | {"z": None})


@interpreted
@pytest.mark.parametrize("lanes_first", [False, True])
def test_tiles_of_older_and_newer_compilers(lanes_first, monkeypatch, short_chunks):
    monkeypatch.setattr(scan, "LANES_FIRST", lanes_first)
    monkeypatch.setattr(plan, "forward_tiling", forward_in(plan.ForwardTiling(32, 1, 8, 0)))
    check_scan(scan_case(dim=41, length=19, state=3))


@interpreted
def test_parts_instead_of_atomics(monkeypatch):
    """The deterministic backward pass, of two groups with several blocks of channels each."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_scan(scan_case(dim=80, length=5, state=2, groups=2))


@interpreted
def test_nothing_passes_from_one_sequence_to_the_next():
    """The steps past the end of a sequence, where the next one lies in memory, do not reach it."""
    case = scan_case(batch=2, length=11)
    u, delta, A, B, C, D, z, bias = (case[k].float().to(DEVICE) for k in case if k != "options")
    arguments = [u, delta, A, B, C, D, z, bias]
    for tensor in (u, delta, B, C, z):
        tensor[1] = float("nan")
    for tiling in (plan.ForwardTiling(32, 1, 8, 4), plan.ForwardTiling(8, 4, 8, 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "forward_tiling", lambda *_, tiling=tiling: tiling)
            for reverse in (False, True):
                out, last, _ = kernels.scan_forward(*arguments, True, reverse, False)
                assert out[0].isfinite().all()
                assert last[0].isfinite().all()
                assert out[1].isnan().all()


@interpreted
@pytest.mark.parametrize("missing", ["D", "z", "bias", "softplus"])
def test_scan_options(missing, either_way):
    case = scan_case()
    if missing in case:
        case[missing] = None
    if missing == "softplus":
        case["delta"] = case["delta"].abs() + 1e-3
        case["bias"] = case["bias"].abs()
    check_scan(case, softplus=missing != "softplus")


@interpreted
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
def test_scan_in_segments_of_time(gate, reverse, monkeypatch, short_chunks):
    monkeypatch.setattr(plan, "forward_tiling", forward_in(plan.ForwardTiling(32, 1, 8, 0)))
    tiling = plan.backward_tiling
    monkeypatch.setattr(plan, "backward_tiling", lambda *args: tiling(*args)._replace(segment=8))
    case = scan_case(dim=2, length=19, state=2)
    if not gate:
        case["z"] = None
    check_scan(case, reverse=reverse)


@interpreted
def test_scan_takes_channels_that_are_not_contiguous():
    case = scan_case()
    case["u"], case["z"] = case["u"].contiguous(), case["z"].contiguous()
    check_scan(case)


@interpreted
def test_small_steps_keep_their_precision():
    """softplus(-15) is 3e-7: computed as log(1 + exp(x)) in float32 it would be wrong by a fifth."""
    u, delta = rand(1, 3, 4), torch.full((1, 3, 4), -15.0)
    A, matrix = -torch.ones(3, 2), torch.ones(3, 2)
    give = [t.float().to(DEVICE) for t in (u, delta, A, matrix, matrix)]
    out, *_ = kernels.scan_forward(*give, None, None, None, True, False, False)
    truth = reference.selective_scan(*(t.double().cpu() for t in give), delta_softplus=True)
    assert error(out, truth) < 1e-6


@interpreted
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


@interpreted
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


@interpreted
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
    out, states = kernels.mixer_forward(given, *flat(single), 0.5, True)
    dxz, grads = kernels.mixer_backward(dout.float().to(DEVICE), given, *flat(single), states, 0.5)
    assert error(out, truth) < 1e-6
    for got, want in zip([dxz, *grads], wants, strict=True):
        assert error(got, want) < 2e-6
    assert torch.equal(out, kernels.mixer_forward(given, *flat(single), 0.5, False)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_at_full_size(reverse, dtype):
    check_scan(scan_case(batch=2, dim=384, length=6085, state=16, dtype=dtype), reverse=reverse)


@pytest.fixture(scope="module")
def on_gpu():
    """Vim-Ti at 384 px on the GPU, images, and its logits from the plain PyTorch backend in float32."""
    torch.manual_seed(0)
    model = vimamba.create_model("vim_tiny_patch16_224", img_size=384).eval()
    images = torch.randn(2, 3, 384, 384)
    with torch.no_grad():
        logits = model(images)
    return model.cuda(), images.cuda(), logits


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_model_agrees_with_the_cpu(on_gpu):
    model, images, logits = on_gpu
    with torch.no_grad():
        assert error(model(images), logits.double()) < 1e-4
        with torch.autocast("cuda", torch.bfloat16):
            assert error(model(images), logits.double()) < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("train", [False, True])
def test_model_compiles(on_gpu, train):
    model, images, _ = on_gpu
    compiled = torch.compile(model, fullgraph=True)
    with torch.set_grad_enabled(train):
        out, want = compiled(images), model(images)
    assert error(out, want.double().cpu()) < 1e-4
    if train:
        found, wants = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (out, want))
        for got, grad in zip(found, wants, strict=True):
            assert error(got, grad.double().cpu()) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_model_in_a_cuda_graph(on_gpu):
    """Captured once, replayed on other images."""
    model, images, logits = on_gpu
    given = torch.zeros_like(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(side):
            model(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(given)
    given.copy_(images)
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, logits.double()) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_deterministic_backward_pass(on_gpu):
    model, images, _ = on_gpu

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))

    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, gradients(), gradients()))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_first_call_is_soon_done():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    forward, step = gpu.time_first_call("cuda")
    assert forward < step < gpu.FIRST_CALL_SECONDS


def test_refusals_name_the_way_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in kernels.unavailable(torch.device("cpu"))
    assert "'mps'" in kernels.unavailable(torch.device("mps"))
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    assert "not installed" in kernels.unavailable()


def test_plan_fills_the_machine():
    """Few channels get threads along time, many none, and every tiling fits in the registers."""
    assert plan.forward_tiling(2, 1, 384, 6085, 16, 132).time >= 8
    assert plan.forward_tiling(512, 1, 384, 6085, 16, 132).time == 1
    for sequences in (1, 8, 64, 512):
        for length in (1, 197, 6085):
            for state in (1, 16, 64, 200):
                forward = plan.forward_tiling(sequences, 1, 384, length, state, 132)
                assert forward.warps() <= 4
                assert pack.PADDING.value % (forward.time * forward.unroll) == 0
                backward = plan.backward_tiling(sequences, 1, 384, length, state, 132)
                assert backward.updates <= 32
                assert backward.segment % scan.CHUNK == 0 or backward.segments(length) == 1
    assert plan.backward_tiling(2, 1, 384, 6085, 16, 132).segments(6085) > 8
