"""From series, images and volumes to (tokens, layout), and through a block."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from vimamba import BidirectionalMixer, Block, VisionMamba
from vimamba.layers.embed.patch import PatchEmbed, patch_grid
from vimamba.layers.embed.position import Rope, resize_pos_embed, sincos_pos_embed
from vimamba.layers.embed.tokens import TokenEmbedding
from vimamba.layers.grid import Layout, class_positions, split_tokens, take_tokens
from vimamba.layers.norm import RMSNorm

# Size, patch, stride and grid of signals of one, two and three axes; with a remainder, overlapping, of length 1.
SIGNALS = [
    ((21,), (4,), (4,), (5,)),
    ((9,), (3,), (2,), (4,)),
    ((3,), (3,), (3,), (1,)),
    ((9, 12), (4, 3), (4, 3), (2, 4)),
    ((8, 7), (4, 4), (2, 3), (3, 2)),
    ((5, 9, 8), (2, 3, 4), (2, 3, 4), (2, 3, 2)),
    ((4, 5, 3), (2, 3, 3), (1, 2, 3), (3, 2, 1)),
]


def signal(size: tuple[int, ...], batch: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def embedding(size: tuple[int, ...], patch: tuple[int, ...], seed: int = 0, **options) -> TokenEmbedding:
    torch.manual_seed(seed)
    made = TokenEmbedding(size, patch, **{"in_chans": 2, "embed_dim": 12, **options})
    made.init_embedding()
    return made


@pytest.mark.parametrize(("size", "patch", "stride", "grid"), SIGNALS)
def test_a_token_is_the_projection_of_its_patch(size, patch, stride, grid):
    torch.manual_seed(0)
    embed, x = PatchEmbed(2, 12, patch, stride), signal(size)
    tokens = embed(x)
    assert embed.grid_size(size) == grid
    for number, place in enumerate(itertools.product(*map(range, grid))):
        cut = tuple(slice(at * s, at * s + p) for at, s, p in zip(place, stride, patch, strict=True))
        expected = x[(..., *cut)].flatten(1) @ embed.proj.weight.flatten(1).t() + embed.proj.bias
        torch.testing.assert_close(tokens[:, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, dict(class_token="double", num_registers=1), dict(pos_embed="sincos")], ids=str
)
@pytest.mark.parametrize(("size", "patch", "stride", "grid"), SIGNALS)
def test_an_embedding_says_where_its_tokens_stand(size, patch, stride, grid, options):
    embed = embedding(size, patch, stride=stride, **options)
    tokens, layout = embed.embed(signal(size))
    assert layout.grid == grid
    assert tokens.shape == (2, layout.patches + embed.num_prefix_tokens, 12)
    patches, _ = split_tokens(tokens, layout.extras)
    if embed.sincos:
        positions = sincos_pos_embed(12, grid, grid, tokens.device)
    else:
        positions, _ = split_tokens(embed.pos_embed, class_positions(embed.class_token, layout.patches))
    torch.testing.assert_close(patches, embed.patch_embed(signal(size)) + positions)
    if embed.reg_tokens is not None:
        registers = take_tokens(tokens, layout.registers)
        torch.testing.assert_close(registers, embed.reg_tokens.expand_as(registers))


@pytest.mark.parametrize(("old", "new"), [(9, 14), (14, 9), (5, 1), (1, 3)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_of_any_rank_are_interpolated_as_those_of_images(axis, old, new):
    """Along each axis of a volume, and in an image of one column, as in an image of one row."""
    pos_embed = torch.randn(1, old + 1, 4, generator=torch.Generator().manual_seed(0))
    expected = resize_pos_embed(pos_embed, (1, old), (1, new), "middle")
    assert expected.shape == (1, new + 1, 4)
    grids = [tuple(n if other == axis else 1 for other in range(3)) for n in (old, new)]
    torch.testing.assert_close(resize_pos_embed(pos_embed, *grids, "middle"), expected)
    torch.testing.assert_close(resize_pos_embed(pos_embed, (old,), (new,), "middle"), expected)
    torch.testing.assert_close(resize_pos_embed(pos_embed, (old, 1), (new, 1), "middle"), expected)


@pytest.mark.parametrize(("size", "larger"), [((12,), (20,)), ((12, 8), (8, 20)), ((4, 8, 8), (8, 4, 12))])
def test_an_embedding_is_made_for_another_size(size, larger):
    embed = embedding(size, (4,) * len(size))
    before, layout = embed.embed(signal(larger))
    embed.resize(larger)
    after, same = embed.embed(signal(larger))
    assert (embed.img_size, embed.grid, same) == (larger, layout.grid, layout)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)], ids=str)
def test_fixed_positions_tell_the_places_along_every_axis_apart(grid):
    rank = len(grid)
    values = sincos_pos_embed(12, grid, grid, torch.device("cpu"))[0]
    assert len(values.unique(dim=0)) == len(values)
    for axis, part in enumerate(values.unflatten(0, grid).split(12 // rank, dim=-1)):
        assert len(part.flatten(0, -2).unique(dim=0)) == grid[axis]  # nothing else is in an axis's channels


@pytest.mark.parametrize("grid", [(6,), (4, 5), (3, 2, 4)], ids=str)
def test_rotations_make_products_depend_on_the_distance_along_each_axis(grid):
    rope, layout = Rope(12, rank=len(grid), trained=8), Layout(grid, (2,))
    torch.manual_seed(0)
    q, k = (torch.randn(12, dtype=torch.float64).expand(1, layout.patches + 1, 12) for _ in range(2))
    turned = [Rope.rotate(x, rope.angles(x, layout)) for x in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(turned[0][0, 2], q[0, 2])  # the class token stays
    (q, _), (k, _) = (split_tokens(x, layout.extras) for x in turned)
    products = (q[0] @ k[0].t()).unflatten(0, grid).unflatten(-1, grid)
    found: dict[tuple[int, ...], float] = {}
    for a, b in itertools.product(itertools.product(*map(range, grid)), repeat=2):
        distance = tuple(i - j for i, j in zip(a, b, strict=True))
        value = float(products[(*a, *b)])
        assert found.setdefault(distance, value) == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert len({round(value, 6) for value in found.values()}) == len(found)


def test_rotations_are_exact_in_half_precision_models():
    """Frequencies are computed at each call: a model's cast cannot reach them."""
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, d_state=4, rope="patches", pos_embed=False)
    half = VisionMamba(**options).bfloat16()
    x = torch.zeros(1, 17, 16)
    layout = Layout((4, 4), (8,))
    for a, b in zip(half.rope.angles(x.bfloat16(), layout), half.rope.angles(x, layout), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("paths", [["row"], ["row", "column"], ["snake"], ["window2", "column:backward"]], ids=str)
@pytest.mark.parametrize("merge", ["mean", "gate"])
@pytest.mark.parametrize("size", [(20,), (12, 20), (8, 12, 8)], ids=str)
def test_a_block_learns_on_a_grid_of_any_rank(size, merge, paths):
    embed = embedding(size, (4,) * len(size), num_registers=2)
    block = Block(BidirectionalMixer(12, d_state=4, paths=paths, merge=merge), RMSNorm(12))
    tokens, layout = embed.embed(signal(size))
    out = block(tokens, layout=layout)
    assert out.shape == tokens.shape
    out.square().sum().backward()
    for module in (embed, block):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_block_takes_pytorchs_norms():
    torch.manual_seed(0)
    mixer, x = BidirectionalMixer(8, d_state=4), torch.randn(2, 5, 8)
    expected = Block(mixer, RMSNorm(8, eps=1e-5))(x)
    torch.testing.assert_close(Block(mixer, torch.nn.RMSNorm(8, eps=1e-5))(x), expected)
    torch.testing.assert_close(expected, x + mixer(F.rms_norm(x, (8,), eps=1e-5)))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((3,), {}, "the series is 3 steps, smaller than one patch of 4"),
        ((8, 3), {}, "the image is 8×3 pixels, smaller than one patch of 4×4"),
        ((8, 8, 2), {}, "the volume is 8×8×2 voxels, smaller than one patch of 4×4×4"),
        ((8,), dict(patch_size=(4, 4)), r"patch_size must be one whole number, or a length, got \(4, 4\)"),
        ((8, 8, 8), dict(stride=0), "stride must be a whole number from 1 up, got 0"),
        ((8,), dict(stem="conv"), 'stem="conv" needs patch_size to be 2, 4, 8, 16 or 32 pixels squared'),
        ((8, 8, 8), dict(pos_embed="sincos", embed_dim=8), 'pos_embed="sincos" needs embed_dim divisible by 6, got 8'),
        ((8,), dict(num_registers=3), "num_registers must be from 0 to the number of patches, 2, got 3"),
        ((0,), {}, "img_size must be a whole number from 1 up, got 0"),
    ],
)
def test_impossible_embeddings_are_refused(size, options, message):
    with pytest.raises(ValueError, match="^" + message):
        TokenEmbedding(size, **{"patch_size": 4, **options})


def test_a_signal_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"^image patches need 2 axes behind the channels, got 1"):
        embedding((8, 8), (4, 4)).embed(torch.zeros(2, 8, 8))


def test_patches_of_volumes_keep_their_size():
    with pytest.raises(ValueError, match=r"^patch_size can be changed on images"):
        embedding((8,), (4,)).resize(patch_size=2)
    assert patch_grid((7,), (7,), (2,)) == (1,)
