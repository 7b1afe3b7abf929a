"""Every bidirectional design as a switch of VisionMamba."""

from __future__ import annotations

import pytest
import torch

from vimamba import VisionMamba
from vimamba.layers.embed.position import sincos_pos_embed
from vimamba.layers.mixers.gate import collect_gates
from vimamba.models.registry import count_flops
from vimamba.ops import backends, mixer

SMALL = dict(img_size=(32, 48), patch_size=8, embed_dim=16, depth=4, d_state=4, num_classes=5)
DESIGNS = {
    "cross-scan": dict(paths=["row", "column"]),
    "cross-scan, shared weights": dict(paths=["row", "column"], path_weights="shared"),
    "all paths": dict(paths=["row", "column:backward", "snake", "window2"], bidirectional="ssm"),
    "paths of layers": dict(paths=[["row"], ["column"], ["snake"], ["window2x3"]]),
    "every 2nd": dict(bidirectional="every 2nd"),
    "alternate": dict(bidirectional="none", alternate=True, pooled_token=True, class_token="head"),
    "image gate": dict(merge="gate"),
    "token gate": dict(merge="gate", gate="token", paths=["row", "snake"]),
    "2-D convolution": dict(conv="2d"),
    "2-D convolution and columns": dict(conv="2d", paths=["row", "column"], class_token="double"),
    "stem": dict(stem="conv"),
    "sincos": dict(pos_embed="sincos"),
    "registers": dict(num_registers=3, global_pool="registers", class_token="none"),
    "registers and class token": dict(num_registers=4, rope="patches", pooled_token=True, bidirectional="last 2"),
}
MAIN = ["cross-scan", "all paths", "alternate", "image gate", "2-D convolution and columns", "registers"]


def build(seed: int = 0, **options) -> VisionMamba:
    torch.manual_seed(seed)
    return VisionMamba(**{**SMALL, **options}).eval()


def images(batch: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def directions(model: VisionMamba) -> list[list[tuple[bool, bool]]]:
    return [[(d.conv_reverse, d.scan_reverse) for d in layer.mixer.directions()] for layer in model.layers]


@pytest.fixture
def torch_backend(monkeypatch):
    """Run on the PyTorch backend, which adds directions up after the gate z, one by one."""
    monkeypatch.setattr(backends, "_fastest", lambda device, dtypes: backends.load("torch"))


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_learns_and_takes_any_size(name):
    model = build(**DESIGNS[name]).train()
    loss = torch.nn.functional.cross_entropy(model(images()), torch.tensor([1, 3]))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert model(images(1, 48, 40)).shape == (1, 5)
        maps = model.forward_intermediates(images(), intermediates_only=True)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 6)] * 4


@pytest.mark.parametrize("name", DESIGNS)
def test_images_of_a_batch_do_not_meet(name):
    model = build(**DESIGNS[name])
    batch = images(3)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAIN)
def test_a_design_exports(name):
    model = build(**DESIGNS[name])
    exported = torch.export.export(model, (images(),))
    torch.testing.assert_close(exported.module()(images()), model(images()))


def test_a_design_compiles_whole():
    model = build(paths=["row", "column"], merge="gate", gate="token", num_registers=2, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


def test_an_evaluation_in_inference_mode_does_not_disturb_training():
    model = build(img_size=(24, 40), paths=["snake"])
    with torch.inference_mode():
        model(images(1, 24, 40))
    model(images(1, 24, 40)).sum().backward()


def test_counting_operations_does_not_disturb_the_model():
    model = build(img_size=(16, 40), paths=["snake"])
    assert count_flops(model, (3, 16, 40)) > 0
    model(images(1, 16, 40)).sum().backward()


def test_rules_say_which_layers_are_bidirectional():
    def modes(rule):
        return [layer.mixer.mode for layer in build(bidirectional=rule).layers]

    assert modes("every 2nd") == ["none", "ssm_conv", "none", "ssm_conv"]
    assert modes("last 1") == ["none", "none", "none", "ssm_conv"]
    assert modes("ssm first 3") == ["ssm", "ssm", "ssm", "none"]
    assert modes(["ssm", "none", "none", "ssm_conv"]) == ["ssm", "none", "none", "ssm_conv"]


def test_single_directions_alternate():
    forward, backward = [(False, False)], [(True, True)]
    assert directions(build(bidirectional="none", alternate=True)) == [forward, backward] * 2
    mixed = directions(build(bidirectional=["none", "ssm_conv", "none", "none"], alternate=True))
    assert mixed == [forward, [*forward, *backward], backward, forward]


def test_alternating_costs_half_the_directions():
    single, double = (count_directions(build(**o)) for o in (dict(bidirectional="none", alternate=True), {}))
    assert single * 2 == double


def count_directions(model: VisionMamba) -> int:
    return sum(len(layer) for layer in directions(model))


@pytest.mark.parametrize("level", ["image", "token"])
@pytest.mark.parametrize("paths", [["row"], ["row", "column"]])
def test_gates_start_as_the_mean_to_the_last_bit(paths, level, torch_backend):
    mean = build(paths=paths)
    gated = build(1, paths=paths, merge="gate", gate=level)
    fresh = gated.load_state_dict(mean.state_dict(), strict=False)
    assert not fresh.unexpected_keys
    assert all(".gate." in key for key in fresh.missing_keys)
    if paths == ["row"]:
        assert torch.equal(gated(images()), mean(images()))
    else:  # the sum over four directions is taken in another order
        torch.testing.assert_close(gated(images()), mean(images()), rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("level", ["image", "token"])
@pytest.mark.parametrize("paths", [["row"], ["row", "column"]])
def test_gates_start_as_the_mean_to_the_last_bit_on_the_fastest_backend(paths, level):
    mean, gated = build(paths=paths), build(1, paths=paths, merge="gate", gate=level)
    gated.load_state_dict(mean.state_dict(), strict=False)
    assert torch.equal(gated(images()), mean(images()))


def opened_gates(seed: int = 3) -> VisionMamba:
    """A model whose gates differ between images and layers."""
    model = build(merge="gate", paths=["row", "column"])
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        layer.mixer.gate.proj.weight.data = torch.randn(layer.mixer.gate.proj.weight.shape, generator=generator) * 3
    return model


def test_a_threshold_skips_the_directions_of_the_images_that_do_not_need_them(monkeypatch):
    model, batch = opened_gates(), images(4)
    with torch.no_grad():
        whole = model(batch)
        model.set_gate_threshold(1e-6)
        torch.testing.assert_close(model(batch), whole, rtol=1e-5, atol=1e-6)
        model.set_gate_threshold(0.25)
        counted = []

        def count(xz, directions, scale, gates, *, skip):
            assert skip
            counted.append(int(gates.count_nonzero()))
            return mixer(xz, directions, scale, gates, skip=skip)

        monkeypatch.setattr("vimamba.layers.mixers.mamba.mixer", count)
        with collect_gates() as gates:
            skipped = model(batch)
        kept = sum(int((gate >= 0.25).sum()) for gate in gates)
        assert sum(counted) == kept < 4 * 4 * 4  # images × layers × directions
        assert not torch.allclose(skipped, whole)
        torch.testing.assert_close(torch.cat([model(image[None]) for image in batch]), skipped, rtol=1e-4, atol=1e-5)
        model.set_gate_threshold(1.0)
        assert model(batch).isfinite().all()  # nothing mixes any more


def test_training_never_skips():
    model = opened_gates().train()
    whole = model(images())
    model.set_gate_threshold(1.0)
    assert torch.equal(model(images()), whole)


def test_the_gate_loss_has_layers_choose():
    model = build(merge="gate", gate_sparsity=0.1).train()
    with collect_gates() as gates:
        model(images())
    assert float(model.gate_loss(gates).detach()) == pytest.approx(0.1)  # undecided at the start
    model = opened_gates().train()
    model.gate_sparsity = 0.1
    losses = []
    for _ in range(2):
        with collect_gates() as gates:
            model(images())
        loss = model.gate_loss(gates)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for layer in model.layers:
                layer.mixer.gate.proj.weight -= 2 * layer.mixer.gate.proj.weight.grad
    assert losses[1] < losses[0] < 0.1
    with collect_gates() as gates:
        build()(images())
    assert build().gate_loss(gates) == 0.0


def test_fixed_positions_tell_rows_from_columns_and_are_not_learned():
    embedding = sincos_pos_embed(16, (3, 5), (3, 5), torch.device("cpu"))[0].unflatten(0, (3, 5))
    assert torch.equal(embedding[1, 0, :8], embedding[1, 4, :8])
    assert torch.equal(embedding[0, 2, 8:], embedding[2, 2, 8:])
    assert len(embedding.flatten(0, 1).unique(dim=0)) == 15
    fine = sincos_pos_embed(16, (6, 10), (3, 5), torch.device("cpu"))[0].unflatten(0, (6, 10))
    torch.testing.assert_close(fine[::2, ::2], embedding)
    assert build(pos_embed="sincos").pos_embed is None
    assert build(pos_embed=True).state_dict().keys() == build(pos_embed="learned").state_dict().keys()


def test_new_parameters_escape_weight_decay():
    model = build(paths=["row", "window2"], num_registers=1, merge="gate")
    exempt = model.no_weight_decay()
    assert {"reg_tokens", "layers.0.mixer.A_window2_b_log", "layers.0.mixer.D_window2"} <= exempt
    assert not any(name.endswith(("proj.weight", "conv1d_window2.weight")) for name in exempt)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(paths=["row", "window5"]), "paths: the windows"),
        (dict(paths=["row", "window2x7"]), "paths: the windows"),
        (dict(paths=[["row"]] * 3), "paths has 3 entries for depth=4"),
        (dict(paths=["diagonal"]), "paths"),
        (dict(bidirectional=["none"] * 3), "bidirectional has 3 entries"),
        (dict(bidirectional="last 5"), "bidirectional='last 5'"),
        (dict(bidirectional="every 0th"), "bidirectional"),
        (dict(bidirectional="both"), "bidirectional"),
        (dict(merge="gate", bidirectional="none"), "merge"),
        (dict(merge="gate", gate="pixel"), "gate"),
        (dict(path_weights="shared"), "path_weights"),
        (dict(alternate=True), "alternate"),
        (dict(alternate=True, bidirectional="layer"), "alternate"),
        (dict(pooled_token=True), "pooled_token"),
        (dict(conv="3d"), "conv"),
        (dict(stem="conv", patch_size=6), "stem"),
        (dict(stem="conv", stride=4), "stem"),
        (dict(pos_embed="sincos", embed_dim=18), "pos_embed"),
        (dict(pos_embed="sine"), "pos_embed"),
        (dict(global_pool="registers"), "global_pool"),
        (dict(num_registers=-1), "num_registers"),
        (dict(num_registers=25), "num_registers"),
    ],
)
def test_impossible_combinations_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match="^" + named) as refused:
        build(**options)
    assert "\n" not in str(refused.value)


def test_skipping_without_image_gates_is_refused():
    for options in ({}, dict(merge="gate", gate="token")):
        with pytest.raises(ValueError, match="merge"):
            build(**options).set_gate_threshold(0.2)
    with pytest.raises(ValueError, match="threshold"):
        build(merge="gate").set_gate_threshold(2.0)
