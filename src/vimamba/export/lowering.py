"""The operators vimamba::* in an ONNX graph: as the node that `vimamba.onnx_library()` computes, or as standard ones.

torch.onnx writes the node; what stands in its place is put together here and not by PyTorch's tracing, which takes five
times as long, and turns sequences that a loop can read backwards.

Layouts: B batch, L length, D dim, N state, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vimamba.ops.direction import CONV_REVERSE, SCAN_REVERSE, WEIGHTS

STANDARD_OPSET = 27
"""The first with LinearAttention."""
DOMAIN = "vimamba"

Value = Any
"""onnx_ir's, a package that need not be there."""


class Ops:
    """Adds nodes and the constants they read to what is to stand in the place of one node.

    Args:
        name: of that node's output, with which the names of what is added begin.
    """

    def __init__(self, name: str) -> None:
        import onnx_ir

        self.ir, self.tape, self.name, self.count = onnx_ir, onnx_ir.tape.Tape(), name, 0

    def __call__(self, operator: str, *inputs: Value, **attributes: Any) -> Value:
        return self.tape.op(operator, inputs, attributes)

    def constant(self, array: np.ndarray | np.float32) -> Value:
        self.count += 1
        return self.tape.initializer(self.ir.tensor(np.asarray(array, order="C")), f"{self.name}/{self.count}")

    def integers(self, *values: int) -> Value:
        return self.constant(np.array(values, np.int64))

    def subgraph(self, shapes: Sequence[Sequence[int | None]], body: Callable[..., Any]) -> Any:
        """A graph of float32 inputs; `body` takes an Ops and them, and gives the outputs."""
        self.count += 1
        inner = Ops(f"{self.name}/{self.count}")
        kind = self.ir.TensorType(self.ir.DataType.FLOAT)
        taken = [
            self.ir.Value(name=f"{inner.name}/in{i}", shape=self.ir.Shape(s), type=kind) for i, s in enumerate(shapes)
        ]
        given = body(inner, *taken)
        for i, node in enumerate(inner.tape.nodes):  # a name of the graph around it must not be used again
            node.name = node.outputs[0].name = f"{inner.name}/{i}"
        return self.ir.Graph(taken, given, nodes=inner.tape.nodes, name=inner.name)


class OneScan(NamedTuple):
    """What a scan reads: u and delta with the tokens as the first axis or the second, its weights, and which way."""

    u: Value
    delta: Value
    A_DN: np.ndarray
    B: Value
    C: Value
    reverse: bool


class Scan(NamedTuple):
    """How a graph computes scans."""

    run: Callable[[Ops, OneScan], Value]
    """To the states read by C."""
    length_first: bool
    """Whether its sequences are (L, B, ...), or else (B, L, ...)."""


def steps(op: Ops, scan: OneScan) -> Value:
    """The scan in standard operators: a loop over the steps, of which nothing but the outputs leaves the cache.

    Channels are the last axis, along which every operator in the loop is vectorised: with (D, N) it takes twice as
    long, and larger steps, or decays computed before the loop, take longer too.
    """
    dim, state = scan.A_DN.shape
    A_ND = op.constant(scan.A_DN.T)

    def step(op: Ops, h_BND: Value, v_B1D: Value, delta_B1D: Value, B_BN1: Value, C_B1N: Value) -> Any:
        decayed_BND = op("Mul", h_BND, op("Exp", op("Mul", delta_B1D, A_ND)))
        h_BND = op("Add", decayed_BND, op("Mul", v_B1D, B_BN1))
        return h_BND, op("MatMul", C_B1N, h_BND)

    shapes = [(None, state, dim), (None, 1, dim), (None, 1, dim), (None, state, 1), (None, 1, state)]
    body = op.subgraph(shapes, step)
    batch = op("Shape", scan.u, start=1, end=2)
    start_BND = op(
        "Expand", op.constant(np.zeros((1, state, dim), np.float32)), op("Concat", batch, op.integers(1, 1), axis=0)
    )
    third, fourth, backwards = op.integers(2), op.integers(3), int(scan.reverse)
    sequences = [op("Unsqueeze", x, third) for x in (op("Mul", scan.delta, scan.u), scan.delta)]
    sequences += [op("Unsqueeze", scan.B, fourth), op("Unsqueeze", scan.C, third)]
    _, y_LB1D = op.tape.op_multi_out(
        "Scan", [start_BND, *sequences], num_outputs=2, attributes=dict(
            body=body, num_scan_inputs=4, scan_input_directions=[backwards] * 4, scan_output_directions=[backwards]
        ),
    )  # fmt: skip
    return op("Squeeze", y_LB1D, third)


def linear_attention(op: Ops, scan: OneScan) -> Value:
    """The scan by ONNX Runtime's LinearAttention with the update rule "gated": every channel is a head that decays."""
    return _gated(op, scan, heads=1, domain="com.microsoft", version=1)


def standard_attention(op: Ops, scan: OneScan) -> Value:
    """The same by the operator that opset 27 has, of which every head has a query and a key of its own."""
    dim = scan.A_DN.shape[0]
    times = op.integers(1, 1, dim)
    repeated = scan._replace(B=op("Tile", scan.B, times), C=op("Tile", scan.C, times))
    return _gated(op, repeated, heads=dim)


def _gated(op: Ops, scan: OneScan, heads: int, **operator: Any) -> Value:
    dim, state = scan.A_DN.shape
    decay_BLDN = op("Mul", op("Unsqueeze", scan.delta, op.integers(3)), op.constant(scan.A_DN))
    decay = op("Reshape", decay_BLDN, op.integers(0, 0, dim * state))
    sequences = [scan.C, scan.B, op("Mul", scan.delta, scan.u), decay]
    if scan.reverse:
        sequences = [_turned(op, x) for x in sequences]
    attributes = {"q_num_heads": heads, "kv_num_heads": dim, "scale": 1.0, "update_rule": "gated"}
    y_BLD, _ = op.tape.op_multi_out(
        "LinearAttention", [*sequences[:3], None, sequences[3]], attributes, num_outputs=2, **operator
    )
    return _turned(op, y_BLD) if scan.reverse else y_BLD


def _turned(op: Ops, x_BLD: Value) -> Value:
    least = np.iinfo(np.int64).min
    return op("Slice", x_BLD, op.integers(-1), op.integers(least), op.integers(1), op.integers(-1))


def unfused(scan: Scan, op: Ops, node: Any) -> Value:
    """What a node vimamba::Mixer computes in operators of the runtime's, around scans."""
    xz_BLE, gates, *weights = node.inputs
    reverse, scale = node.attributes["reverse"].as_ints(), node.attributes["scale"].as_float()
    x_BLD, z_BLD = op.tape.op_multi_out("Split", [xz_BLE], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    x_BDL = op("Transpose", x_BLD, perm=[0, 2, 1])
    if gates is not None and scan.length_first:
        gates = op("Transpose", gates, perm=[1, 0, 2])
    total = None
    for r, bits in enumerate(reverse):
        y = _one_direction(scan, op, x_BDL, [*map(_array, weights[r * WEIGHTS : (r + 1) * WEIGHTS])], bits)
        y = y if gates is None else op("Mul", y, op("Gather", gates, op.integers(r), axis=2))
        total = y if total is None else op("Add", total, y)
    if scan.length_first:
        total = op("Transpose", total, perm=[1, 0, 2])
    if scale != 1.0:
        total = op("Mul", total, op.constant(np.float32(scale)))
    return op("Mul", total, _silu(op, z_BLD))


def _one_direction(scan: Scan, op: Ops, x_BDL: Value, weights: Sequence[np.ndarray], bits: int) -> Value:
    """Convolution, projections and scan; what follows the convolution has the axes as the scan wants them."""
    conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = weights
    (dim, rank), state = dt_proj.shape, A_log.shape[1]
    taps_D1W = conv.reshape(dim, 1, -1)
    before, after = taps_D1W.shape[2] - 1, 0
    if bits & CONV_REVERSE:
        taps_D1W, before, after = taps_D1W[..., ::-1], after, before
    c_BDL = op("Conv", x_BDL, op.constant(taps_D1W), op.constant(conv_bias), group=dim, pads=[before, after])
    c = op("Transpose", _silu(op, c_BDL), perm=[2, 0, 1] if scan.length_first else [0, 2, 1])
    projected = op("MatMul", c, op.constant(x_proj.T))
    dt, B, C = op.tape.op_multi_out("Split", [projected, op.integers(rank, state, state)], {"axis": -1}, num_outputs=3)
    delta = _softplus(op, op("Add", op("MatMul", dt, op.constant(dt_proj.T)), op.constant(dt_bias)))
    read = scan.run(op, OneScan(c, delta, -np.exp(A_log), B, C, bool(bits & SCAN_REVERSE)))
    return op("Add", read, op("Mul", op.constant(D), c))


def _silu(op: Ops, x: Value) -> Value:
    return op("Mul", x, op("Sigmoid", x))


def _softplus(op: Ops, x: Value) -> Value:
    """max(x, 0) + log(1 + w) with w = exp(-|x|): ONNX Runtime vectorises these, and not its Softplus.

    What 1 + w loses of a small w is put back, to the last bits of float32.
    """
    one = op.constant(np.float32(1))
    w = op("Exp", op("Neg", op("Abs", x)))
    more_than_one = op("Add", w, one)
    lost = op("Sub", op("Sub", more_than_one, one), w)
    return op("Add", op("Relu", x), op("Sub", op("Log", more_than_one), lost))


def _array(value: Value) -> np.ndarray:
    """A weight, a constant of the graph; what stands for one that a layer has not is filled with one number."""
    from onnx_ir import convenience

    tensor = convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    filled = value.producer()
    assert filled.op_type == "ConstantOfShape", f"{value.name} is computed from the images"
    number = filled.attributes.get("value")
    return np.full(_array(filled.inputs[0]), 0 if number is None else number.as_tensor().numpy(), np.float32)


class Lowering(NamedTuple):
    """What stands in a graph for a mixer, None for the node itself, and the opset of the default domain."""

    scan: Scan | None
    opset: int

    def lower(self, model: Any) -> None:
        """Put it in the place of every mixer of an `onnx_ir.Model` that torch.onnx wrote with `DECOMPOSITIONS`."""
        from onnx_ir import convenience

        model.opset_imports[""] = self.opset  # the operators in between have not changed but for more types
        if self.scan is None:
            return
        for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "Mixer")]:
            op = Ops(node.outputs[0].name)
            mixed = unfused(self.scan, op, node)
            for value in op.tape.initializers:
                model.graph.register_initializer(value)
            convenience.replace_nodes_and_values(model.graph, node, [node], op.tape.nodes, node.outputs, [mixed])
        for value in [*model.graph.initializers.values()]:
            if not value.uses():
                del model.graph.initializers[value.name]
        model.opset_imports.pop(DOMAIN, None)
        if self.scan.run is linear_attention:
            model.opset_imports["com.microsoft"] = 1


LOOP = Scan(steps, length_first=True)
LOWERINGS = {
    "stock": Lowering(LOOP, 21),
    "vimamba": Lowering(None, 21),
    "microsoft": Lowering(Scan(linear_attention, length_first=False), 21),
    "standard": Lowering(Scan(standard_attention, length_first=False), STANDARD_OPSET),
    "portable": Lowering(LOOP, 18),
}


def _mixer(xz_BLE, weights, reverse, scale, gates, save_states, backend):
    """The node that `vimamba.onnx_library()` has an operator for."""
    batch, length, width = xz_BLE.shape
    mixed_BLD = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Mixer", (xz_BLE, gates, *weights), {"reverse": [*reverse], "scale": float(scale)},
        dtype=xz_BLE.dtype, shape=(batch, length, width // 2), version=1,
    )  # fmt: skip
    return mixed_BLD, xz_BLE.new_empty(0)


def _pool(x_BCHW: Tensor, size: list[int]) -> Tensor:
    """Adaptive average pooling as two products with matrices of shares: torch.onnx's takes the size of the example."""
    rows, columns = (_shares(x_BCHW.shape[axis], count) for axis, count in zip((2, 3), size, strict=True))
    return rows @ x_BCHW @ columns.T


def _shares(length: Any, count: int) -> Tensor:
    """What each of so many parts of an axis takes from each place, (count, length)."""
    part, place = torch.arange(count)[:, None], torch.arange(length)
    begin, end = part * length // count, ((part + 1) * length + count - 1) // count
    inside = ((place >= begin) & (place < end)).float()
    return inside / inside.sum(1, keepdim=True)


def _rms_norm(x, weight, residual, eps, out_dtype, backend):
    total = x if residual is None else x + residual
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * rstd * weight, total, rstd[..., 0]


def _sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    """By TopK, of whose equal values the first come first."""
    return x.topk(x.shape[dim], dim, descending)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.vimamba.mixer.default: _mixer, torch.ops.vimamba.rms_norm.default: _rms_norm,
    torch.ops.aten.adaptive_avg_pool2d.default: _pool, torch.ops.aten._adaptive_avg_pool2d.default: _pool,
    torch.ops.aten.sort.stable: _sort,
}  # fmt: skip
"""For `torch.export.ExportedProgram.run_decompositions`: a model's operators in those that torch.onnx knows."""
