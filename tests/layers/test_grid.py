"""A grid of tokens of any rank: what order each path is, and where the tokens stand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vimamba.layers.grid import (
    Layout,
    ScanPath,
    class_positions,
    insert_tokens,
    parse_paths,
    route,
    split_tokens,
    take_tokens,
    token_layout,
    with_token,
)

GRIDS = [
    *((1,), (2,), (7,)),
    *((4, 4), (3, 5), (6, 4), (1, 7), (7, 1), (1, 1)),
    *((2, 3, 4), (3, 3, 3), (5, 1, 3), (1, 4, 1), (4, 2, 1)),
]
NAMES = ["row", "column", "snake", "window2", "window3", "column:backward"]
CLASS_TOKENS = ["none", "head", "middle", "double"]
Place = tuple[int, ...]


def cells(name: str, grid: Place) -> list[Place]:
    """The place on the grid of each step along the path."""
    all_cells = list(itertools.product(*map(range, grid)))
    return [all_cells[index] for index in ScanPath.parse(name).keys(grid).flatten().argsort().tolist()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_path_visits_every_patch_once(name, grid):
    assert ScanPath.parse(name).keys(grid).shape == grid
    assert sorted(cells(name, grid)) == list(itertools.product(*map(range, grid)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_neighbours_on_the_snake_are_neighbours_in_the_grid(grid):
    steps = cells("snake", grid)
    assert all(sum(abs(a - b) for a, b in zip(*pair, strict=True)) == 1 for pair in itertools.pairwise(steps))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_last_axis_is_fastest_along_rows_and_the_first_along_columns(grid):
    assert cells("row", grid) == sorted(cells("row", grid))
    assert cells("column", grid) == sorted(cells("row", grid), key=lambda cell: cell[::-1])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("side", [2, 3])
def test_windows_are_read_in_row_order_one_after_the_other(grid, side):
    def within(cell: Place) -> tuple[Place, Place]:
        return tuple(at // side for at in cell), tuple(at % side for at in cell)

    assert cells(f"window{side}", grid) == sorted(cells("row", grid), key=within)


def test_some_orders_written_out():
    assert cells("column", (2, 3)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert cells("snake", (2, 3)) == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    assert cells("snake", (2, 2, 2))[3:5] == [(0, 1, 0), (1, 1, 0)]
    assert cells("window2", (2, 4)) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert cells("window1x2", (2, 3)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert cells("window2x1x1", (2, 1, 2)) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert cells("window4", (3, 3)) == cells("row", (3, 3))  # one window that the grid does not fill


def test_names_stand_for_the_order_and_not_for_the_way_round():
    found = {text: (path.name, path.reverse) for text in NAMES for path in [ScanPath.parse(text)]}
    assert found["column"] == ("column", None)
    assert found["column:backward"] == ("column", True)
    assert ScanPath.parse("row:forward").reverse is False
    assert [path.name for path in parse_paths(["window2x3x4", "window5x5"])] == ["window2x3x4", "window5"]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize(("name", "registers"), [("column", 0), ("snake", 3), ("window2", 1)])
def test_a_route_and_its_inverse_leave_other_tokens_in_their_places(name, registers, class_token, grid):
    registers = min(registers, math.prod(grid))
    layout = token_layout(class_token, grid, registers)
    length = layout.patches + len(layout.extras)
    order, rank = route(ScanPath.parse(name), layout, torch.zeros(1, length))
    assert torch.equal(order[rank], torch.arange(length))
    assert torch.equal(rank[order], torch.arange(length))
    assert order[list(layout.extras)].tolist() == list(layout.extras)
    patches = [at for at in range(length) if at not in layout.extras]
    assert [order.tolist()[at] for at in patches] == [patches[index] for index in numbers(name, grid)]


def numbers(name: str, grid: Place) -> list[int]:
    """The row-major number of each step along the path."""
    return [sum(at * math.prod(grid[i + 1 :]) for i, at in enumerate(cell)) for cell in cells(name, grid)]


def test_registers_are_spread_evenly_and_leave_the_class_token_in_the_middle():
    layout = token_layout("middle", (4, 4), 4)
    assert layout == Layout((4, 4), (10,), (2, 7, 12, 17))
    assert layout.extras == (2, 7, 10, 12, 17)
    assert token_layout("head", (4,), 1) == Layout((4,), (0,), (2,))
    assert with_token(layout, 0).extras == (0, 3, 8, 11, 13, 18)
    assert with_token(layout, 21).extras == (*layout.extras, 21)


@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_tokens_are_put_in_and_taken_out_again(class_token, grid):
    patches, tokens = torch.randn(2, math.prod(grid), 4), torch.randn(2, 2, 4)
    places = class_positions(class_token, math.prod(grid))
    x = insert_tokens(patches, tokens[:, : len(places)], places)
    found, taken = split_tokens(x, places)
    assert torch.equal(found, patches)
    assert torch.equal(taken, tokens[:, : len(places)])
    assert torch.equal(take_tokens(x, places), taken)


@pytest.mark.parametrize("grid", [(), (0,), (3, 0), (2, 0, 2)], ids=str)
def test_an_empty_grid_is_refused(grid):
    with pytest.raises(ValueError, match=r"is empty$"):
        ScanPath.parse("snake").check_fits(grid)


@pytest.mark.parametrize(("text", "grid"), [("window4", (3, 5)), ("window2x3", (2, 2)), ("window1x1x3", (2, 2, 2))])
def test_windows_larger_than_the_grid_are_refused(text, grid):
    with pytest.raises(ValueError, match=f'the windows of "{text}" are larger than the grid of {grid[0]}×{grid[1]}'):
        ScanPath.parse(text).check_fits(grid)
    ScanPath.parse(text).check_fits(tuple(5 for _ in grid))
