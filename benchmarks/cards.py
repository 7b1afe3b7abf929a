"""Data sheets of GPUs: what the floors and the predictions of the GPU benchmarks are computed from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """Lanes a cycle and multiprocessor of each unit; CUDA C++ Programming Guide, arithmetic throughput table."""

    name: str
    processors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second, data sheet
    products: float  # operations a second of the tensor cores in 16 bits, dense, data sheet
    lanes: dict[str, int] = field(default_factory=lambda: {"issue": 128, "mufu": 16, "fma": 128, "alu": 64, "lsu": 32})


CARDS = {
    "T4": Card("T4", 40, 1.59e9, 3.2e11, 65e12, {"issue": 128, "mufu": 16, "fma": 64, "alu": 64, "lsu": 16}),
    "A100": Card(
        "A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 312e12, {"issue": 128, "mufu": 16, "fma": 64, "alu": 64, "lsu": 32}
    ),
    "H100": Card("H100 SXM", 132, 1.755e9, 3.35e12, 989e12),
    "H200": Card("H200 SXM", 132, 1.755e9, 4.8e12, 989e12),
}
"""By what stands in the name of the device. T4: data sheet 2018; A100: whitepaper 2020; H100: whitepaper 2022, clock as
observed under load; H200: data sheet 2024."""


def card_of(device: str) -> Card:
    """The card of that name, or the A100 where it is not in the table."""
    return next((card for name, card in CARDS.items() if name in device), CARDS["A100"])
