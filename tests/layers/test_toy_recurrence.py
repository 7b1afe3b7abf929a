"""A recurrence from outside the package: what a stranger writes, and that every design of a model takes it."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba import Block, VisionMamba, VisionMambaPyramid
from vimamba.layers.memory import RECOMPUTE
from vimamba.layers.mixers import RECURRENCES
from vimamba.layers.mixers.directional import DirectionalMixer
from vimamba.models.description import skeleton


class MovingAverage(nn.Module):
    """y_t = d y_(t-1) + (1 - d) x_t for each channel, or, reversed, of what comes after."""

    def __init__(self, dim: int, decay: float = 0.5, device=None, dtype=None) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((dim,), math.log(decay / (1 - decay)), device=device, dtype=dtype))

    def forward(self, x_BLD: Tensor, reverse: bool = False) -> Tensor:
        """All steps at once: the token of each column counts for that of each row by its age."""
        d, step = self.decay.sigmoid(), torch.arange(x_BLD.shape[1], device=x_BLD.device)
        age_LL1 = (step - step[:, None] if reverse else step[:, None] - step)[..., None]
        weights_LSD = torch.where(age_LL1 < 0, 0.0, (1 - d) * d ** age_LL1.clamp(min=0))
        return torch.einsum("lsd,bsd->bld", weights_LSD, x_BLD)

    def no_weight_decay(self) -> set[str]:
        """The decay keeps its scale."""
        return {"decay"}


GRID, CLASS = (4, 6), 12  # rows and columns, and the place of the class token
SMALL = dict(img_size=(32, 48), patch_size=8, embed_dim=8, depth=2, num_classes=3, recurrence=MovingAverage)
DESIGNS = {
    "both": {},
    "none": dict(bidirectional="none"),
    "turns": dict(bidirectional="none", alternate=True),
    "pairs": dict(bidirectional="layer"),
    "cross-scan": dict(paths=["row", "column"]),
    "one way": dict(paths=["column:backward", "row"]),
    "shared": dict(paths=["row", "column"], path_weights="shared"),
    "sum": dict(merge="sum", layer_scale=0.3),
    "gate": dict(merge="gate", paths=["row", "column"]),
    "token gate": dict(merge="gate", gate="token"),
    "decay": dict(decay=0.9),
}


def build(**options) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(**{**SMALL, **options}).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("recurrence.decay", "gate.proj.weight")):
            nn.init.normal_(parameter)
    return model


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def along_columns() -> list[int]:
    """The places of the tokens, column after column; the class token keeps its own."""
    places = [at + (at >= CLASS) for at in (r * GRID[1] + c for c in range(GRID[1]) for r in range(GRID[0]))]
    return [*places[:CLASS], CLASS, *places[CLASS:]]


def plain_average(x_BLD: Tensor, recurrence: MovingAverage, places: list[int]) -> Tensor:
    """The formula, a step at a time over the tokens at `places`."""
    d = recurrence.decay.sigmoid()
    y, state = torch.zeros_like(x_BLD), torch.zeros_like(x_BLD[:, 0])
    for place in places:
        state = d * state + (1 - d) * x_BLD[:, place]
        y[:, place] = state
    return y


def plain_mixer(mixer: DirectionalMixer, x: Tensor, reverse: bool) -> Tensor:
    parts = []
    for scan in mixer.scans:
        places = along_columns() if scan.path.order == "column" else list(range(x.shape[1]))
        backward = scan.reverse != reverse
        recurrence = mixer.get_submodule(f"recurrence{scan.weights}")
        parts.append(plain_average(x, recurrence, places[::-1] if backward else places))
    weights = torch.full((*x.shape[:2], len(parts)), 1.0 if mixer.merge == "sum" else 1 / len(parts), dtype=x.dtype)
    if mixer.gate is not None:
        pooled = x.mean(1, keepdim=True).expand_as(x) if mixer.gate.level == "image" else x
        weights = mixer.gate.proj(pooled).softmax(-1)
    y = sum(weights[..., i : i + 1] * part for i, part in enumerate(parts))
    return y if mixer.gamma is None else y * mixer.gamma


def plain_model(model: VisionMamba, x: Tensor) -> Tensor:
    def rms(stream: Tensor, norm: nn.Module) -> Tensor:
        return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + norm.eps) * norm.weight

    def after(layer: Block, stream: Tensor, reverse: bool) -> Tensor:
        return stream + plain_mixer(layer.mixer, rms(stream, layer.norm), reverse)

    stream, layout = model.embed(x)
    assert (layout.grid, layout.extras) == (GRID, (CLASS,))
    for step in model.steps:
        stream = sum(after(model.layers[i], stream, reverse) for reverse, i in enumerate(step))
    return model.head(rms(stream, model.norm_f)[:, CLASS])


@pytest.mark.parametrize("name", DESIGNS)
def test_a_model_gives_what_the_formula_gives(name):
    model = build(**DESIGNS[name])
    # Gates are float32 whatever the model is.
    tolerance = dict(rtol=1e-5, atol=1e-6) if "gate" in name else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(images()), plain_model(model, images()), **tolerance)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_step_of_training_lowers_the_loss(name):
    model, targets = build(**DESIGNS[name]).train(), torch.tensor([0, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = F.cross_entropy(model(images()), targets)
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert F.cross_entropy(model(images()), targets) < before


@pytest.mark.parametrize("name", ["both", "pairs", "gate"])
def test_a_model_exports(name):
    model = build(**DESIGNS[name])
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images(1)), model(images(1)))


def test_computing_again_learns_the_same():
    """What the backward pass computes again instead of keeping it is not the recurrence's business."""
    grads = []
    for recompute in RECOMPUTE:
        model = build(paths=["row", "column"], recompute=recompute)
        grads.append(torch.autograd.grad(model(images()).square().sum(), list(model.parameters())))
    for long, always, never in zip(*grads, strict=True):
        assert long.equal(never)
        assert always.equal(never)


def test_hooks_and_weight_decay_find_the_recurrence():
    model, seen = build(), []
    model.layers[1].mixer.recurrence_b.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model(images())
    assert seen == [(2, 25, 8)]
    assert "layers.0.mixer.recurrence_b.decay" in model.no_weight_decay()
    decays = VisionMamba(**SMALL, decay=0.9).layers[0].mixer.recurrence_b.decay.sigmoid()
    torch.testing.assert_close(decays, torch.full((8,), 0.9))


def test_a_pyramid_takes_it_too():
    torch.manual_seed(0)
    options = dict(paths=["row", "column"], merge="gate", recurrence=MovingAverage, decay=0.7)
    model = VisionMambaPyramid(dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_classes=3, **options)
    model(images().float()).sum().backward()
    assert model.stages[3].blocks[0].mixer.recurrence_column_b.decay.grad.abs().sum() > 0


def test_a_registered_one_is_named_in_files(monkeypatch):
    monkeypatch.setitem(RECURRENCES, "average", MovingAverage)
    model_args = dict(recurrence="average", decay=0.7)
    model = timm.create_model("vim_nano", **model_args)
    described = skeleton(
        "vim_nano", model_args, {}, lambda: timm.create_model("vim_nano", **model_args), model.state_dict()
    )
    assert isinstance(described.layers[5].mixer.recurrence_b, MovingAverage)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(bidirectional="ssm"), ValueError, 'mode="ssm" shares projections'),
        (dict(d_state=8), ValueError, "d_state=8 is no option of this model's recurrence"),
        (dict(conv="2d"), ValueError, "conv='2d' is no option"),
        (dict(decy=0.5), TypeError, "VisionMamba has no argument 'decy'; did you mean decay"),
        (dict(dt_min=0.5), TypeError, "VisionMamba has no argument 'dt_min'"),
        (dict(recurrence="mmaba"), ValueError, "recurrence must be one of 'mamba', got 'mmaba'; did you mean mamba"),
    ],
)
def test_what_it_cannot_take_is_refused(options, error, message):
    with pytest.raises(error, match="^" + message):
        VisionMamba(**{**SMALL, **options})
