"""The library of operators for ONNX Runtime, by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.export.test_export import small
from vimamba import onnx_library
from vimamba.errors import UserError
from vimamba.export import export_onnx
from vimamba.ops import Direction, mixer
from vimamba.ops.cpu import library
from vimamba.ops.direction import flat

pytestmark = pytest.mark.skipif(library.UNAVAILABLE is not None, reason=str(library.UNAVAILABLE))
WITHOUT_PYTORCH = """
import sys
sys.modules["torch"] = sys.modules["vimamba"] = None
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
print(*session.run(None, {"images": numpy.full((1, 3, 32, 32), 0.5, numpy.float32)})[0][0])
"""


def directions(dim: int, state: int, rank: int, width: int, turns: list[tuple[bool, bool]]) -> list[Direction]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(dim, 1, width), (dim,), (rank + 2 * state, dim), (dim, rank), (dim,), (dim, state), (dim,)]
    return [Direction(*(0.5 * torch.randn(size, generator=draw) for size in sizes), *turn) for turn in turns]


def session(given: list[Direction], gated: bool, scale: float, sizes: dict[int, tuple] | None = None, **attributes):
    """A graph of one mixer, whose weights are initialisers, one of them of another size."""
    weights, reverse = flat(given)
    names = [f"weight{i}" for i in range(len(weights))]
    node = helper.make_node(
        "Mixer", ["xz", "gates" if gated else "", *names], ["out"], domain="vimamba",
        **{"reverse": reverse, "scale": scale, **attributes},
    )  # fmt: skip
    tensors = [(sizes or {}).get(i, weight.shape) for i, weight in enumerate(weights)]
    initialisers = [
        helper.make_tensor(name, TensorProto.FLOAT, size, np.resize(weight.numpy(), size).ravel())
        for name, size, weight in zip(names, tensors, weights, strict=True)
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3) for name in ("xz", "gates")]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 3)
    graph = helper.make_graph([node], "mixer", inputs[: 1 + gated], [output], initialisers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("vimamba", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(onnx_library())
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("turns", [[(False, False)], [(False, False), (True, True)], [(False, True)] * 3], ids=len)
@pytest.mark.parametrize("gates", [None, "image", "token"])
@pytest.mark.parametrize(("batch", "length"), [(1, 70), (3, 1), (8, 5), (0, 4)])
def test_the_operator_is_the_mixer(turns, gates, batch, length):
    """Every way in which the work is divided, channels that do not fill a vector, and directions left out."""
    given, draw = directions(21, 5, 2, 4, turns), torch.Generator().manual_seed(1)
    xz = torch.randn(batch, length, 42, generator=draw)
    found = {"xz": xz.numpy()}
    weights = None
    if gates is not None:
        weights = torch.rand(batch, length if gates == "token" else 1, len(turns), generator=draw).round(decimals=1)
        weights[: batch // 2, :, 0] = 0
        found["gates"] = weights.numpy()
    out = session(given, gates is not None, 0.5).run(None, found)[0]
    wanted = mixer(xz, given, 0.5, weights, backend="reference")
    torch.testing.assert_close(torch.from_numpy(out), wanted, rtol=1e-4, atol=1e-5)


REFUSED = {
    "a weight has not the expected size": [((1, 6, 10), None, {}), ((1, 6, 8), None, {"sizes": {9: (3, 4)}})],
    "A_log not (D, N)": [((1, 6, 8), None, {"sizes": {5: (4,)}})],
    "xz is not (B, L, 2 D)": [((1, 6, 7), None, {})],
    "the gates are not (B, L or 1, directions)": [((1, 6, 8), (1, 2, 2), {}), ((1, 6, 8), (1, 6, 1), {})],
    "7 weights for each of `reverse`": [((1, 6, 8), None, {"reverse": [0]})],
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_graph_that_does_not_fit_is_refused(said):
    given = directions(4, 3, 2, 4, [(False, False), (True, True)])
    for size, gates, attributes in REFUSED[said]:
        found = {"xz": np.zeros(size, np.float32)} | ({} if gates is None else {"gates": np.ones(gates, np.float32)})
        with pytest.raises(Exception, match=re.escape(said)):
            session(given, gates is not None, 1.0, **attributes).run(None, found)


def test_a_program_without_pytorch(tmp_path):
    source = small()
    export_onnx(source, tmp_path / "model.onnx", operator="vimamba")
    copied = tmp_path / "operators.so"
    copied.write_bytes(library.ONNX_PATH.read_bytes())
    command = [sys.executable, "-c", WITHOUT_PYTORCH, copied, tmp_path / "model.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.defpath})
    with torch.inference_mode():
        wanted = source.model(torch.full((1, 3, 32, 32), 0.5))[0]
    assert [float(word) for word in done.stdout.split()] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_library_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "ONNX_PATH", tmp_path / "_onnx.so")
    with pytest.raises(UserError, match=r"were not built .* export without `operator` vimamba"):
        export_onnx(small(), tmp_path / "model.onnx", operator="vimamba")
    assert not list(tmp_path.iterdir())
