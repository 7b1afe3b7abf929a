"""The Triton kernels compiled ahead of time, and on a GPU; `interpreted/` has what needs neither."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import vimamba
from tests.ops.triton_cases import ON_GPU, check_scan, error, kernels, scan_case
from vimamba.ops import sizes, triton
from vimamba.ops.triton import tiling

ROOT = Path(__file__).resolve().parents[2]


ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "gfx942"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the kernels of a training step come to, for every architecture; no GPU is needed."""
    rows = tmp_path_factory.mktemp("compiled") / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_static.py"), "--json", str(rows)]
    command += ["--arch", *ARCHITECTURES]
    command += ["--case", "Vim-S 224 px, batch 64, training", "odd sizes, float32, training"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rows.exists(), result.stdout[-4000:] + result.stderr[-2000:]
    return json.loads(rows.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)  # sm_75 has no bfloat16 units
def test_kernels_compile_without_spills(arch, compiled):
    found = [row for row in compiled if row["arch"] == arch]
    assert {row["kernel"] for row in found} >= {
        "scan_forward_kernel", "scan_backward_kernel", "conv_backward_kernel", "pack_kernel",
    }  # fmt: skip
    # ptxas may give up two registers for another warp, as that of Triton 3.8 does for sm_75; real spills are hundreds.
    assert {row["kernel"]: row["spilled_bytes"] for row in found if row["spilled_bytes"] > 8} == {}


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
    monkeypatch.setattr(triton, "AVAILABLE", False)
    assert "not installed" in kernels.unavailable()


def test_tilings_fill_the_machine():
    """Few sequences are cut into segments of time, many are not, and every tiling fits in the registers."""
    assert tiling.forward_tiling(2, 1, 384, 6085, 16, 132).segments(6085) > 8
    assert tiling.forward_tiling(512, 1, 384, 6085, 16, 132).segments(6085) == 1
    for sequences in (1, 8, 64, 512):
        for length in (1, 197, 6085):
            for state in (1, 16, 64, 200):
                forward = tiling.forward_tiling(sequences, 1, 384, length, state, 132)
                assert forward.warps() <= 4
                assert sizes.CHUNK % forward.unroll == 0
                backward = tiling.backward_tiling(sequences, 1, 384, length, state, 132)
                assert backward.updates <= 32
                for tile in (forward, backward):
                    assert tile.segment % sizes.CHUNK == 0 or tile.segments(length) == 1
    assert tiling.backward_tiling(2, 1, 384, 6085, 16, 132).segments(6085) > 8
