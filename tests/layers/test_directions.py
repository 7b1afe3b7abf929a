"""Mixers along directions: that they mix what the path, the way round and the weights say."""

from __future__ import annotations

import pytest
import torch

from vimamba import BidirectionalMixer
from vimamba.layers.grid import Layout, ScanPath, insert_tokens, split_tokens


def transposed(layout: Layout) -> Layout:
    return Layout(layout.grid[::-1], layout.extras)


def transpose(x_BLE: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The sequence of the image with its axes the other way round."""
    patches, extras = split_tokens(x_BLE, layout.extras)
    axes = range(len(layout.grid), 0, -1)
    patches = patches.unflatten(1, layout.grid).permute(0, *axes, -1).flatten(1, -2)
    return insert_tokens(patches, extras, layout.extras)


@pytest.mark.parametrize("mode", ["none", "ssm", "ssm_conv"])
@pytest.mark.parametrize(
    ("grid", "extras"),
    [((4, 4), ()), ((3, 5), (7,)), ((5, 3), (0, 8, 16)), ((7,), (3,)), ((2, 3, 4), (5,)), ((3, 1, 2), ())],
)
def test_columns_are_the_rows_of_the_transposed_image(grid, extras, mode):
    torch.manual_seed(0)
    columns = BidirectionalMixer(8, d_state=4, mode=mode, paths=["column"]).double()
    rows = BidirectionalMixer(8, d_state=4, mode=mode).double()
    rows.load_state_dict(columns.state_dict())
    layout = Layout(grid, extras)
    x = torch.randn(2, layout.patches + len(extras), 8, dtype=torch.float64)
    expected = transpose(rows(transpose(x, layout)), transposed(layout))
    torch.testing.assert_close(columns(x, layout=layout), expected)


@pytest.mark.parametrize("weights", ["own", "shared"])
def test_several_paths_are_the_mean_of_each(weights):
    torch.manual_seed(0)
    names, layout = ["row", "column", "snake:backward", "window2"], Layout((4, 3), (6,))
    mixer = BidirectionalMixer(8, d_state=4, paths=names, path_weights=weights).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    total = torch.zeros_like(x)
    for name in names:
        alone = BidirectionalMixer(8, d_state=4, paths=[name]).double()
        own = "" if weights == "shared" or name == "row" else f"_{ScanPath.parse(name).name}"
        state = mixer.state_dict()
        alone.load_state_dict({key: state[_of_path(key, own)] for key in alone.state_dict()})
        total += alone(x, layout=layout) * len(alone.scans)
    torch.testing.assert_close(mixer(x, layout=layout), total / len(mixer.scans))
    assert len(mixer.scans) == 7


def _of_path(key: str, own: str) -> str:
    """The name of a weight of the first path for the path whose names end in `own`."""
    module, dot, rest = key.partition(".")
    if module in ("in_proj", "out_proj"):
        return key
    if module.startswith("A"):
        return module.replace("A", f"A{own}", 1) + dot + rest
    return (module[:-2] + own + "_b" if module.endswith("_b") else module + own) + dot + rest


@pytest.mark.parametrize("name", ["row", "snake"])
def test_one_sense_of_a_path(name):
    torch.manual_seed(0)
    layout = Layout((3, 4), (5,))
    backward = BidirectionalMixer(8, d_state=4, paths=[f"{name}:backward"]).double()
    both = BidirectionalMixer(8, d_state=4, paths=[name], mode="none").double()
    both.load_state_dict(backward.state_dict())
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    torch.testing.assert_close(backward(x, layout=layout), both(x, reverse=True, layout=layout))


def test_the_two_dimensional_convolution_sees_neighbours_on_the_grid_only():
    torch.manual_seed(0)
    layout = Layout((5, 5), (12,))  # the class token stands in the middle
    mixer = BidirectionalMixer(8, d_state=4, conv="2d")
    xz = torch.randn(1, 26, 32, requires_grad=True)
    out = mixer._convolve_grid(xz, layout)
    (grad,) = torch.autograd.grad(out[0, 0, :16].sum(), xz)  # the top left patch
    assert set(grad[0, :, :16].abs().sum(-1).nonzero()[:, 0].tolist()) == {0, 1, 5, 6}
    (grad,) = torch.autograd.grad(mixer._convolve_grid(xz, layout)[0, 12].sum(), xz)
    assert grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == [12]
    assert not any("conv1d" in key for key in mixer.state_dict())


def test_the_pooled_token_gives_the_first_token_a_view_of_the_last():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8, requires_grad=True)
    for paths in (["row:forward"], ["row:backward"]):
        for pooled in (False, True):
            mixer = BidirectionalMixer(8, d_state=4, paths=paths, pooled_token=pooled)
            first, last = (0, -1) if paths == ["row:forward"] else (-1, 0)
            out = mixer(x)
            assert out.shape == x.shape
            (grad,) = torch.autograd.grad(out[0, first].sum(), x)
            assert bool(grad[0, last].abs().sum() > 0) == pooled


@pytest.mark.parametrize("text", ["diagonal", "window", "row4", "window0", "row:up", ""])
def test_unknown_paths_are_refused(text):
    with pytest.raises(ValueError, match="paths"):
        BidirectionalMixer(8, paths=[text])


@pytest.mark.parametrize("paths", ["row", [], ["row", "row"], ["row:forward", "row:backward"]])
def test_paths_that_cannot_be_are_refused(paths):
    with pytest.raises(ValueError, match="paths"):
        BidirectionalMixer(8, paths=paths)


def test_a_path_without_a_grid_is_refused():
    with pytest.raises(ValueError, match='paths: "column" needs the grid'):
        BidirectionalMixer(8, paths=["column"])(torch.zeros(1, 4, 8))


@pytest.mark.parametrize(
    ("path", "layout", "message"),
    [
        ("column", Layout((2, 3)), r"the layout \(\(2, 3\), \(\), \(\)\) is not that of a sequence of 4 tokens"),
        ("column", Layout((2, 0), (0, 1, 2, 3)), "paths: a grid of 2×0 patches is empty"),
        ("window2x2", Layout((4,)), 'paths: "window2" needs a grid of rank 2, got 4'),
        ("window1x2x2", Layout((2, 2)), 'paths: "window1x2x2" needs a grid of rank 3, got 2×2'),
    ],
)
def test_a_layout_of_another_sequence_is_refused(path, layout, message):
    with pytest.raises(ValueError, match="^" + message):
        BidirectionalMixer(8, paths=[path])(torch.zeros(1, 4, 8), layout=layout)


def test_a_convolution_of_images_is_refused_on_other_grids():
    with pytest.raises(ValueError, match=r'^conv="2d" needs a grid of rows and columns, got 4'):
        BidirectionalMixer(8, conv="2d")(torch.zeros(1, 4, 8), layout=Layout((4,)))
