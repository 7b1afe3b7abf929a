"""Another recurrence in a Vision Mamba: a gated linear one of a few lines learns digits beside Mamba's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimamba
from vimamba.data.mnist import load_mnist


class Gated(nn.Module):
    """y_t = f_t y_(t-1) + (1 - f_t) x_t, where the token chooses what it forgets; reversed, of what comes after."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.forget = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x_BLD: Tensor, reverse: bool = False) -> Tensor:
        steps = list(zip(x_BLD.unbind(1), self.forget(x_BLD).sigmoid().unbind(1), strict=True))
        y, found = torch.zeros_like(x_BLD[:, 0]), []
        for x, f in reversed(steps) if reverse else steps:
            y = torch.lerp(x, y, f)  # f y + (1 - f) x
            found.append(y)
        return self.out(torch.stack(found[::-1] if reverse else found, 1))


def pictures(count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` digits to learn from and as many held out, with what they show."""
    return [
        (torch.from_numpy(half.images[:count]).float()[:, None] / 255, torch.from_numpy(half.targets[:count]).long())
        for half in load_mnist()
    ]


def main() -> None:
    (images, labels), (others, shown) = pictures(1000)
    for recurrence in ("mamba", Gated):
        torch.manual_seed(0)
        # The paths, directions, gates and class tokens are the model's; the recurrence knows none of them.
        size = dict(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=3)
        model = vimamba.VisionMamba(**size, recurrence=recurrence)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(6):
            for batch in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            right = (model.eval()(others).argmax(1) == shown).float().mean().item()
        print(f"{recurrence if isinstance(recurrence, str) else recurrence.__name__}: {100 * right:.1f} % held out")


if __name__ == "__main__":
    main()
