"""What other libraries say of their own accord: tips, hints and advice, which are not the user's concern."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

TALKATIVE = (
    "lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero", "timm", "torch.distributed", "torch.utils.cpp_extension", "tifffile",
    "rasterio", "onnxscript", "onnx_ir", "torch.onnx",
)  # fmt: skip


def quiet_libraries() -> None:
    """Leave the terminal to our own lines from now on, for a process that is ours."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics|timm)(\.|$)")


@contextlib.contextmanager
def libraries_quiet() -> Iterator[None]:
    """The same while entered, in a process that is the user's."""
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
