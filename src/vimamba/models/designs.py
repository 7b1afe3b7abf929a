"""The design of each layer of a model: its mode, its paths, and the layers that run as a pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vimamba.errors import nearest
from vimamba.layers.grid import ScanPath, parse_paths
from vimamba.layers.mixers.directional import MODES, scans_of

RULE = re.compile(r"(?:(ssm|ssm_conv) )?(every|first|last) (\d+)(?:st|nd|rd|th)?(?: layers?)?")


@dataclass(frozen=True)
class LayerDesign:
    """One layer's arguments of `DirectionalMixer`."""

    mode: str
    paths: tuple[ScanPath, ...] = (ScanPath(),)
    path_weights: str = "own"
    merge: str = "mean"
    pooled_token: bool = False

    @property
    def directions(self) -> int:
        """How many directions the layer has."""
        return len(scans_of(self.paths, self.mode, self.path_weights))

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


def layer_steps(modes: Sequence[str], layer_pairs: bool = False) -> list[tuple[int, ...]]:
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


def layer_designs(
    modes: Sequence[str],
    grid: tuple[int, ...],
    paths: Sequence[Any] = ("row",),
    path_weights: str = "own",
    merge: str = "mean",
    alternate: bool = False,
    pooled_token: bool = False,
) -> list[LayerDesign]:
    """The design of each layer, from the options of all of them.

    Raises:
        ValueError: the arguments cannot go together; the message names one of them.
    """
    depth = len(modes)
    if isinstance(paths, str) or not paths or isinstance(paths[0], (str, ScanPath)):
        of_layers = [parse_paths(paths)] * depth
    else:
        if len(paths) != depth:
            raise ValueError(f"paths has {len(paths)} entries for depth={depth}; give one list, or one a layer")
        of_layers = [parse_paths(layer) for layer in paths]
    for path in {path for layer in of_layers for path in layer}:
        path.check_fits(grid)
    designs = [
        LayerDesign("none" if mode == "layer" else mode, of_layer, path_weights)
        for mode, of_layer in zip(modes, of_layers, strict=True)
    ]
    if path_weights == "shared" and all(len(design.paths) == 1 for design in designs):
        raise ValueError('path_weights="shared" needs more than one path in a layer, but paths has one')
    if merge == "gate" and all(design.directions == 1 for design in designs):
        raise ValueError('merge="gate" needs a layer with two directions or more, but bidirectional and paths make one')
    if alternate:
        designs = _alternated(designs, modes)
    if pooled_token and not any(design.single for design in designs):
        raise ValueError("pooled_token stands in layers of one direction along the rows, but no layer is one")
    return [
        replace(
            design,
            merge="mean" if merge == "gate" and design.directions == 1 else merge,
            pooled_token=pooled_token and design.single,
        )
        for design in designs
    ]


def _alternated(designs: Sequence[LayerDesign], modes: Sequence[str]) -> list[LayerDesign]:
    if "layer" in modes:
        raise ValueError('alternate and bidirectional="layer" both turn layers round: choose one')
    if not any(design.single for design in designs):
        raise ValueError("alternate turns layers of one direction along the rows, but no layer is one")
    reverse, alternated = False, []
    for design in designs:
        if design.single:
            design = replace(design, paths=(ScanPath(reverse=reverse),))
            reverse = not reverse
        alternated.append(design)
    return alternated
