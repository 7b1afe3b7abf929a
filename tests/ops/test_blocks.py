"""A run of blocks in one call: what it computes on every backend, and that no weights are ever stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import vimamba.models.token_model as token_model
from vimamba.layers.block import Block
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.layers.norm import LayerNorm, RMSNorm
from vimamba.ops import BlockWeights, backends, blocks
from vimamba.ops.block_weights import flat_blocks
from vimamba.ops.cpu import library

USABLE = [name for name, reason in backends.status("cpu").items() if reason is None]
needs_kernels = pytest.mark.skipif(library.UNAVAILABLE is not None, reason=str(library.UNAVAILABLE))


def layers(count: int = 2, dim: int = 24, seed: int = 0, **mixer_args) -> list[Block]:
    torch.manual_seed(seed)
    made = [Block(BidirectionalMixer(dim, **mixer_args), RMSNorm(dim)).eval() for _ in range(count)]
    with torch.no_grad():
        for block in made:
            for weight in block.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return made


def weights_of(made: list[Block]) -> list[BlockWeights]:
    weights = [block.joined() for block in made]
    assert None not in weights
    return weights  # type: ignore[return-value]


def truth(made: list[Block], stream: Tensor) -> Tensor:
    """In float64, module by module."""
    x = stream.double()
    with torch.no_grad():
        for block in made:
            x = copy.deepcopy(block).double()(x)
    return x


def error(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


SIZES = {
    "plain": dict(),
    "biases": dict(bias=True, conv_bias=False),
    "one direction": dict(mode="none"),
    "shared projections, summed": dict(mode="ssm", merge="sum"),
    "odd sizes": dict(dim=21, expand=1.5, d_state=5, dt_rank=3, d_conv=3),
    "wide": dict(dim=192, dt_rank=12),
}


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 67), (3, 20), (5, 1), (2, 197)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_instruction_set_computes_what_the_modules_do(each_set, sizes, batch, length):
    made = layers(**sizes)
    stream = torch.randn(batch, length, sizes.get("dim", 24))
    exact = truth(made, stream)
    scale = made[0].mixer.merge_scale
    assert error(blocks(stream, weights_of(made), scale, backend="cpu"), exact) < 1e-6
    bf16 = blocks(stream, weights_of(made), scale, dtype=torch.bfloat16, backend="cpu")
    layer_by_layer = blocks(stream, weights_of(made), scale, dtype=torch.bfloat16, backend="torch")
    assert bf16.dtype == torch.float32
    assert error(bf16, exact) < max(1.1 * error(layer_by_layer, exact), 1e-3)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_computes_what_the_modules_do(backend, dtype):
    made = layers()
    stream = torch.randn(2, 33, 24)
    y = blocks(stream, weights_of(made), made[0].mixer.merge_scale, dtype=dtype, backend=backend)
    assert y.dtype == torch.float32
    assert error(y, truth(made, stream)) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_many_rows_are_computed_without_remembering(each_set):
    from vimamba.ops.cpu import _MANY_ROWS, _PACKED

    made = layers(3, bias=True)
    few, many = torch.randn(1, 50, 24), torch.randn(2, _MANY_ROWS // 2, 24)
    for dtype in (torch.float32, torch.bfloat16):
        y = blocks(many, weights_of(made), 0.5, dtype=dtype, backend="cpu")
        assert made[0].norm.weight not in _PACKED
        assert error(y, truth(made, many)) < (1e-6 if dtype == torch.float32 else 1e-2)
    blocks(few, weights_of(made), 0.5, backend="cpu")
    assert made[0].norm.weight in _PACKED


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_the_size_are_taken(dtype):
    made = [block.to(dtype) for block in layers()]
    stream = torch.randn(2, 33, 24)
    assert error(blocks(stream, weights_of(made), 0.5, dtype=dtype), truth(made, stream)) < 1e-2
    assert error(blocks(stream, weights_of(made), 0.5), truth(made, stream)) < 1e-6  # products in float32


def as_operator(made: list[Block], stream: Tensor) -> Tensor:
    """What an exported program computes, which has the blocks as one operator."""
    weights = weights_of(made)
    tensors, reverse = flat_blocks(weights)
    scale = made[0].mixer.merge_scale
    return torch.ops.vimamba.blocks(stream, tensors, reverse, len(weights[0].directions), scale, made[0].norm.eps)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_the_operator_of_exported_programs(sizes, backend, monkeypatch):
    made, chosen = layers(**sizes), backends.load(backend)
    for batch, length in ((3, 20), (2, 2100))[: 2 if backend == "cpu" else 1]:  # many rows are another way there
        stream = torch.randn(batch, length, sizes.get("dim", 24))
        with monkeypatch.context() as patch:
            patch.setattr(backends, "_fastest", lambda *arguments: chosen)
            found = as_operator(made, stream)
        assert error(found, truth(made, stream)) < 1e-6


@needs_kernels
@torch.no_grad()
def test_the_operator_remembers_many_runs_and_takes_none_for_another():
    dims = [16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
    runs = [(layers(dim=dim), torch.randn(1, 10, dim)) for dim in dims]
    for _ in range(2):
        for made, stream in runs:
            assert error(as_operator(made, stream), truth(made, stream)) < 1e-6
    stream = torch.randn(1, 10, 32)
    for sizes in (dict(dt_rank=1, d_state=4), dict(dt_rank=4, d_state=2)):  # as many numbers, all alike
        made = layers(1, dim=32, **sizes)
        for weight in made[0].parameters():
            weight.fill_(0.1)
        assert error(as_operator(made, stream), truth(made, stream)) < 1e-6


def test_the_operator_says_that_it_has_no_derivative():
    made, stream = layers(), torch.randn(1, 5, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match="vimamba::blocks has no derivative"):
        as_operator(made, stream).sum().backward()


def optimizer_step(made: list[Block]) -> None:
    optimizer = torch.optim.SGD([p for block in made for p in block.parameters()], lr=0.1)
    for block in made:
        for parameter in block.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load_state(made: list[Block]) -> None:
    for block, other in zip(made, layers(seed=1), strict=True):
        block.load_state_dict(other.state_dict())


def one_number_through_data(made: list[Block]) -> None:
    made[1].mixer.out_proj.weight.data[3, 5] += 1


def all_through_data(made: list[Block]) -> None:
    made[0].mixer.A_log.data.mul_(1.5)


def data_replaced(made: list[Block]) -> None:
    made[0].mixer.in_proj.weight.data = made[0].mixer.in_proj.weight.data * 2


def parameter_replaced(made: list[Block]) -> None:
    made[1].norm.weight = nn.Parameter(torch.rand(24))


def through_numpy(made: list[Block]) -> None:
    made[0].mixer.D.detach().numpy()[7] = 3.0


def through_a_view(made: list[Block]) -> None:
    made[1].mixer.dt_proj.bias.detach().view(-1)[::3] = 0.25


def swapped(made: list[Block]) -> None:
    made[0].mixer.x_proj.weight.data = made[0].mixer.x_proj.weight.data.flip(0)


def in_place_under_no_grad(made: list[Block]) -> None:
    with torch.no_grad():
        made[1].mixer.conv1d.weight.neg_()


WRITES: list[Callable[[list[Block]], None]] = [
    optimizer_step, load_state, one_number_through_data, all_through_data, data_replaced, parameter_replaced,
    through_numpy, through_a_view, swapped, in_place_under_no_grad,
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", WRITES, ids=[write.__name__ for write in WRITES])
def test_however_weights_are_written_they_are_what_runs(write, dtype):
    made, stream = layers(), torch.randn(1, 40, 24)
    scale = made[0].mixer.merge_scale
    copies = copy.deepcopy(made)
    before = [blocks(stream, weights_of(of), scale, dtype=dtype) for of in (made, copies)]
    assert torch.equal(*before)
    write(made)
    after = blocks(stream, weights_of(made), scale, dtype=dtype)
    assert not torch.equal(after, before[0])
    assert error(after, truth(made, stream)) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(blocks(stream, weights_of(copies), scale, dtype=dtype), before[1])


@needs_kernels
@pytest.mark.parametrize("write", WRITES, ids=[write.__name__ for write in WRITES])
def test_however_weights_are_written_they_are_what_the_operator_runs(write):
    made, stream = layers(), torch.randn(1, 40, 24)
    before = as_operator(made, stream).detach()
    write(made)
    after = as_operator(made, stream).detach()
    assert not torch.equal(after, before)
    assert error(after, truth(made, stream)) < 1e-6


@needs_kernels
def test_what_was_packed_goes_with_the_weights():
    from vimamba.ops.cpu import _PACKED

    made = layers()
    blocks(torch.randn(1, 4, 24), weights_of(made), backend="cpu")
    norm = made[0].norm.weight
    assert norm in _PACKED
    known = len(_PACKED)
    del made, norm
    assert len(_PACKED) == known - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(in_proj=torch.rand(4, 24)), r"weights\[1\].in_proj must have shape \(2 \* inner, dim\) = \(96, 24\)"),
        (dict(out_bias=torch.rand(5)), r"weights\[1\].out_bias must have shape \(dim,\)"),
        (dict(norm=torch.rand(5)), r"weights\[1\].norm must have shape"),
        (dict(directions=()), r"weights\[1\] must have 2 directions, got 0"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    first, second = weights_of(layers())
    with pytest.raises(ValueError, match=words):
        blocks(torch.rand(1, 4, 24), [first, second._replace(**change)])


def test_there_must_be_a_block_and_a_stream():
    with pytest.raises(ValueError, match="one block or more"):
        blocks(torch.rand(1, 4, 24), [])
    with pytest.raises(ValueError, match="stream must have shape"):
        blocks(torch.rand(4, 24), weights_of(layers()))


# In models.


@pytest.fixture
def runs(monkeypatch):
    """How many blocks each call joined."""
    counts = []

    def counted(*arguments):
        done, total = run_joined(*arguments)
        counts.append(done)
        return done, total

    run_joined = token_model.run_joined
    monkeypatch.setattr(token_model, "run_joined", counted)
    return counts


def alone(model: nn.Module, call: Callable[[], Tensor], monkeypatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(token_model, "run_joined", lambda layers, hidden, stream: (0, hidden))
        return call()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_a_model_runs_all_blocks_in_one_call_for_its_values(dtype, runs, monkeypatch):
    model, x = timm.create_model("vim_nano").eval(), torch.randn(2, 3, 28, 28)
    if dtype == torch.bfloat16:
        model, x = model.bfloat16(), x.bfloat16()

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return model(x)

    y = call()
    assert runs == [len(model.layers)]
    z = alone(model, call, monkeypatch)
    assert y.dtype == z.dtype
    assert torch.allclose(y, z, atol=0 if dtype == torch.float32 else 0.02, rtol=0)


@needs_kernels
def test_a_run_ends_where_a_layer_is_looked_at_or_is_another(runs):
    model, x = timm.create_model("vim_nano").eval(), torch.randn(1, 3, 28, 28)
    depth = len(model.layers)
    with torch.no_grad():
        taken = model.forward_intermediates(x, indices=[0], intermediates_only=True)
        assert runs == [1, depth - 1]
        assert len(taken) == 1
        runs.clear()
        seen = []
        handle = model.layers[1].mixer.out_proj.register_forward_hook(lambda *_: seen.append(1))
        model(x)
        assert seen == [1]
        assert runs == [1, 0, depth - 2]
        handle.remove()
        runs.clear()
        model.layers[0].norm = LayerNorm(model.embed_dim)
        model(x)
        assert runs == [0, depth - 1]
        runs.clear()
        mixer = model.layers[1].mixer
        mixer._merged = lambda *arguments: seen.append(2) or type(mixer)._merged(mixer, *arguments)
        model(x)
        assert seen == [1, 2]
        assert runs == [0, 0, depth - 2]
        del mixer._merged
    runs.clear()
    model(x).sum().backward()
    assert set(runs) == {0}


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        dict(paths=("row", "column")), dict(merge="gate"), dict(conv="2d"), dict(layer_scale=0.1),
        dict(mode="none", pooled_token=True),
    ],
)  # fmt: skip
def test_other_designs_are_not_joined(options):
    assert Block(BidirectionalMixer(24, **options), RMSNorm(24)).joined() is None
    assert Block(BidirectionalMixer(24), RMSNorm(24), drop_path=0.5).train().joined() is None
    assert Block(BidirectionalMixer(24), RMSNorm(24), drop_path=0.5).eval().joined() is not None


class Rounded(Tensor):
    """Stands for a weight in bfloat16, as quantisation libraries' tensors do: it knows PyTorch's operators only."""

    @staticmethod
    def __new__(cls, weight: Tensor):
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.float32)

    def __init__(self, weight: Tensor) -> None:
        self.kept = weight.bfloat16()

    @classmethod
    def __torch_dispatch__(cls, operator, _types, arguments=(), keywords=None):
        if operator.namespace != "aten":
            raise NotImplementedError(f"Rounded knows no {operator}")
        if operator is torch.ops.aten.detach.default:
            return cls(arguments[0].kept)
        arguments, keywords = tree_map_only(cls, lambda t: t.kept.float(), (arguments, keywords or {}))
        return operator(*arguments, **keywords)


@pytest.mark.parametrize("projection", ["in_proj", "out_proj", "x_proj", "dt_proj"])
def test_a_weight_that_is_no_plain_tensor_is_left_to_its_layer(projection):
    model, x = timm.create_model("vim_nano").eval(), torch.randn(1, 3, 28, 28)
    rounded, plain = copy.deepcopy(model), copy.deepcopy(model)
    for of_rounded, of_plain in zip(rounded.layers, plain.layers, strict=True):
        weight = getattr(of_plain.mixer, projection).weight.data
        weight.copy_(weight.bfloat16())
        getattr(of_rounded.mixer, projection).weight = nn.Parameter(Rounded(weight), requires_grad=False)
    with torch.no_grad():
        assert torch.allclose(rounded(x), plain(x), atol=1e-5)
