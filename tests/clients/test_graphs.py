"""Graphs made of a model: exported, compiled, traced and counted."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch.export import Dim, export

from vimamba import VisionMamba
from vimamba.layers.embed.position import _bicubic

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, d_state=4, num_classes=5)
DESIGNS = [
    {},
    dict(stride=4, class_token="double", num_registers=2),
    dict(paths=["row", "column", "snake", "window2"], class_token="none"),
    dict(conv="2d", pos_embed="sincos", stem="conv", class_token="head"),
    dict(rope="patches", bidirectional="layer", norm="layer", global_pool="max"),
    dict(merge="gate", gate="token", paths=["row", "column"]),
]


def small(**options) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(**{**SMALL, **options}).eval()


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("options", DESIGNS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=["own size", "other size"])
def test_one_exported_graph_takes_every_size(options, size):
    model = small(**options)
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=16, max=512), 3: Dim("width", min=16, max=512)}
    with torch.no_grad():
        program = export(model, (images(2, *size),), dynamic_shapes=(sizes,)).module()
        for batch, height, width in ((1, 32, 32), (3, 24, 64), (2, 61, 33)):
            x = images(batch, height, width)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_exported_graph_saves_no_states():
    graph = export(small(), (images(1, 32, 32),)).graph
    calls = [node for node in graph.nodes if node.target is torch.ops.vimamba.mixer.default]
    assert len(calls) == 2
    names = [argument.name for argument in torch.ops.vimamba.mixer.default._schema.arguments]
    assert [call.args[names.index("save_states")] for call in calls] == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(merge="gate"), dict(bidirectional="none", norm="layer")], ids=str)
def test_training_compiles_once_for_every_size(options):
    model = small(**options, depth=1).train()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch, height, width in ((2, 32, 32), (3, 48, 40), (2, 24, 61)):
        x, grads = images(batch, height, width), []
        for run in (compiled, model):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(9, 9), (9, 14), (14, 9), (14, 3), (7, 1), (1, 5)])
def test_the_compiled_interpolation_is_pytorchs(old, new):
    x = torch.randn(1, 2, old, old, generator=torch.Generator().manual_seed(0))
    matrix = _bicubic(old, new, x.device)
    expected = torch.nn.functional.interpolate(x, size=(new, new), mode="bicubic", antialias=True)
    torch.testing.assert_close(matrix @ x @ matrix.t(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vim_nano", "vim_pyramid_nano"])
def test_jit_trace(name):
    model, x = timm.create_model(name).eval(), images(2, 28, 28)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(traced(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


def test_fvcore_counts_with_a_handle_for_the_scan():
    fvcore = pytest.importorskip("fvcore.nn")
    from fvcore.nn.jit_handles import get_shape

    def scan(inputs, outputs):
        batch, dim, length = get_shape(inputs[0])
        return 9 * batch * dim * length * get_shape(inputs[2])[1]

    model = small()
    analysis = fvcore.FlopCountAnalysis(model, images(1, 32, 32)).unsupported_ops_warnings(False)
    plain = analysis.total()
    counted = fvcore.FlopCountAnalysis(model, images(1, 32, 32)).unsupported_ops_warnings(False)
    counted.set_op_handle("vimamba::selective_scan", scan)
    assert counted.total() - plain == 2 * 2 * 9 * 17 * 32 * 4  # blocks, directions, tokens, inner channels, states
    assert counted.by_module()["layers.1.mixer.x_proj"] > 0
