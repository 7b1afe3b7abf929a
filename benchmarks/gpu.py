"""Vim against DeiT on this machine's GPU, in one command.

    PYTHONPATH=src python benchmarks/gpu.py [--quick] [--out gpu_results]

Needs torch, triton and timm. Checks the kernels against the plain loop in float64, then times, in bfloat16, a
forward pass and a training step of Vim-Ti and Vim-S at each resolution, at batch 1 and at the largest sensible
batch, against timm's DeiT with its attention written out ("eager") and with PyTorch's fused attention. Each side gets
the better of eager mode and torch.compile. Writes results.json, and plots where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimamba
from vimamba.ops import reference
from vimamba.ops import triton as kernels

SIZES = (224, 512, 1024, 1248, 2048)
PAIRS = {"tiny": ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
         "small": ("vim_small_patch16_224", "deit_small_patch16_224")}  # fmt: skip
MAX_BATCH = 256
MEMORY_SHARE = 0.8
"""The largest batch is doubled while the pass is expected to fit in this share of the memory."""

# Rates for the floor of the scan: multiprocessors and clock are read from the device; the rest is of the data sheets.
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
EXPONENTIALS_A_CYCLE = 16
FLOAT_LANES = {8: 64, 9: 128}


def median_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of `run` on the GPU, by events, after warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def scan_inputs(batch: int, dim: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """u, delta, A, B, C, D, z and the bias of delta, in the fast layout."""

    def sequence(width: int) -> Tensor:
        return torch.randn(batch, length, width, device="cuda").to(dtype).transpose(1, 2)

    A = -torch.arange(1, 17, device="cuda").float().expand(dim, -1).contiguous()
    return [
        sequence(dim), sequence(dim), A, sequence(16), sequence(16),
        torch.ones(dim, device="cuda"), sequence(dim), torch.full((dim,), -4.0, device="cuda"),
    ]  # fmt: skip


def check_kernels() -> dict[str, float]:
    """The largest relative error of outputs and gradients against float64, by type; stops the run if too large."""
    errors = {}
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        worst = 0.0
        for reverse in (False, True):
            inputs = [t.detach().requires_grad_() for t in scan_inputs(1, 384, 1001, dtype)]
            doubles = [t.detach().double().requires_grad_() for t in inputs]
            out = vimamba.selective_scan(*inputs, True, reverse=reverse, backend="triton")
            truth = reference.selective_scan(*doubles, True, reverse=reverse)
            weight = torch.randn_like(out)
            grads = torch.autograd.grad(out, inputs, weight)
            wants = torch.autograd.grad(truth, doubles, weight.double())
            worst = max(worst, error(out, truth), *(error(g, w) for g, w in zip(grads, wants, strict=True)))
        name = str(dtype).removeprefix("torch.")
        errors[name] = worst
        print(f"scan in {name}: relative error {worst:.1e} (limit {limit:.0e})")
        if worst > limit:
            sys.exit(f"the {name} kernels are wrong on this GPU: relative error {worst:.1e}, limit {limit:.0e}")
    return errors


def scan_floor(batch: int, dim: int, length: int, directions: int = 1) -> dict[str, float]:
    """The least seconds that the bytes, the exponentials and the multiply-adds of a scan in bfloat16 can take."""
    device = torch.cuda.get_device_properties(0)
    clock = getattr(device, "clock_rate", 1_755_000) * 1e3
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in device.name), 2.0e12)
    elements = directions * batch * dim * length
    bytes_moved = 2 * (3 * elements + directions * batch * length * 32)
    cycles = device.multi_processor_count * clock
    return {
        "memory": bytes_moved / bandwidth,
        "exponentials": elements * 16 / (cycles * EXPONENTIALS_A_CYCLE),
        "multiply-adds": elements * 16 * 4 / (cycles * FLOAT_LANES.get(device.major, 128)),
        "bytes": bytes_moved,
    }


def time_scan(batch: int = 16, dim: int = 384, length: int = 6085) -> dict[str, float]:
    """One scan forward and backward, against its floor."""
    u, delta, A, B, C, D, _, bias = scan_inputs(batch, dim, length, torch.bfloat16)
    with torch.no_grad():
        forward = median_seconds(lambda: vimamba.selective_scan(u, delta, A, B, C, D, None, bias, True))
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C, D, bias)]

    def step() -> None:
        out = vimamba.selective_scan(*leaves[:6], None, leaves[6], True)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    both = median_seconds(step)
    floor = scan_floor(batch, dim, length)
    least = max(floor[k] for k in ("memory", "exponentials", "multiply-adds"))
    gigabytes = floor["bytes"] / forward / 1e9
    print(f"scan ({batch}, {dim}, {length}): {1e3 * forward:.3f} ms forward, {1e3 * both:.3f} ms with backward; "
          f"floor {1e3 * least:.3f} ms ({least / forward:.0%} reached), {gigabytes:.0f} GB/s")  # fmt: skip
    return {"forward": forward, "step": both, "floor": least, "gigabytes_a_second": gigabytes} | floor


def deit(name: str, size: int, fused: bool) -> nn.Module:
    timm.layers.set_fused_attn(fused)
    model = timm.create_model(name, img_size=size)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


class Contender:
    """A model as the benchmark runs it: forward or training step at one batch, in bfloat16."""

    def __init__(self, model: nn.Module, size: int, train: bool) -> None:
        self.model = model.cuda().train(train)
        self.size, self.train = size, train
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True) if train else None

    def runner(self, batch: int, compiled: bool) -> Callable[[], object]:
        images = torch.randn(batch, 3, self.size, self.size, device="cuda")
        labels = torch.randint(1000, (batch,), device="cuda")
        model = torch.compile(self.model) if compiled else self.model

        def forward() -> object:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                return model(images)

        def step() -> object:
            assert self.optimizer is not None
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss

        return step if self.train else forward


def largest_batch(contender: Contender) -> int:
    """The largest power of two that is expected to fit, from the memory of batches 1 and 2."""
    total = torch.cuda.get_device_properties(0).total_memory
    peaks = []
    for batch in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        contender.runner(batch, False)()
        peaks.append(torch.cuda.max_memory_allocated())
    each = max(peaks[1] - peaks[0], 1)
    fitting = int((MEMORY_SHARE * total - peaks[0]) / each)
    return max(1, min(MAX_BATCH, 1 << max(0, fitting.bit_length() - 1)))


def measure(contender: Contender, batch: int, compile_too: bool) -> dict[str, object]:
    """Seconds an image (the better mode), which mode that was, and the peak memory of eager mode."""
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    modes = {"eager": median_seconds(contender.runner(batch, False))}
    peak = torch.cuda.max_memory_allocated() - base
    if compile_too:
        torch._dynamo.reset()
        modes["compile"] = median_seconds(contender.runner(batch, True))
    mode = min(modes, key=lambda name: modes[name])
    return {"batch": batch, "seconds": modes[mode], "images_a_second": batch / modes[mode], "mode": mode,
            "modes": modes, "peak_bytes": peak}  # fmt: skip


def contenders(pair: str, size: int) -> dict[str, Callable[[], nn.Module]]:
    vim, rival = PAIRS[pair]
    return {
        "vim": lambda: vimamba.create_model(vim, img_size=size),
        "vim, one direction": lambda: vimamba.create_model(vim, img_size=size, bidirectional="none"),
        "deit fused": lambda: deit(rival, size, True),
        "deit eager": lambda: deit(rival, size, False),
    }


def run_case(pair: str, size: int, train: bool, compile_too: bool) -> list[dict[str, object]]:
    """Every contender at one size: batch 1, and the largest batch that fits all but the written-out attention."""
    rows: list[dict[str, object]] = []
    shared = MAX_BATCH
    for name, build in contenders(pair, size).items():
        try:
            contender = Contender(build(), size, train)
            own = largest_batch(contender)
            shared = min(shared, own) if name != "deit eager" else shared
            for batch in sorted({1, min(shared, own)}):
                row = measure(contender, batch, compile_too)
                rows.append({"pair": pair, "size": size, "train": train, "model": name, **row})
                print(f"{pair:5} {size:4} px {'train' if train else 'infer'} {name:18} batch {batch:3}: "
                      f"{row['images_a_second']:9.1f} images/s ({row['mode']}), "
                      f"peak {row['peak_bytes'] / 2**20:8.0f} MB", flush=True)  # type: ignore[operator]  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            rows.append({"pair": pair, "size": size, "train": train, "model": name, "out_of_memory": True})
            print(f"{pair:5} {size:4} px {'train' if train else 'infer'} {name:18} out of memory", flush=True)
        contender = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def plot(rows: list[dict], folder: Path) -> None:
    """Throughput at the largest batch, and peak memory at batch 1, against resolution."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    for pair in PAIRS:
        for train in (False, True):
            mine = [r for r in rows if r["pair"] == pair and r["train"] == train and "seconds" in r]
            if not mine:
                continue
            figure, axes = plt.subplots(1, 2, figsize=(11, 4))
            for model in dict.fromkeys(r["model"] for r in mine):
                own = [r for r in mine if r["model"] == model]
                sizes = sorted({r["size"] for r in own})
                best = [max(r["images_a_second"] for r in own if r["size"] == s) for s in sizes]
                least = [min(r["peak_bytes"] for r in own if r["size"] == s) / 2**20 for s in sizes]
                axes[0].plot(sizes, best, marker="o", label=model)
                axes[1].plot(sizes, least, marker="o", label=model)
            for axis, title in zip(axes, ("images/s", "peak MB, batch 1"), strict=True):
                axis.set(xlabel="pixels", title=f"{pair}, {'training' if train else 'inference'}: {title}")
                axis.set_yscale("log")
                axis.legend()
            figure.tight_layout()
            figure.savefig(folder / f"{pair}_{'train' if train else 'infer'}.png", dpi=120)
            plt.close(figure)


def summarise(rows: list[dict]) -> None:
    """Vim against each DeiT and against its one-direction self, at the largest batch of each."""
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "images_a_second" in row:
            best = groups.setdefault((row["pair"], row["size"], row["train"]), {})
            best[row["model"]] = max(best.get(row["model"], 0.0), row["images_a_second"])
    for (pair, size, train), best in groups.items():
        if "vim" in best:
            parts = [f"{best['vim'] / best[m]:.2f}x {m}" for m in ("deit fused", "deit eager") if m in best]
            if "vim, one direction" in best:
                parts.append(f"second direction {best['vim, one direction'] / best['vim'] - 1:+.0%} time")
            print(f"{pair:5} {size:4} px {'train' if train else 'infer'}: " + ", ".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder for results.json and plots")
    parser.add_argument("--size", type=int, nargs="+", default=list(SIZES), help="pixels")
    parser.add_argument("--pair", nargs="+", default=list(PAIRS), choices=list(PAIRS), help="which models")
    parser.add_argument("--no-compile", action="store_true", help="eager mode only")
    parser.add_argument("--quick", action="store_true", help="tiny models at 224 and 1248 px, eager mode")
    options = parser.parse_args()
    reason = kernels.unavailable(torch.device("cuda"))
    if reason is not None:
        sys.exit(f"benchmarks/gpu.py needs a GPU: {reason}")
    if options.quick:
        options.size, options.pair, options.no_compile = [224, 1248], ["tiny"], True
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties(0)
    results: dict[str, object] = {"device": device.name, "torch": torch.__version__, "timm": timm.__version__}
    print(f"{device.name}, torch {torch.__version__}")
    results["errors"] = check_kernels()
    results["scan"] = time_scan()
    rows: list[dict] = []
    for pair in options.pair:
        for train in (False, True):
            for size in options.size:
                rows += run_case(pair, size, train, not options.no_compile)
                results["rows"] = rows
                (options.out / "results.json").write_text(json.dumps(results, indent=1))
    summarise(rows)
    plot(rows, options.out)


if __name__ == "__main__":
    main()
