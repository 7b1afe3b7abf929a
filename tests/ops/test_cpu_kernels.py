"""What only the CPU kernels have: instruction sets, threads, processes, odd memory and extreme values.

That they compute the right thing over shapes, types and options is tested with the other backends in this folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vimamba.ops import backends, reference
from vimamba.ops.cpu import library
from vimamba.ops.direction import Direction, directions_of, flat

cpu = backends.load("cpu")

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

# Float32 sums of a few hundred terms, taken in another order than the reference's float64 ones.
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 3e-6  # of the mixer's weights: such sums of such sums


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(batch=2, dim=40, length=70, state=16, seed=0) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    u, delta, z = (rand(batch, length, dim).transpose(1, 2) for _ in range(3))
    x_dbl = rand(batch, length, 3 + 2 * state)
    B, C = (x_dbl[..., i : i + state].transpose(1, 2)[:, None] for i in (3, 3 + state))
    A, D, bias = -rand(dim, state).exp(), rand(dim), rand(dim) - 3
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": bias}


def forward(x, reverse=False, save_states=False):
    return cpu.scan_forward(*x.values(), True, reverse, save_states)


def forward_and_backward(x, reverse=False):
    out, last, states = forward(x, reverse, True)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape[0], out.shape[2], out.shape[1]).transpose(1, 2)
    grads = cpu.scan_backward(dout, torch.ones_like(last), *x.values(), states, True, reverse)
    return dout, out, last, grads


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def check(x, reverse=False) -> None:
    dout, out, last, grads = forward_and_backward(x, reverse)
    wide = {k: None if v is None else v.detach().double().requires_grad_() for k, v in x.items()}
    want_out, want_last = reference.selective_scan(*wide.values(), True, True, reverse=reverse)
    leaves = [v for v in wide.values() if v is not None]
    want = iter(torch.autograd.grad((want_out * dout).sum() + want_last.sum(), leaves))
    assert error(out, want_out.detach()) < TOLERANCE
    assert error(last, want_last.detach()) < TOLERANCE
    for name, grad in zip(x, grads, strict=True):
        assert (grad is None) == (x[name] is None)
        if grad is not None:
            assert error(grad, next(want)) < TOLERANCE, name


def test_an_instruction_set_can_be_forced_by_a_variable(each_set, monkeypatch):
    for other in library.instruction_sets():
        library.use_instruction_set(other)
        monkeypatch.setenv("VIMAMBA_CPU", each_set)
        assert library._load() is None  # as when it is imported
        assert library.instruction_set() == each_set


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("VIMAMBA_CPU", "sse9")
    assert "VIMAMBA_CPU=sse9" in library._load()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dim", "state"), [(5, 6), (16, 16), (40, 21), (40, 1)])
def test_scan_and_gradients(dim, state, reverse, each_set):
    check(inputs(dim=dim, state=state), reverse)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_numbers(count, threads, each_set):
    x = inputs(batch=2, dim=96)
    threads(1)
    _, out, last, grads = forward_and_backward(x)
    threads(count)
    _, out_again, last_again, grads_again = forward_and_backward(x)
    assert torch.equal(out, out_again)
    assert torch.equal(last, last_again)
    for grad, again in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(again, grad, rtol=1e-5, atol=1e-5)  # B's and C's: sums over channels in parts


def make_directions(dim, rank, state) -> list[Direction]:
    g = torch.Generator().manual_seed(3)
    shapes = [(dim, 4), (dim,), (rank + 2 * state, dim), (dim, rank), (dim,), (dim, state), (dim,)]
    scales = [0.5, 0.1, dim**-0.5, rank**-0.5, 1, 1, 1]
    ways = []
    for reverse in (False, True):
        weights = [torch.randn(*s, generator=g) * f for s, f in zip(shapes, scales, strict=True)]
        weights[4] -= 3
        ways.append(Direction(*weights, reverse, reverse))
    return ways


@cache
def mixer_problem(batch: int, length: int) -> tuple[Tensor, list[Direction], list[Tensor]]:
    """xz, two directions, and the true output of both, of the first and of the second alone."""
    xz = torch.randn(batch, length, 2 * 40, generator=torch.Generator().manual_seed(length))
    ways = make_directions(40, 3, 16)
    wide = [Direction(*(w.double() for w in way.weights), *way[7:]) for way in ways]
    first, second = (reference.mixer(xz.double(), [way], 0.5) for way in wide)
    return xz, ways, [first + second, first, second]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (1, 70), (1, 135), (2, 66), (3, 33)])
def test_the_mixer_however_its_work_is_divided(batch, length, count, threads, each_set):
    threads(count)
    xz, ways, truths = mixer_problem(batch, length)
    for some, truth in zip((ways, ways[:1], ways[1:]), truths, strict=True):
        out, states = cpu.mixer_forward(xz, *flat(some), 0.5, None, True)
        assert error(out, truth) < TOLERANCE
        for way, saved in zip(some, states, strict=True):
            check_states(xz, way, saved)


def check_states(xz_BLE: Tensor, way: Direction, saved_BKDN: Tensor) -> None:
    """The states that the mixer saves are those that its scan alone would."""
    x_BDL = xz_BLE.transpose(1, 2).chunk(2, dim=1)[0]
    c_BDL = cpu.conv_forward(x_BDL, way.conv_weight, way.conv_bias, True, way.conv_reverse)
    rank, state = way.dt_proj_weight.shape[1], way.A_log.shape[1]
    dt, B, C = (c_BDL.transpose(1, 2) @ way.x_proj_weight.t()).split([rank, state, state], dim=-1)
    delta_BDL = (dt @ way.dt_proj_weight.t()).transpose(1, 2)
    B, C = B.transpose(1, 2)[:, None], C.transpose(1, 2)[:, None]
    alone = (c_BDL, delta_BDL, way.decay_rates, B, C, way.D, None, way.dt_bias, True, way.scan_reverse, True)
    torch.testing.assert_close(saved_BKDN, cpu.scan_forward(*alone)[2], rtol=1e-4, atol=1e-5)


@cache
@cache
def mixer_gradients(batch: int, length: int, reverse: tuple[int, ...]) -> tuple[Tensor, Tensor, list, list[Tensor]]:
    """xz, dout, the flat directions and the true gradients of xz and of all weights."""
    xz, ways, _ = mixer_problem(batch, length)
    dout = torch.randn(batch, length, 40, generator=torch.Generator().manual_seed(batch))
    weights = [*flat(ways)[0], *(w.flip(0) for w in ways[0].weights)][: 7 * len(reverse)]
    wide = [t.double().requires_grad_() for t in (xz, *weights)]
    out = reference.mixer(wide[0], directions_of(wide[1:], reverse), 0.5)
    return xz, dout, weights, list(torch.autograd.grad(out, wide, dout.double()))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 135), (2, 66), (3, 33)])
def test_the_gradients_of_the_mixer_however_its_work_is_divided(batch, length, count, threads, each_set):
    """Seven threads leave the fused kernels too few sequences; 1 and 2 are convolution and scan in opposite ways."""
    threads(count)
    for reverse in ((0, 3), (3,), (0, 1, 2)):
        xz, dout, weights, truths = mixer_gradients(batch, length, reverse)
        _, states = cpu.mixer_forward(xz, weights, reverse, 0.5, None, True)
        dxz, grads = cpu.mixer_backward(dout, xz, weights, reverse, states, 0.5)
        for found, truth in zip((dxz, *grads), truths, strict=True):
            assert error(found, truth) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("width", [1, 3, 16, 17])
def test_the_gradients_of_the_mixer_with_other_convolutions(width):
    """The kernels take up to 16 taps."""
    (xz, dout, weights, _), reverse = mixer_gradients(2, 66, (0, 3)), (0, 3)
    weights = [torch.randn(40, 1, width) / 2 if i % 7 == 0 else w for i, w in enumerate(weights)]
    wide = [t.double().requires_grad_() for t in (xz, *weights)]
    truths = torch.autograd.grad(reference.mixer(wide[0], directions_of(wide[1:], reverse), 0.5), wide, dout.double())
    _, states = cpu.mixer_forward(xz, weights, reverse, 0.5, None, True)
    dxz, grads = cpu.mixer_backward(dout, xz, weights, reverse, states, 0.5)
    for found, truth in zip((dxz, *grads), truths, strict=True):
        assert found.shape == truth.shape
        assert error(found, truth) < GRADIENT_TOLERANCE


def test_gradients_of_a_bfloat16_mixer_are_close(each_set):
    xz, dout, weights, truths = mixer_gradients(2, 66, (0, 3))
    xz, dout = xz.bfloat16(), dout.bfloat16()
    _, states = cpu.mixer_forward(xz, weights, (0, 3), 0.5, None, True)
    dxz, grads = cpu.mixer_backward(dout, xz, weights, (0, 3), states, 0.5)
    assert dxz.dtype == torch.bfloat16
    for found, truth in zip((dxz, *grads), truths, strict=True):
        assert error(found, truth) < 1e-2


def frozen_truth(xz_BLE, dout_BLD, weights, reverse, gates_BLR) -> Tensor:
    """The gradient of x in float64, with delta, B, C, z and the sigmoids detached; half of the directions' sum."""
    xz_BEL = xz_BLE.double().transpose(1, 2)
    x_BDL, z_BDL = xz_BEL[:, :40].requires_grad_(), xz_BEL[:, 40:]
    total_BDL = torch.zeros_like(z_BDL)
    for r, way in enumerate(directions_of([w.double() for w in weights], reverse)):
        taps_DW = way.conv_weight.flatten(1)
        sum_BDL = reference.causal_conv1d(x_BDL, taps_DW, way.conv_bias, reverse=way.conv_reverse)
        c_BDL = sum_BDL * sum_BDL.detach().sigmoid()
        dt_BRL, B_BNL, C_BNL = (way.x_proj_weight @ c_BDL.detach()).split([3, 16, 16], dim=1)
        y_BDL = reference.selective_scan(
            c_BDL, way.dt_proj_weight @ dt_BRL, way.decay_rates, B_BNL, C_BNL, way.D, z_BDL, way.dt_bias, True,
            reverse=way.scan_reverse,
        )  # fmt: skip
        total_BDL = total_BDL + (y_BDL if gates_BLR is None else y_BDL * gates_BLR[:, None, :, r])
    return torch.autograd.grad(0.5 * total_BDL, x_BDL, dout_BLD.double().transpose(1, 2))[0].transpose(1, 2)


@cache
def frozen_case(batch: int, length: int, reverse: tuple[int, ...], gated: str) -> tuple:
    """xz, dout, the flat directions, their gates and the true gradient of xz's first half."""
    xz, dout, weights, _ = mixer_gradients(batch, length, reverse)
    steps = {"no": 0, "images": 1, "tokens": length}[gated]
    gates = torch.rand(batch, steps, len(reverse), generator=torch.Generator().manual_seed(1)) if steps else None
    return xz, dout, weights, gates, frozen_truth(xz, dout, weights, reverse, gates)


@pytest.mark.parametrize("gated", ["no", "images", "tokens"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 135), (2, 66), (3, 33)])
def test_the_frozen_gradient_however_its_work_is_divided(batch, length, count, gated, threads, each_set):
    threads(count)
    for reverse in ((0, 3), (3,), (0, 1, 2)):
        xz, dout, weights, gates, truth = frozen_case(batch, length, reverse, gated)
        kernel = torch.ops.vimamba_cpu.mixer_frozen_backward
        assert error(kernel(dout, xz, weights, reverse, 0.5, gates).sum(0), truth) < TOLERANCE
        found = kernel(dout.bfloat16(), xz.bfloat16(), weights, reverse, 0.5, gates)
        assert found.dtype == torch.bfloat16
        assert error(found.sum(0), truth) < 1e-2


@pytest.mark.parametrize("width", [1, 3, 16])
def test_the_frozen_gradient_with_other_convolutions(width):
    xz, dout, weights, _ = mixer_gradients(2, 66, (0, 3))
    weights = [torch.randn(40, 1, width) / 2 if i % 7 == 0 else w for i, w in enumerate(weights)]
    found = cpu.mixer_frozen_backward(dout, xz, weights, (0, 3), 0.5, None)
    assert error(found, frozen_truth(xz, dout, weights, (0, 3), None)) < TOLERANCE


def test_there_is_no_kernel_for_the_frozen_gradient_of_a_wide_convolution_or_many_threads(threads):
    xz, dout, weights, _ = mixer_gradients(1, 135, (0, 3))
    threads(5)
    assert cpu.mixer_frozen_backward(dout, xz, weights, (0, 3), 0.5, None) is None
    threads(4)
    assert cpu.mixer_frozen_backward(dout, xz, weights, (0, 3), 0.5, None) is not None
    weights = [torch.randn(40, 1, 17) if i % 7 == 0 else w for i, w in enumerate(weights)]
    assert cpu.mixer_frozen_backward(dout, xz, weights, (0, 3), 0.5, None) is None


def test_bfloat16_mixer_is_close(each_set):
    xz, ways, (truth, _, _) = mixer_problem(2, 66)
    out, _ = cpu.mixer_forward(xz.bfloat16(), *flat(ways), 0.5, None, False)
    assert out.dtype == torch.bfloat16
    assert error(out, truth) < 5e-3


SOFTWARE = {
    "portable": (),
    "amx": ("-DVIMAMBA_AMX", "-include", "software_tiles.h"),
    "avx512": ("-DVIMAMBA_AVX512", "-mavx2", "-mfma", "-Wno-psabi", "-include", "software_avx512.h"),
}
SOFTWARE["avx512_bf16"] = (*SOFTWARE["avx512"], "-DVIMAMBA_AVX512_BF16")


@pytest.mark.compiled
@pytest.mark.parametrize("name", SOFTWARE)
def test_the_kernels_alone_under_the_sanitizers(tmp_path, name):
    """Without Python or PyTorch, as CONTRIBUTING.md runs them in valgrind; AVX-512 and AMX in software."""
    if name.startswith("avx512") and "avx2" not in library.instruction_sets():
        pytest.skip("the software of AVX-512 is made of AVX2's vectors")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    kernels, program = Path(library.__file__).parent, tmp_path / "alone"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    sources = [str(Path(__file__).with_name("cpu_kernels_alone.cpp")), str(kernels / "kernels.cpp")]
    software = [str(Path(__file__).with_name(part)) if part.endswith(".h") else part for part in SOFTWARE[name]]
    command = [compiler, "-std=c++20", "-O1", f"-I{kernels}", *software, *sources, "-o", str(program)]
    if subprocess.run([*command, *sanitizers], capture_output=True, check=False).returncode:
        subprocess.run(command, check=True)  # a compiler without the sanitizers' libraries
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_misaligned_memory(each_set):
    x = inputs(dim=24)
    for name in ("u", "delta", "z"):
        whole = torch.zeros(2, 70, 61)
        whole[..., 5:29] = x[name].transpose(1, 2)
        x[name] = whole[..., 5:29].transpose(1, 2)
    x["A"] = torch.cat([torch.zeros(1), x["A"].flatten()])[1:].view(24, 16)
    check(x)


def test_overlapping_memory(each_set):
    x = inputs(dim=24)
    x["u"] = x["u"][:, :, :1].expand(-1, -1, 70)
    x["z"] = x["z"][:1].expand(2, -1, -1)
    x["B"] = x["B"][:, :, :, :1].expand(-1, -1, -1, 70)
    x["delta"] = x["delta"][:, :1].expand(-1, 24, -1)
    check(x)


def test_the_fast_layout_keeps_its_layout():
    x = inputs(dim=24)
    xz = torch.randn(2, 70, 48)
    x["u"] = xz[..., :24].transpose(1, 2)
    out, _, _ = forward(x)
    assert out.stride(1) == 1


def test_steps_so_large_that_the_decay_underflows(each_set):
    x = inputs()
    x["delta"] = x["delta"] * 1e4
    check(x)


def test_no_decay(each_set):
    x = inputs(length=40)
    x["A"] = torch.zeros_like(x["A"])
    check(x)


def test_growth_that_overflows_is_infinite(each_set):
    x = inputs(length=40)
    x["A"] = x["A"].abs() * 1e3
    found, truth = forward(x)[0], reference.selective_scan(*x.values(), True)
    assert torch.equal(found.isfinite(), truth.isfinite())


NAN, INF = float("nan"), float("inf")
# Not A = -inf: an infinite decay is taken as a very large one, 0 instead of the NaN of exp(0 * -inf).
BAD_NUMBERS = [
    (name, bad)
    for name in ("u", "delta", "B", "C", "z", "A", "bias", "D")
    for bad in (NAN, INF, -INF)
    if (name, bad) != ("A", -INF)
]


@pytest.mark.parametrize(("name", "bad"), BAD_NUMBERS)
def test_bad_numbers_come_out_where_the_reference_has_them(name, bad, each_set):
    x = inputs(batch=1, dim=20, length=40)
    x[name] = x[name].clone(memory_format=torch.preserve_format)
    x[name][(0,) * x[name].dim()] = bad
    found, truth = forward(x)[0], reference.selective_scan(*x.values(), True)
    assert torch.equal(found.isfinite(), truth.isfinite())


def test_nothing_to_do():
    for x in (inputs(batch=0), inputs(length=1)):
        _, out, last, grads = forward_and_backward(x)
        assert out.shape == x["u"].shape
        assert last.shape == (x["u"].shape[0], 40, 16)
        assert [g.shape for g in grads] == [v.shape for v in x.values()]


def test_several_python_threads_at_once():
    problems = [inputs(seed=seed) for seed in range(8)]
    alone = [forward(x)[0] for x in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: forward(x)[0], problems * 4))
    for i, out in enumerate(together):
        assert torch.equal(out, alone[i % 8])


class Scans(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return forward(inputs(seed=index))[0]


def test_in_a_forked_data_loader_worker():
    alone = [forward(inputs(seed=i))[0] for i in range(4)]  # the parent has used its threads before the fork
    loader = torch.utils.data.DataLoader(Scans(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for out, want in zip(loader, alone, strict=True):
        assert torch.equal(out[0], want)


def test_the_operators_themselves_refuse_sizes_that_they_would_read_beyond():
    """Whoever calls vimamba_cpu.* without the public functions gets an error, not another tensor's memory."""
    x = inputs(batch=1, dim=8, length=9, state=4)
    for name, value in {
        "delta": x["delta"][:, :, :8], "A": x["A"].double(), "B": x["B"][:, :, :3], "D": x["D"][:1],
        "z": x["z"].bfloat16(), "bias": torch.zeros(7),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match="vimamba_cpu: "):
            forward(x | {name: value})
    norm = torch.ops.vimamba_cpu.norm_forward
    rows = torch.zeros(2, 3)
    for given, residual, message in (
        (torch.zeros(2, 0), None, "x is not"), (rows, rows[:1], "residual has not"), (rows.double(), None, "x is not"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"vimamba_cpu: {message}"):
            norm(given, residual, torch.ones(given.shape[1]), 1e-5, torch.float32)
    with pytest.raises(RuntimeError, match="vimamba_cpu: x is not"):
        torch.ops.vimamba_cpu.linear(torch.zeros(4, 0), torch.zeros(3, 0), None)
    weights, reverse = flat(make_directions(8, 3, 4))
    xz, mix = torch.zeros(1, 9, 16), torch.ops.vimamba_cpu.mixer_forward
    for i in range(7):
        spoilt = [w[:1] if j == 7 + i else w for j, w in enumerate(weights)]
        with pytest.raises(RuntimeError, match="vimamba_cpu: "):
            mix(xz, spoilt, reverse, 1.0, None, False)
    back, dout, states = torch.ops.vimamba_cpu.mixer_backward, torch.zeros(1, 9, 8), torch.zeros(2, 1, 1, 8, 4)
    for i in range(7):
        spoilt = [w[:1] if j == 7 + i else w for j, w in enumerate(weights)]
        with pytest.raises(RuntimeError, match="vimamba_cpu: "):
            back(dout, xz, spoilt, reverse, states, 1.0)
    for bad_dout, bad_states, message in (
        (dout[:, :8], states, "dout"), (dout.bfloat16(), states, "dout"), (dout, states[:1], "states"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"vimamba_cpu: {message}"):
            back(bad_dout, xz, weights, reverse, bad_states, 1.0)
    frozen = torch.ops.vimamba_cpu.mixer_frozen_backward
    for bad_dout, gates in ((dout[:, :8], None), (dout.bfloat16(), None), (dout[0], None), (dout, torch.ones(1, 5, 2))):
        with pytest.raises(RuntimeError, match="vimamba_cpu: "):
            frozen(bad_dout, xz, weights, reverse, 1.0, gates)
    with pytest.raises(RuntimeError, match="vimamba_cpu: the mixer needs"):
        mix(xz, [], [], 1.0, None, False)
    with pytest.raises(RuntimeError, match="vimamba_cpu: gates"):
        mix(xz, weights, reverse, 1.0, torch.ones(1, 5, 2), False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer's allocator ends the process")
def test_a_failed_allocation_leaves_nothing_behind():
    """Working memory that cannot be had is an error, and the next call, smaller or larger, has its own."""
    script = """
import resource, torch
from vimamba.ops import backends

cpu = backends.load("cpu")

def scan(dim, state):
    x, matrix = torch.ones(1, dim, 1), torch.ones(1, 1, state, 1)
    return cpu.scan_forward(x, x, -torch.ones(dim, state), matrix, matrix, None, None, None, False, False, False)[0]

torch.set_num_threads(1)
small = scan(64, 16)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)
try:
    scan(4096, 2048)
except (RuntimeError, MemoryError):
    print("refused", torch.equal(scan(64, 16), small), bool(scan(128, 256).isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused", "True", "True"], done.stdout + done.stderr
