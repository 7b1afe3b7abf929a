"""What one mixer did with images: what the scan of each direction was given, and how much each direction gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimamba.layers.grid import Layout, Route, route
from vimamba.layers.mixers import DirectionalMixer
from vimamba.ops import selective_scan
from vimamba.ops.arguments import widen

SMALLEST = torch.finfo(torch.float32).tiny


def softplus(x: Tensor) -> Tensor:
    """torch.nn.functional.softplus, whose log1p takes twice as long on a CPU as all of this, to the last digits."""
    small = x.abs().neg_().exp_()
    one_and_small = small + 1
    lost = small.sub_(one_and_small - 1).div_(one_and_small)  # of its digits, beside the 1
    return one_and_small.log_().add_(lost).add_(x.clamp(min=0))


class Carried(NamedTuple):
    """What chooses in a scan, along its path: held constant, the scan is linear in what it carries."""

    delta_BDL: Tensor
    A_DN: Tensor
    B_BNL: Tensor
    C_BNL: Tensor
    reverse: bool

    def scan(self, u_BDL: Tensor) -> Tensor:
        """y_i = sum_j C_i (prod_{k=j+1..i} exp(delta_k A)) delta_j B_j u_j, without what passes by in D."""
        return selective_scan(  # type: ignore[return-value]
            u_BDL, self.delta_BDL, self.A_DN, self.B_BNL, self.C_BNL, reverse=self.reverse
        )

    def transposed(self, read_BDL: Tensor) -> Tensor:
        """What the sum over i of read_i y_i takes from each u_j: the vector-Jacobian product of `scan`.

        It is a scan the other way round, with B and C in each other's place and each decay a step later.
        """
        later_BDL = torch.ones_like(self.delta_BDL)  # what stands in no step's way
        if self.reverse:
            later_BDL[..., 1:] = self.delta_BDL[..., :-1]
        else:
            later_BDL[..., :-1] = self.delta_BDL[..., 1:]
        # By these the scan multiplies what it reads. In place, here and below: at this size new memory costs the most.
        read_BDL = read_BDL / later_BDL.clamp_(min=SMALLEST)
        row_BDL: Any = selective_scan(read_BDL, later_BDL, self.A_DN, self.C_BNL, self.B_BNL, reverse=not self.reverse)
        return row_BDL.mul_(self.delta_BDL)


@dataclass(eq=False)
class Layer:
    """What one mixer did with images.

    Args:
        mixer: the mixer.
        u: what its directions read, (batch, length, channels).
        weights_BLG: what each direction counts in the merge, (batch, length or 1, directions); None: all alike.
        reverse: whether all directions are turned round.
        layout: where its tokens stand.
    """

    mixer: DirectionalMixer
    u: Tensor
    weights_BLG: Tensor | None
    reverse: bool
    layout: Layout

    @property
    def pooled_at(self) -> int | None:
        """The place of the pooled token, which no other layer sees."""
        return (self.u.shape[1] - 1 if self.backward(0) else 0) if self.mixer.pooled_token else None

    def backward(self, index: int) -> bool:
        """Whether a direction reads its path from the end."""
        return self.mixer.scans[index].reverse != self.reverse

    @property
    def names(self) -> list[str]:
        """The path of each direction, and which way round."""
        return [
            f"{scan.path.name} {'backward' if self.backward(i) else 'forward'}"
            for i, scan in enumerate(self.mixer.scans)
        ]

    def route(self, index: int) -> Route | None:
        """The path of a direction; None if it is the order of the tokens."""
        path = self.mixer.scans[index].path
        return None if path.along_rows else route(path, self.layout, self.u)

    def along(self, values: Tensor, index: int) -> Tensor:
        """Values of the tokens, (batch, length or 1, ...), in the order in which a direction reads them."""
        found = self.route(index)
        return values if found is None or values.shape[1] == 1 else values[:, found.order]

    def back(self, values: Tensor, index: int) -> Tensor:
        """Values of a direction's steps, (batch, length, ...), in the order of the tokens."""
        found = self.route(index)
        return values if found is None else values[:, found.rank]

    def weight(self, index: int) -> Tensor | float:
        """What a direction counts in the merge, (batch, length or 1, 1)."""
        scale = self.mixer.merge_scale
        return scale if self.weights_BLG is None else scale * self.weights_BLG[..., index : index + 1]

    def read(self, index: int) -> Tensor:
        """What a direction of Mamba's reads, (batch, dim, length), along its path."""
        return self.along(self.u.chunk(2, dim=-1)[0], index).transpose(1, 2)

    def convolved(self, index: int, x_BDL: Tensor) -> Tensor:
        """What its convolution gives, in front of the SiLU."""
        mixer: Any = self.mixer
        return mixer.convolved(x_BDL, mixer.scans[index], self.reverse, silu=False)

    def carried(self, index: int, convolved_BDL: Tensor | None = None, within: slice = slice(None)) -> Carried:
        """What chooses in a direction's scan, in those steps of its path; its convolution's output may be given."""
        mixer: Any = self.mixer
        with torch.no_grad():
            convolved_BDL = self.convolved(index, self.read(index)) if convolved_BDL is None else convolved_BDL
            delta, B, C = mixer.choices(F.silu(convolved_BDL[:, :, within]), mixer.scans[index])
            delta_BDL, B_BNL, C_BNL = (t.transpose(1, 2) for t in (softplus(widen(delta)), widen(B), widen(C)))
            return Carried(delta_BDL, mixer.decay_rates(mixer.scans[index]), B_BNL, C_BNL, self.backward(index))

    def gates(self) -> Tensor | None:
        """The mean gate of each direction, (batch, directions), whose sum is 1; None if there are none."""
        return None if self.weights_BLG is None else self.weights_BLG.mean(1) / len(self.mixer.scans)

    @torch.no_grad()
    def shares(self) -> Tensor:
        """How much each direction adds to the tokens, (batch, directions): Euclidean norms as shares of their sum."""
        out_proj = getattr(self.mixer, "out_proj", nn.Identity())
        bias = out_proj(torch.zeros_like(self._of_one(0)[:1, :1]))
        norms = [(out_proj(self._of_one(i)) - bias).float().norm(dim=(1, 2)) for i in range(len(self.mixer.scans))]
        return F.normalize(torch.stack(norms, 1), p=1, dim=1)

    def _of_one(self, index: int) -> Tensor:
        """What one direction gives to the merge, (batch, length, dim)."""
        scans = [self.mixer.scans[index]]
        y_BLD = self.mixer.along_path(self.along(self.u, index), scans, self.reverse, 1.0, None)
        return self.back(y_BLD, index) * self.weight(index)
