"""Mamba's recurrence along the directions of `DirectionalMixer`, with the official names and the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.layers import memory
from vimamba.layers.grid import Layout, ScanPath, insert_tokens, shape_text, split_tokens
from vimamba.layers.intact import intact, own_methods, weight_of
from vimamba.layers.mixers.directional import DirectionalMixer, Scan, needed
from vimamba.layers.options import check_choice, check_number, check_whole
from vimamba.layers.products import in_quick_type, project
from vimamba.layers.quantized import QuantizedLinear
from vimamba.ops import BlockWeights, Direction, causal_conv1d, linear, mixer, selective_scan
from vimamba.ops.arguments import widen

for _leaf in ("_image_grid", "insert_tokens", "mixer", "split_tokens"):
    torch.fx.wrap(_leaf)  # a symbolic trace calls these as they are

CONVS = ("1d", "2d")


class Names(NamedTuple):
    """The official names of a direction's modules and weights."""

    conv1d: str
    x_proj: str
    dt_proj: str
    D: str
    A_log: str


def _names(scan: Scan) -> Names:
    end = scan.projections
    return Names(f"conv1d{end}", f"x_proj{end}", f"dt_proj{end}", f"D{end}", f"A{scan.weights}_log")


class BidirectionalMixer(DirectionalMixer):
    """Mix tokens along the sequence forwards and backwards (arXiv 2401.09417, section 3.3, algorithm 1).

    Takes tokens (batch, length, dim) and gives the same: `mixer(x)`; paths other than "row" and conv="2d" also need to
    know where the tokens stand: `mixer(x, layout=Layout((rows, columns)))`, see `DirectionalMixer.forward`.

    Args:
        dim: token channels.
        d_state: state size of each channel.
        d_conv: width of the causal convolution.
        expand: inner channels per token channel.
        dt_rank: rank of the step-size projection; "auto" is ceil(dim / 16).
        mode: "none" is one direction; "ssm" scans back with its own A over the same convolution and projections
            (the official v1); "ssm_conv" has everything of its own for each direction (v2, the published models).
        merge: "mean" or "sum" of the directions, or "gate": their mean, each weighed by a learned gate.
        paths: the orders in which the grid is read: "row", "column", "snake", "window4" ..., see
            `layers.grid.ScanPath`; each in the directions that `mode` says, or in one ("column:backward").
        path_weights: "own" weights for each path, or those of the first "shared" by all.
        gate: "image" or "token": what a gate is computed for.
        conv: "1d", the causal convolution of each direction, or "2d": one of 3×3 on the grid in front of all of them;
            tokens that are not patches pass it by.
        pooled_token: put the mean of the tokens in front of those a single direction reads (arXiv 2410.07599).
        dt_min, dt_max: range of the initial step sizes.
        dt_init: "random" or "constant" initial weights of the step-size projection.
        dt_scale, dt_init_floor: scale of those weights, and lower bound of the initial step sizes.
        conv_bias: bias of the convolution.
        bias: bias of the input and output projections.
        layer_scale: initial value of a learned factor on each output channel, or None for no such factor.
        recompute: when the backward pass computes the norm and the input projection again instead of keeping them:
            "long" (from 2048 tokens on), "always" or "never".
        device, dtype: of the weights.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        mode: str = "ssm_conv",
        merge: str = "mean",
        paths: Sequence[str | ScanPath] = ("row",),
        path_weights: str = "own",
        gate: str = "image",
        conv: str = "1d",
        pooled_token: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_scale: float | None = None,
        recompute: str = "long",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, None, mode, merge, paths, path_weights, gate, pooled_token, layer_scale, recompute)
        check_choice("conv", conv, CONVS)
        check_choice("dt_init", dt_init, ("random", "constant"))
        for name, size in (("d_state", d_state), ("d_conv", d_conv)):
            check_whole(name, size)
        for name, number in (("expand", expand), ("dt_min", dt_min), ("dt_max", dt_max), ("dt_scale", dt_scale)):
            check_number(name, number, above=True)
        check_number("dt_init_floor", dt_init_floor)
        if dt_max < dt_min:
            raise ValueError(f"dt_max must not be below dt_min={dt_min}, got {dt_max}")
        inner = int(expand * dim)
        if inner < 1:
            raise ValueError(f"expand={expand} leaves no inner channel of dim={dim}")
        if dt_rank != "auto":
            check_whole("dt_rank", dt_rank)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else int(dt_rank)
        self.step_sizes: dict[str, Any] = dict(
            low=dt_min, high=dt_max, init=dt_init, scale=dt_scale, floor=dt_init_floor
        )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        self.names = {scan.weights: _names(scan) for scan in self.scans}
        for names in {names.D: names for names in self.names.values()}.values():
            if conv == "1d":
                causal = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **dd)
                setattr(self, names.conv1d, causal)
            dt_proj = nn.Linear(rank, inner, **dd)
            _init_step_sizes(dt_proj, **self.step_sizes)
            setattr(self, names.x_proj, nn.Linear(inner, rank + 2 * d_state, bias=False, **dd))
            setattr(self, names.dt_proj, dt_proj)
            setattr(self, names.D, nn.Parameter(torch.empty(inner, **dd)))
        for names in self.names.values():
            setattr(self, names.A_log, nn.Parameter(torch.empty(inner, d_state, **dd)))
        two = conv == "2d"
        self.conv2d = nn.Conv2d(inner, inner, 3, groups=inner, padding=1, bias=conv_bias, **dd) if two else None
        self._add_merge(dim, gate, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self._reset_decays()

    @torch.no_grad()
    def _reset_decays(self) -> None:
        """A = -(1, 2, ..., state) for every channel (S4D-real, arXiv 2206.11893), D = 1."""
        for names in self.names.values():
            A_log = getattr(self, names.A_log)
            steps = torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32, device=A_log.device)
            A_log.copy_(steps.log().expand_as(A_log))
            nn.init.ones_(getattr(self, names.D))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values again of A, D, the step sizes and the factor; the other modules reset themselves."""
        super().reset_parameters()
        self._reset_decays()
        for dt_proj in dict.fromkeys(names.dt_proj for names in self.names.values()):
            _init_step_sizes(getattr(self, dt_proj), **self.step_sizes)

    @property
    def first_weight(self) -> Any:
        """The weight of the input projection; its scales, if that is of 8-bit integers."""
        return getattr(self.in_proj, "scales", self.in_proj.weight)

    def joined(self, norm: Tensor) -> BlockWeights | None:
        """The weights with which `ops.blocks` computes the mixer behind a norm; None where it is no plain one."""
        plain = self.conv2d is None and self.gate is None and self.gamma is None and not self.pooled_token
        along_rows = len(self.paths) == 1 and self.paths[0].along_rows
        if not (plain and along_rows and intact(self, BidirectionalMixer) and own_methods(self)):
            return None
        in_proj: Any = self._modules["in_proj"]
        out_proj: Any = self._modules["out_proj"]
        kind = type(in_proj)
        if kind not in (nn.Linear, QuantizedLinear) or not (intact(in_proj, kind) and intact(out_proj, kind)):
            return None
        directions = self.fused_directions(self.scans, False)
        if directions is None:
            return None
        into = weight_of(in_proj, "weight"), weight_of(in_proj, "bias")
        out_of = weight_of(out_proj, "weight"), weight_of(out_proj, "bias")
        weights = BlockWeights(norm, *into, *out_of, directions)
        if kind is nn.Linear:
            return weights
        return weights._replace(in_scales=in_proj.scales, out_scales=out_proj.scales)

    def no_weight_decay(self) -> set[str]:
        """Parameters that keep their scale: A and D of every direction, and the biases that set the time scale."""
        kept = {name for names in self.names.values() for name in (names.A_log, names.D)}
        return super().no_weight_decay() | kept & dict(self.named_parameters()).keys()

    def directions(self, reverse: bool = False) -> list[Direction]:
        """The weights of each direction, and which way round it runs; `reverse` turns all of them."""
        return [self._direction(scan, reverse) for scan in self.scans]

    def _direction(self, scan: Scan, reverse: bool) -> Direction:
        modules: dict[str, Any] = self._modules  # an attribute that is a module takes ten times as long
        names = self.names[scan.weights]
        D = weight_of(self, names.D)
        x_proj, dt_proj = modules[names.x_proj], modules[names.dt_proj]
        if self.conv2d is not None:  # its output only has its SiLU to come: a convolution of width 1
            taps, bias = D.new_ones(D.shape[0], 1), D.new_zeros(D.shape[0])
        else:
            conv = modules[names.conv1d]
            taps = weight_of(conv, "weight")
            bias = weight_of(conv, "bias")
            bias = taps.new_zeros(taps.shape[0]) if bias is None else bias
        return Direction(
            conv_weight=taps,
            conv_bias=bias,
            x_proj_weight=weight_of(x_proj, "weight"),
            dt_proj_weight=weight_of(dt_proj, "weight"),
            dt_bias=weight_of(dt_proj, "bias"),
            A_log=weight_of(self, names.A_log),
            D=D,
            conv_reverse=_conv_reverse(scan, reverse),
            scan_reverse=scan.reverse != reverse,
        )

    def around(
        self, directions: Callable[[Tensor], Tensor], x: Tensor, layout: Layout | None, compute: Any = None
    ) -> Tensor:
        """Input and output projection, and the 2-D convolution; xz is computed again where `recompute` says so."""
        xz = project(self.in_proj, x)
        if self.conv2d is not None:
            xz = self._convolve_grid(xz, needed(layout, 'conv="2d"'))
        keeping: AbstractContextManager = nullcontext()
        if memory.recomputes(x, self.recompute) and self.conv2d is None and intact(self.in_proj, nn.Linear):
            keeping = memory.recomputed(xz, self._projection(x, compute, xz.dtype))
        with keeping:
            y = directions(xz)
        return project(self.out_proj, y)

    def _projection(self, x: Tensor, compute: Callable[[], Tensor] | None, dtype: torch.dtype) -> Any:
        """Computes in_proj again, under autocast if that gave it a type that is not its weight's."""
        kept = x.detach() if compute is None else None
        lower = self.in_proj.weight.dtype != dtype

        def again() -> Tensor:
            source = compute() if kept is None else kept  # type: ignore[misc]
            with torch.autocast(source.device.type, dtype if lower else None, enabled=lower):
                return linear(source.to(dtype), self.in_proj.weight, self.in_proj.bias)

        return again

    def _convolve_grid(self, xz_BLE: Tensor, layout: Layout) -> Tensor:
        """The 2-D convolution of the patches' input half; the gate z and the other tokens stay."""
        assert self.conv2d is not None
        x_BLD, z_BLD = xz_BLE.chunk(2, dim=-1)
        patches, others = split_tokens(x_BLD, layout.extras)
        patches_BDHW = patches.transpose(1, 2).unflatten(2, _image_grid(layout))
        patches = in_quick_type(self.conv2d, patches_BDHW).flatten(2).transpose(1, 2)
        return torch.cat([insert_tokens(patches, others, layout.extras), z_BLD], dim=-1)

    def along_path(
        self, u: Tensor, scans: Sequence[Scan], reverse: bool, scale: float, weights: Tensor | None
    ) -> Tensor:
        """All directions of a path in one call, unless a module was replaced or is hooked."""
        directions = self.fused_directions(scans, reverse)
        if directions is not None:
            return mixer(u, directions, scale, weights, skip=self.skips)
        return super().along_path(u, scans, reverse, scale, weights)

    def fused_directions(self, scans: Sequence[Scan], reverse: bool) -> list[Direction] | None:
        """The weights of directions, as the fused kernels take them; None where a module was replaced or is hooked."""
        if all(self._fusible(scan) for scan in scans):
            return [self._direction(scan, reverse) for scan in scans]
        return None

    def _fusible(self, scan: Scan) -> bool:
        modules: dict[str, Any] = self._modules
        names = self.names[scan.weights]
        return (
            intact(modules[names.x_proj], nn.Linear)
            and intact(modules[names.dt_proj], nn.Linear)
            and (self.conv2d is not None or intact(modules[names.conv1d], nn.Conv1d))
        )

    def one_direction(self, u: Tensor, scan: Scan, reverse: bool) -> Tensor:
        """One direction with its modules called: whatever stands in their place, or around the call, takes part."""
        x_BDL, z_BDL = u.transpose(1, 2).chunk(2, dim=1)
        c_BDL = self.convolved(x_BDL, scan, reverse)
        delta_BLD, B_BLN, C_BLN = self.choices(c_BDL, scan)
        y = selective_scan(
            c_BDL, delta_BLD.transpose(1, 2).to(c_BDL.dtype), self.decay_rates(scan),
            B_BLN.transpose(1, 2).to(c_BDL.dtype), C_BLN.transpose(1, 2).to(c_BDL.dtype),
            getattr(self, self.names[scan.weights].D), z_BDL.to(c_BDL.dtype), delta_softplus=True,
            reverse=scan.reverse != reverse,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)

    def convolved(self, x_BDL: Tensor, scan: Scan, reverse: bool, silu: bool = True) -> Tensor:
        """A direction's causal convolution, or nothing if one on the grid stood in front; with its SiLU or without."""
        if self.conv2d is not None:
            return F.silu(x_BDL) if silu else x_BDL
        conv: Any = self._modules[self.names[scan.weights].conv1d]
        return _convolve(x_BDL, conv, _conv_reverse(scan, reverse), silu)

    def choices(self, c_BDL: Tensor, scan: Scan) -> tuple[Tensor, Tensor, Tensor]:
        """A direction's delta before its softplus, (batch, length, dim), and its B and C, (batch, length, state)."""
        modules: dict[str, Any] = self._modules
        names = self.names[scan.weights]
        state = getattr(self, names.A_log).shape[1]
        x_dbl_BLE = project(modules[names.x_proj], c_BDL.transpose(1, 2))
        dt_BLR, B_BLN, C_BLN = x_dbl_BLE.split([x_dbl_BLE.shape[-1] - 2 * state, state, state], dim=-1)
        return project(modules[names.dt_proj], dt_BLR), B_BLN, C_BLN  # the bias of delta included

    def decay_rates(self, scan: Scan) -> Tensor:
        """A direction's A (dim, state), in float32 or float64."""
        return -widen(getattr(self, self.names[scan.weights].A_log)).exp()


def _image_grid(layout: Layout) -> tuple[int, ...]:
    if len(layout.grid) != 2:
        raise ValueError(f'conv="2d" needs a grid of rows and columns, got {shape_text(layout.grid)}')
    return layout.grid


def _conv_reverse(scan: Scan, reverse: bool) -> bool:
    """Which way round the convolution runs: as the scan, but forwards where a scan back shares it."""
    return (scan.reverse and scan.weights == scan.projections) != reverse


def _convolve(x_BDL: Tensor, conv: nn.Module, reverse: bool, silu: bool) -> Tensor:
    if isinstance(conv, nn.Conv1d) and intact(conv, nn.Conv1d):
        activation = "silu" if silu else None
        return causal_conv1d(x_BDL, conv.weight.flatten(1), conv.bias, activation=activation, reverse=reverse)
    length = x_BDL.shape[-1]
    c_BDL = conv(x_BDL.flip(-1) if reverse else x_BDL)[..., :length]  # padded at both ends
    c_BDL = c_BDL.flip(-1) if reverse else c_BDL
    return F.silu(c_BDL) if silu else c_BDL


@torch.no_grad()
def _init_step_sizes(dt_proj: nn.Linear, low: float, high: float, init: str, scale: float, floor: float) -> None:
    """Weights that keep the variance, and a bias whose softplus is log-uniform in [low, high], from `floor` up."""
    bound = dt_proj.in_features**-0.5 * scale
    if init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    else:
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    random = torch.rand(dt_proj.out_features, dtype=torch.float32, device=dt_proj.bias.device)
    dt = torch.exp(random * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
