"""The gates of a forward pass, collected: nothing stays on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vimamba import VisionMamba
from vimamba.layers.mixers.gate import collect_gates
from vimamba.models.pyramid import VisionMambaPyramid

TOKENS = dict(img_size=32, patch_size=8, embed_dim=16, depth=3)
MAPS = dict(dims=(8, 8, 16, 16), depths=(1, 1, 2, 1))
COMMON = dict(d_state=4, num_classes=5, merge="gate", gate_sparsity=0.1)


@pytest.fixture(params=["tokens", "maps"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    made = VisionMamba(**TOKENS, **COMMON) if request.param == "tokens" else VisionMambaPyramid(**MAPS, **COMMON)
    for gate in made._gates():
        nn.init.normal_(gate.proj.weight)
    return made.train()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, run=None, inside: bool = False) -> tuple[float, list[torch.Tensor]]:
    """The gates' loss, and the gradients of all parameters of it and the logits' together."""
    model.zero_grad()
    with collect_gates() as gates:
        logits = (model if run is None else run)(images())
        gate_loss = model.gate_loss(gates)
        if inside:
            (logits.square().sum() + gate_loss).backward()
    assert len(gates) == 3
    if not inside:
        (logits.square().sum() + gate_loss).backward()
    return float(gate_loss.detach()), [p.grad.clone() for p in model.parameters()]


def test_a_model_that_ran_can_be_copied_averaged_and_saved(model):
    losses(model)
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    AveragedModel(model).update_parameters(model)
    tensors = [t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor)]
    assert tensors == []


@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing_neither_loses_nor_doubles_the_loss(model, inside):
    value, grads = losses(model)
    assert 0 < value < 0.1
    model.set_grad_checkpointing()
    again, recomputed = losses(model, inside=inside)
    assert again == pytest.approx(value)
    for plain, found in zip(grads, recomputed, strict=True):
        torch.testing.assert_close(found, plain)


def test_the_loss_alone_reaches_the_gates_only_through_their_inputs(model):
    with collect_gates() as gates:
        model(images())
    model.gate_loss(gates).backward()
    assert all(gate.proj.weight.grad.abs().sum() > 0 for gate in model._gates())
    assert model.head.weight.grad is None


@pytest.mark.slow
def test_compiled_models_hand_the_gates_out(model):
    value, grads = losses(model)
    compiled = torch.compile(model, backend="eager")
    found, compiled_grads = losses(model, compiled)
    assert found == pytest.approx(value, rel=1e-4)
    for plain, compiled_grad in zip(grads, compiled_grads, strict=True):
        torch.testing.assert_close(compiled_grad, plain, rtol=1e-3, atol=1e-4)
    compiled(images())  # with nobody collecting


def test_collections_nest_and_end(model):
    with collect_gates() as outer:
        model(images())
        with collect_gates() as inner:
            model(images())
    model(images())
    assert (len(outer), len(inner)) == (6, 3)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf"), "0.1"])
def test_impossible_factors_are_refused(factor):
    with pytest.raises(ValueError, match="gate_sparsity must be a number from 0 up"):
        VisionMambaPyramid(**MAPS, gate_sparsity=factor)
