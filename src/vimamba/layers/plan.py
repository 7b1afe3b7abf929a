"""What each layer of a model does: its mode, its paths, and the layers that run as a pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vimamba.errors import nearest
from vimamba.layers.mixer import MODES, ways_of
from vimamba.layers.paths import Path, check_windows, parse_paths

RULE = re.compile(r"(?:(ssm|ssm_conv) )?(every|first|last) (\d+)(?:st|nd|rd|th)?(?: layers?)?")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's arguments of `BidirectionalMixer`."""

    mode: str
    paths: tuple[Path, ...] = (Path(),)
    path_weights: str = "own"
    merge: str = "mean"
    pooled_token: bool = False

    @property
    def directions(self) -> int:
        """How many directions the layer has."""
        return len(ways_of(self.paths, self.mode, self.path_weights))

    @property
    def single(self) -> bool:
        """Whether it is one direction along the rows."""
        return self.directions == 1 and self.paths[0].along_rows


def layer_modes(bidirectional: str | Sequence[str], depth: int) -> list[str]:
    """The mode of each layer, from one mode, a list of them, or a rule: "every 2nd", "first 4", "ssm last 8".

    The layers a rule speaks of are "ssm_conv", or "ssm" if it says so; the others are "none".

    Raises:
        ValueError: a mode is unknown, the list has not one for each layer, or the rule fits no layer.
    """
    if not isinstance(bidirectional, str):
        modes = list(bidirectional)
        if len(modes) != depth:
            raise ValueError(f"bidirectional has {len(modes)} entries for depth={depth}; give one mode, or one a layer")
    elif rule := RULE.fullmatch(bidirectional):
        count = int(rule[3])
        if not 1 <= count <= depth:
            raise ValueError(f"bidirectional={bidirectional!r} needs a number from 1 to depth={depth}")
        both = {
            "every": lambda i: i % count == count - 1,
            "first": lambda i: i < count,
            "last": lambda i: i >= depth - count,
        }[rule[2]]
        modes = [(rule[1] or "ssm_conv") if both(i) else "none" for i in range(depth)]
    else:
        modes = [bidirectional] * depth
    for mode in modes:
        if mode not in (*MODES, "layer"):
            choices = ", ".join(repr(a) for a in (*MODES, "layer", "every 2nd", "last 8"))
            raise ValueError(
                f"bidirectional must be one of {choices}, or one mode a layer, got {mode!r}"
                f"{nearest(mode, (*MODES, 'layer'))}"
            )
    return modes


def schedule(modes: Sequence[str], layer_pairs: bool = False) -> list[tuple[int, ...]]:
    """The layers in the order they run, those of mode "layer" (or all, with `layer_pairs`) in pairs."""
    steps: list[tuple[int, ...]] = []
    i = 0
    while i < len(modes):
        paired = layer_pairs or modes[i] == "layer"
        if paired and (i + 1 == len(modes) or modes[i + 1] != modes[i]):
            raise ValueError(f'bidirectional: layer {i} is "layer" but has no second layer to pair with')
        steps.append((i, i + 1) if paired else (i,))
        i += len(steps[-1])
    return steps


def plan_layers(
    modes: Sequence[str],
    paths: Sequence[Any] = ("row",),
    path_weights: str = "own",
    merge: str = "mean",
    alternate: bool = False,
    pooled_token: bool = False,
    grid: tuple[int, int] | None = None,
) -> list[LayerPlan]:
    """What each layer does.

    Raises:
        ValueError: the arguments cannot go together; the message names one of them.
    """
    depth = len(modes)
    if isinstance(paths, str) or not paths or isinstance(paths[0], (str, Path)):
        of_layers = [parse_paths(paths)] * depth
    else:
        if len(paths) != depth:
            raise ValueError(f"paths has {len(paths)} entries for depth={depth}; give one list, or one a layer")
        of_layers = [parse_paths(layer) for layer in paths]
    plans = [
        LayerPlan("none" if mode == "layer" else mode, own, path_weights)
        for mode, own in zip(modes, of_layers, strict=True)
    ]
    if grid is not None:
        for plan in plans:
            check_windows(plan.paths, grid)
    if path_weights == "shared" and all(len(plan.paths) == 1 for plan in plans):
        raise ValueError('path_weights="shared" needs more than one path in a layer, but paths has one')
    if merge == "gate" and all(plan.directions == 1 for plan in plans):
        raise ValueError('merge="gate" needs a layer with two directions or more, but bidirectional and paths make one')
    if alternate:
        plans = _alternated(plans, modes)
    if pooled_token and not any(plan.single for plan in plans):
        raise ValueError("pooled_token stands in layers of one direction along the rows, but no layer is one")
    return [
        replace(
            plan,
            merge="mean" if merge == "gate" and plan.directions == 1 else merge,
            pooled_token=pooled_token and plan.single,
        )
        for plan in plans
    ]


def _alternated(plans: Sequence[LayerPlan], modes: Sequence[str]) -> list[LayerPlan]:
    if "layer" in modes:
        raise ValueError('alternate and bidirectional="layer" both turn layers round: choose one')
    if not any(plan.single for plan in plans):
        raise ValueError("alternate turns layers of one direction along the rows, but no layer is one")
    turned, alternated = False, []
    for plan in plans:
        if plan.single:
            plan = replace(plan, paths=(Path(sense="backward" if turned else "forward"),))
            turned = not turned
        alternated.append(plan)
    return alternated
