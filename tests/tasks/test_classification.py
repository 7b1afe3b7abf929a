"""Parameter groups, the learning rate, and what an evaluation counts."""

from itertools import pairwise
from math import isnan

import pytest
import timm
import torch
from torch import nn

from vimamba.data.loaders import Batch
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import UserError
from vimamba.tasks.classification import ClassificationTask, ClassResult
from vimamba.tasks.optim import OptimOptions, build_optimizer, lr_factor, parameter_groups
from vimamba.tasks.task import evaluation_of, results_of
from vimamba.tasks.weights import ModelCard, load_model, save_model

TINY = {"depth": 2, "embed_dim": 16, "d_state": 4}
PREP = Preprocessing((16, 16), 1, (0.5,), (0.5,))


def tiny(**kwargs):
    return timm.create_model("vim_nano", img_size=16, in_chans=1, num_classes=3, **{**TINY, **kwargs})


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_weight_decay_is_for_matrices_only(layer_decay):
    model = tiny()
    decay = {}
    for group in parameter_groups(model, OptimOptions(weight_decay=0.1, layer_decay=layer_decay)):
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    named = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(decay) == len(list(model.parameters()))
    for name, value in named.items():
        exempt = name.endswith((".bias", "A_log", "A_b_log", ".D", ".D_b")) or "norm" in name
        assert value == (0.0 if exempt or name in ("pos_embed", "cls_token") else 0.1), name


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_muon_is_for_matrices_only(layer_decay):
    model = tiny()
    optimizer = build_optimizer(model, OptimOptions(opt="nmuon", layer_decay=layer_decay), fused=False)
    model(torch.randn(2, 1, 16, 16)).sum().backward()
    optimizer.step()
    by_muon = {name for name, p in model.named_parameters() if optimizer.state[p]["use_muon"]}
    assert {"layers.0.mixer.in_proj.weight", "layers.1.mixer.out_proj.weight"} <= by_muon
    assert all(name.endswith("weight") and "norm" not in name and "conv1d" not in name for name in by_muon)


def test_a_marked_parameter_is_exempt():
    model = nn.Linear(3, 3)
    model.weight._no_weight_decay = True
    assert [group["weight_decay"] for group in parameter_groups(model, OptimOptions()) if group["params"]] == [0.0]


def test_layer_decay_slows_lower_layers():
    model = tiny()
    rate = {}
    for group in parameter_groups(model, OptimOptions(lr=1.0, layer_decay=0.5)):
        rate |= {id(parameter): group["lr"] for parameter in group["params"]}
    at = {name: rate[id(parameter)] for name, parameter in model.named_parameters()}
    assert at["head.weight"] == 1.0
    assert at["patch_embed.proj.weight"] < at["layers.0.mixer.in_proj.weight"] < at["layers.1.mixer.in_proj.weight"]


def test_the_rate_warms_up_and_falls():
    options = OptimOptions(epochs=10, lr=1e-3, min_lr=1e-5, warmup_epochs=1)
    rates = [lr_factor(step, 100, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    constant = OptimOptions(epochs=10, schedule="constant", warmup_epochs=0)
    assert {lr_factor(step, 100, constant) for step in range(101)} == {1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"ema": 1.0},
        {"accumulate": 0},
        {"clip_grad": -1.0},
        {"opt": "adamv"},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimOptions(**wrong)


def test_an_evaluation_counts_per_class():
    names = ["a", "b", "c"]
    evaluation = evaluation_of(ClassificationTask, names, detailed=True)
    logits = torch.eye(3)[[0, 0, 1, 1]] * 9  # predicted a a b b
    evaluation.update(logits[:3], torch.tensor([0, 1, 1]))
    evaluation.update(logits[3:], torch.tensor([1]))
    results = results_of(ClassificationTask, evaluation, names)
    assert results.images == 4
    assert (results.numbers["top1"], results.numbers["top5"]) == (0.75, 1.0)
    a, b, c = (ClassResult(**row) for row in results.per_class)
    assert (a.images, a.correct, a.recall, a.precision) == (1, 1, 1.0, 0.5)
    assert (b.images, b.correct, b.recall, b.precision) == (3, 2, pytest.approx(2 / 3), 1.0)
    assert (c.images, c.recall, c.precision, c.f1) == (0, None, None, None)
    assert results.confusion.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert "c,0,0,,," in results.to_csv()


def test_the_moving_average_is_evaluated_and_kept(tmp_path):
    card = ModelCard("vim_nano", TINY, ["a", "b", "c"], PREP)
    task = ClassificationTask(tiny(), card, OptimOptions(ema=0.5), AugmentOptions())
    assert task.evaluated_model is task.ema.module
    save_model(tmp_path / "model.safetensors", task.evaluated_model, card)
    model, read = load_model(tmp_path / "model.safetensors")
    assert read == card
    images = torch.randn(2, 1, 16, 16)
    assert model(images).equal(task.evaluated_model.eval()(images))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_any_timm_model_is_built_for_the_data(name):
    prep = Preprocessing((32, 32), 1, (0.5,), (0.5,))
    model = ModelCard(name, {}, ["a", "b", "c"], prep).build().eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


def test_the_training_loss_is_the_mean_over_images():
    card = ModelCard("vim_nano", TINY, ["a", "b", "c"], PREP)
    task = ClassificationTask(tiny(), card, OptimOptions(), AugmentOptions())
    torch.manual_seed(0)
    losses = []
    for count in (5, 1, 0, 2):  # the last one of an epoch is smaller
        images = torch.randn(count, 1, 16, 16) if count else torch.empty(0)
        losses += [
            float(task.training_step(Batch(images, torch.zeros(count, dtype=torch.int64), [], []), 0).detach())
        ] * count
    assert float(task.train_loss.compute()) == pytest.approx(sum(losses) / 8)
    assert not task.diverged()
    task.training_step(Batch(images * torch.nan, torch.zeros(2, dtype=torch.int64), [], []), 0)
    task.training_step(Batch(images, torch.zeros(2, dtype=torch.int64), [], []), 1)
    assert task.diverged()  # though the last loss is finite


def test_a_held_out_loss_that_is_no_number_is_not_left_out():
    evaluation = evaluation_of(ClassificationTask, ["a", "b"])
    evaluation.update(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]), torch.tensor([0, 1]))
    assert isnan(results_of(ClassificationTask, evaluation, ["a", "b"]).numbers["loss"])
