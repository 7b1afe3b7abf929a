"""Scans for the Triton kernels, and what they are compared with."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vimamba.ops import backends, reference

kernels = backends.load("triton")

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
# float32: one rounding a step of sums of up to 200 steps, and exp2 within 2 ulp; bfloat16: one rounding at the end.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def error(found: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    return float((found.double().cpu() - truth).norm() / truth.norm().clamp_min(1e-30))


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of `dtype`, held in float64."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).double()


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
