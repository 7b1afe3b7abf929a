"""Whether kernels are interpreted is settled when they are imported, so these tests have a pytest run of their own:

    TRITON_INTERPRET=1 pytest tests/ops/interpreted

as `make test` does. Any other run collects them where a GPU runs the compiled kernels, and only there.
"""

import importlib.util
import os

import torch

if importlib.util.find_spec("triton") is None or not (
    os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
):
    collect_ignore_glob = ["test_*.py"]
