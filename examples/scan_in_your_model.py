"""The selective scan as a layer of your own: it learns to remember the one symbol that a mark precedes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimamba

SYMBOLS, MARK, LENGTH = 8, 8, 64  # the mark is the symbol after the last


class Remember(nn.Module):
    """Symbols (batch, length) to the logits of the marked one, read from the last step."""

    def __init__(self, dim: int = 32, state: int = 8):
        super().__init__()
        self.state = state
        self.embed = nn.Embedding(SYMBOLS + 1, dim)
        self.conv_weight = nn.Parameter(0.3 * torch.randn(dim, 3))  # sees the mark one step before
        self.choose = nn.Linear(dim, dim + 2 * state)  # what makes the scan selective: delta, B and C of each step
        self.A_log = nn.Parameter(torch.arange(1, state + 1).log().repeat(dim, 1))
        self.head = nn.Linear(dim, SYMBOLS)

    def forward(self, symbols_BL: Tensor) -> Tensor:
        u_BDL = vimamba.causal_conv1d(self.embed(symbols_BL).transpose(1, 2), self.conv_weight, activation="silu")
        sizes = [u_BDL.shape[1], self.state, self.state]
        delta, B, C = (t.transpose(1, 2) for t in self.choose(u_BDL.transpose(1, 2)).split(sizes, dim=-1))
        y_BDL = vimamba.selective_scan(u_BDL, delta - 3, -self.A_log.exp(), B, C, delta_softplus=True)
        return self.head(y_BDL[:, :, -1])


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Random symbols with a mark somewhere, and the symbol behind each mark."""
    symbols, place = torch.randint(SYMBOLS, (count, LENGTH)), torch.randint(LENGTH - 1, (count, 1))
    return symbols.scatter(1, place, MARK), symbols.gather(1, place + 1)[:, 0]


def main() -> None:
    torch.manual_seed(0)
    model = Remember()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(151):
        symbols, wanted = draw(64)
        loss = F.cross_entropy(model(symbols), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    symbols, wanted = draw(1000)
    print(f"remembered: {100 * (model(symbols).argmax(1) == wanted).float().mean().item():.1f} %")


if __name__ == "__main__":
    main()
