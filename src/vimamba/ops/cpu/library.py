"""The shared library of C++ kernels: loading it, and the instruction set that it uses: portable, AVX2, AVX-512,
AVX-512 with products of bfloat16 and of 8-bit integers, or that with tiles of them (AMX).

VIMAMBA_CPU=amx|avx512_bf16|avx512|avx2|portable forces an instruction set, VIMAMBA_CPU_LIBRARY=FILE takes another build
of the kernels, such as the sanitized one of `make test-sanitized`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vimamba.errors import require
from vimamba.ops.sizes import CHUNK

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
wide_vectors = False
"""Whether the instruction set in use has vectors of 8 numbers or more."""
PATH = Path(os.environ.get("VIMAMBA_CPU_LIBRARY") or Path(__file__).parent / "_kernels.so").resolve()
"""The library's file."""
ONNX_PATH = PATH.with_name("_onnx.so")
"""The file of the one that ONNX Runtime loads."""


def _load() -> str | None:
    """Load the library; the reason why it cannot be, or None."""
    if not PATH.exists():
        return "the CPU kernels were not built (no C++20 compiler when vimamba was installed)"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"the CPU kernels do not load, install vimamba again: {error}"
    if not hasattr(torch.ops.vimamba, "mixer"):
        return "the CPU kernels are an earlier version's: install vimamba again"
    chunk = torch.ops.vimamba_cpu.chunk()
    if chunk != CHUNK:
        return f"the CPU kernels keep a state every {chunk} steps, this vimamba every {CHUNK}: install vimamba again"
    wanted = os.environ.get("VIMAMBA_CPU") or instruction_set()
    if wanted not in INSTRUCTION_SETS or not use_instruction_set(wanted):
        return f"VIMAMBA_CPU={wanted}: this machine runs {', '.join(instruction_sets())}"
    return None


def onnx_library() -> str:
    """The file of the operators for ONNX Runtime, which a model exported with `operator` vimamba needs.

    `onnxruntime.SessionOptions().register_custom_ops_library` takes it. It may be copied: it needs nothing of vimamba,
    nor of PyTorch.

    Raises:
        UserError: it was not built.
    """
    missing = (
        f"{ONNX_PATH}: the operators for ONNX Runtime were not built (no C++20 compiler when vimamba was installed)"
    )
    require(ONNX_PATH.exists(), f"{missing}; export without `operator` vimamba")
    return str(ONNX_PATH)


def instruction_set() -> str:
    """The instruction set in use."""
    return INSTRUCTION_SETS[torch.ops.vimamba_cpu.instruction_set(-1)]


def use_instruction_set(name: str) -> bool:
    """Use `name` from now on, in the whole process; False if this machine cannot run it."""
    global wide_vectors
    index = INSTRUCTION_SETS.index(name)
    used = torch.ops.vimamba_cpu.instruction_set(index)
    wide_vectors = INSTRUCTION_SETS[used] != "portable"
    return used == index


def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run."""
    current = instruction_set()
    usable = [name for name in INSTRUCTION_SETS if use_instruction_set(name)]
    use_instruction_set(current)
    return usable


UNAVAILABLE = _load()
"""Why the kernels cannot be used on this machine, or None."""
