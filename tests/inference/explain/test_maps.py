"""Maps: what they are of, sizes, classes, and that they point at what decides."""

from __future__ import annotations

import pytest
import timm
import torch

import vimamba
from tests.inference.explain.test_attention import DESIGNS, images, small
from vimamba import VisionMamba
from vimamba.errors import UserError
from vimamba.inference.explain.attention import in_parts, to_places
from vimamba.inference.explain.faithful import STEPS, curves, random_map
from vimamba.inference.explain.maps import MAPS, reshape_transform
from vimamba.inference.explain.tokens import direction_use, receptive_field, receptive_fields


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_every_method_gives_a_map_of_any_size(method, size):
    pytest.importorskip("captum"), pytest.importorskip("pytorch_grad_cam")
    model = small(class_token="middle", num_registers=2)
    found = vimamba.explain(model, torch.randn(2, 3, *size), method, [1, 2])
    by = 1 if method == "integrated_gradients" else 8
    assert found.shape == (2, size[0] // by, size[1] // by)
    assert found.isfinite().all()
    assert found.std() > 0


@pytest.mark.parametrize(
    "options", [{}, dict(class_token="double"), dict(class_token="none", num_registers=3)], ids=str
)
def test_reshape_transform_leaves_class_and_register_tokens_out(options):
    model = small(**options)
    taps = model.forward_intermediates(images(), norm=False, intermediates_only=True, indices=1)
    seen = []
    model.layers[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    model(images())
    torch.testing.assert_close(reshape_transform(model, (64, 64))(seen[0]), taps[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", DESIGNS, ids=str)
def test_attribution_is_of_what_the_class_changes(options):
    model = small(**options)
    one, other = (vimamba.explain(model, images(), "attribution", [target] * 2) for target in (0, 3))
    assert one.shape == (2, 8, 8)
    assert not torch.allclose(one, other)
    likeliest = model(images()).argmax(1).tolist()
    assert torch.equal(vimamba.explain(model, images()), vimamba.explain(model, images(), "attribution", likeliest))


@pytest.mark.parametrize("options", [{}, dict(stem="conv")], ids=str)
def test_a_patch_of_the_mean_colour_adds_nothing(options):
    examples = images()
    examples[..., 8:16, 24:32] = torch.nan
    mean = examples.nanmean((2, 3), keepdim=True)
    found = vimamba.explain(small(**options), torch.where(examples.isnan(), mean, examples), "attribution", [1, 2])
    torch.testing.assert_close(found[:, 1, 3], torch.zeros(2), rtol=0, atol=1e-5 * float(found.abs().max()))
    assert (found.flatten(1).abs() > 1e-3 * found.abs().max()).float().mean() > 0.8


def test_values_of_pixels_are_summed_over_equal_parts():
    values = torch.randn(2, 6, 7, dtype=torch.double)
    found = in_parts(values, (2, 3))
    finer = values.repeat_interleave(3, 2) / 3  # thirds of a pixel, seven of which are a part
    torch.testing.assert_close(found, finer.unflatten(2, (3, 7)).unflatten(1, (2, 3)).sum((2, 4)))


@pytest.mark.parametrize(
    "options", [dict(patch_size=8), dict(patch_size=16, stride=8), dict(patch_size=8, stem="conv")], ids=str
)
def test_a_token_stands_where_it_sees(options):
    """The middle of the pixels that change a token, and the middle of the parts of the image that its value goes to."""
    model = small(img_size=96, **options)
    pixels = torch.randn(1, 3, 96, 96, requires_grad=True)
    rows, columns = model.patch_embed.grid_size((96, 96))
    token = model.patch_embed(pixels).unflatten(1, (rows, columns))[0, 2, 5]
    seen = torch.autograd.grad(token.sum(), pixels)[0][0].abs().sum(0).nonzero().double()
    middle = (seen.amin(0) + seen.amax(0)) / 2
    one = torch.zeros(1, rows, columns, dtype=torch.double)
    one[0, 2, 5] = 3.0
    placed = to_places(one, model, (96, 96))
    middles = [(torch.arange(count).double() + 0.5) * 96 / count - 0.5 for count in (rows, columns)]
    assert placed.sum() == pytest.approx(3)
    assert placed[0].sum(1) @ middles[0] / 3 == pytest.approx(middle[0])
    assert placed[0].sum(0) @ middles[1] / 3 == pytest.approx(middle[1])


def test_patches_side_by_side_keep_their_values_and_what_a_stem_sees_first_stays_in_the_image():
    maps = torch.randn(2, 5, 12)
    assert torch.equal(to_places(maps, small(), (40, 96)), maps)
    placed = to_places(maps, small(stem="conv"), (40, 96))
    torch.testing.assert_close(placed.sum((1, 2)), maps.sum((1, 2)), rtol=1e-5, atol=1e-5)


def brightness_model() -> torch.nn.Module:
    """Class 1 is likelier the brighter the image's upper left corner."""

    class Corner(torch.nn.Module):
        def forward(self, x):
            bright = 4 * x[:, :, :8, :8].mean((1, 2, 3))
            return torch.stack([-bright, bright], 1)

    return Corner()


def test_a_right_map_beats_a_random_and_a_wrong_one_under_both_curves():
    model, image = brightness_model(), torch.zeros(3, 32, 32)
    image[:, :8, :8] = 1.0
    right = torch.zeros(4, 4)
    right[0, 0] = 1.0
    blank = torch.zeros_like(image)
    good, chance, wrong = (curves(model, image, m, 1, blank) for m in (right, random_map(right), -right))
    assert good.deletion_area < chance.deletion_area < wrong.deletion_area
    assert good.insertion_area > chance.insertion_area > wrong.insertion_area
    assert len(good.deletion) == STEPS + 1
    assert good.deletion[0] == good.insertion[-1]  # the whole image
    assert good.deletion[-1] == good.insertion[0] == 0.5  # none of it


def squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise with one patch of 4 × 4 that is brighter in one channel: images, which channel, which patch."""
    generator = torch.Generator().manual_seed(seed)
    found = 0.2 * torch.randn(count, 3, 32, 32, generator=generator)
    labels, places = (torch.randint(most, (count,), generator=generator) for most in (3, 16))
    for image, label, place in zip(found, labels.tolist(), places.tolist(), strict=True):
        top, left = 8 * (place // 4), 8 * (place % 4)
        image[label, top : top + 8, left : left + 8] += 2.0
    return found, labels, places


@pytest.fixture(scope="module")
def finder():
    """A model that has learnt which channel it is."""
    torch.manual_seed(0)
    model = VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=2, d_state=4, num_classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(100):
        examples, labels, _ = squares(32, step + 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(examples), labels).backward()
        optimizer.step()
    return model.eval()


def test_attribution_points_at_what_decides_and_its_deletion_changes_the_answer(finder):
    examples, labels, places = squares(24, 1000)
    with torch.no_grad():
        assert (finder(examples).argmax(1) == labels).float().mean() > 0.9
    maps = vimamba.explain(finder, examples, "attribution", labels.tolist())
    assert (maps.flatten(1).argmax(1) == places).float().mean() > 0.8  # by chance 1 of 16
    areas = []
    for i in range(8):
        of_image = (maps[i], random_map(maps[i], i))
        areas.append([curves(finder, examples[i], each, int(labels[i])).deletion_area for each in of_image])
    ours, chance = torch.tensor(areas).mean(0)
    assert ours < 0.6 * chance


def test_what_tokens_hold():
    model = small()
    norms = vimamba.explain(model, images(), "token_norms")
    features = model.forward_intermediates(images(), 1, intermediates_only=True)[0]
    torch.testing.assert_close(norms, features.norm(dim=1))
    colours = vimamba.explain(model, images(), "principal_components")
    assert colours.shape == (2, 8, 8, 3)
    assert (colours.amin((1, 2)) == 0).all()
    assert (colours.amax((1, 2)) == 1).all()


def test_a_receptive_field_ends_where_its_directions_do():
    """The middle patch is the fifth of eight in its row and column: pixels 32 to 39."""
    above, below = (slice(None), slice(0, 32)), (slice(None), slice(40, 64))
    one_way = receptive_field(small(bidirectional="none", depth=1), images())
    both = vimamba.explain(small(depth=1), images(), "receptive_field")
    forward, backward = (receptive_field(small(depth=1), images(), way) for way in (False, True))
    assert one_way.shape == both.shape == (2, 64, 64)
    for field, seen, unseen in ((one_way, above, below), (forward, above, below), (backward, below, above)):
        assert (field[seen] > 0).any()
        assert (field[unseen] == 0).all()
    assert (both[above] > 0).any()
    assert (both[below] > 0).any()


def test_receptive_fields_before_and_after_training_and_beside_other_models():
    model = small()
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight.mul_(3)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    fields = receptive_fields(model, torch.randn(2, 3, 160, 160), ["test_vit"])
    ways = ["both ways", "forward", "backward"]
    names = {"before training": ways, "after training": ways, "test_vit, untrained": ways[:1]}
    assert {name: list(of_model) for name, of_model in fields.items()} == names
    assert not torch.allclose(fields["before training"]["both ways"], fields["after training"]["both ways"])
    assert all(field.shape == (160, 160) for of_model in fields.values() for field in of_model.values())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_what_directions_give():
    model = small(paths=["row", "column"], merge="gate", gate="token")
    with torch.no_grad():
        model.layers[1].mixer.D_b.zero_()
        model.layers[1].mixer.x_proj_b.weight.zero_()
    first, second = direction_use(model, images())
    assert first.names == ["row forward", "row backward", "column forward", "column backward"]
    torch.testing.assert_close(first.shares_BG.sum(1), torch.ones(2))
    torch.testing.assert_close(first.gates_BG.sum(1), torch.ones(2))
    assert (first.shares_BG > 0).all()
    assert (second.shares_BG[:, 1] == 0).all()
    assert (second.gates_BG[:, 1] > 0).all()  # a gate may be open to nothing
    shares = vimamba.explain(small(bidirectional=["none", "ssm"]), images(), "directions")
    assert shares.shape == (2, 2, 2)
    assert torch.equal(shares[:, 0], torch.tensor([[1.0, 0.0]] * 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(method="attributon"), "did you mean attribution"),
        (dict(target=[1]), "1 classes for 2 images"),
        (dict(target=[1, 9]), "`target` 9: the model has the classes 0 to 4"),
        (dict(images=torch.zeros(3, 64, 64)), "`images`: give"),
        (dict(model=timm.create_model("test_vit")), "the model is a VisionTransformer"),
        (dict(model=timm.create_model("test_vit"), method="gradcam"), "takes a VisionMamba"),
        (dict(model=timm.create_model("test_vit"), method="directions"), "a VisionTransformer has none"),
        (dict(model=torch.nn.Flatten(), method="token_norms"), "a Flatten does not show its features"),
    ],
)
def test_what_cannot_be_explained_is_said(change, words):
    given = dict(model=small(), images=images(), method="attribution", target=[1, 2])
    if "model" in change:
        given["images"] = torch.zeros(2, 3, 160, 160)
    with pytest.raises(UserError, match=words):
        vimamba.explain(**{**given, **change})


@pytest.mark.parametrize(
    ("package", "method"), [("captum.attr", "integrated_gradients"), ("pytorch_grad_cam", "gradcam")]
)
def test_a_missing_package_is_named(package, method, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'vimamba\[explain\]'"):
        vimamba.explain(small(), images(), method, [0, 0])
