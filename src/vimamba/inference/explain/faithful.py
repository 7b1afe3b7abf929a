"""Whether a map is more than pretty: what becomes of an answer when what it marks is taken away, or alone is shown."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 20  # parts in which the image goes
AT_ONCE = 8  # images in a forward pass


class Curves(NamedTuple):
    """The probability of a class over the share of the image that is taken away or shown, 0 to 1: (steps + 1,)."""

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> float:
        """Low where the map is right."""
        return float(torch.trapezoid(self.deletion) / (len(self.deletion) - 1))

    @property
    def insertion_area(self) -> float:
        """High where the map is right."""
        return float(torch.trapezoid(self.insertion) / (len(self.insertion) - 1))


@torch.no_grad()
def curves(model: nn.Module, image_CHW: Tensor, map_hw: Tensor, target: int, blank: Tensor | None = None) -> Curves:
    """Deletion and insertion (arXiv 1806.07421) of one image, in parts of a twentieth, the largest of a map first.

    Args:
        model: a classifier: images to logits.
        image_CHW: preprocessed.
        map_hw: what is to be judged, of any size.
        target: the class.
        blank: what is there instead, (channels, height, width); the image's mean if not given.
    """
    blank = image_CHW.mean((1, 2), keepdim=True).expand_as(image_CHW) if blank is None else blank
    map_HW = F.interpolate(map_hw[None, None].float(), image_CHW.shape[1:], mode="nearest")[0, 0]
    order = map_HW.flatten().argsort(descending=True, stable=True)
    rank_HW = order.argsort().view_as(map_HW)
    cuts = torch.linspace(0, len(order), STEPS + 1, device=rank_HW.device).round()
    first_SHW = rank_HW < cuts[:, None, None]
    without = torch.where(first_SHW[:, None], blank, image_CHW)
    alone = torch.where(first_SHW[:, None], image_CHW, blank)
    found = [model(part).softmax(-1)[:, target] for part in torch.cat([without, alone]).split(AT_ONCE)]
    deletion, insertion = torch.cat(found).cpu().chunk(2)
    return Curves(deletion, insertion)


def random_map(map_hw: Tensor, seed: int = 0) -> Tensor:
    """A map of the same size that knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(map_hw.shape, generator=generator)
