"""Draw the figures of the documentation from the code that they show: python docs/drawings.py writes drawings/*.svg.

Orders come from `layers.grid`, sizes from a mixer's own weights, and what a direction sees from a mixer's gradients.
Colours follow the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.metadata import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vimamba import BidirectionalMixer
from vimamba.data.mnist import load_mnist
from vimamba.layers.grid import Layout, ScanPath, route, token_layout

FOLDER = Path(__file__).parent / "drawings"
CLASSES = {  # of shapes and texts: light, dark
    ".ink": ("fill:#1f2937", "fill:#e5e7eb"),
    ".faint": ("fill:#6b7280", "fill:#9ca3af"),
    ".line": ("stroke:#6b7280", "stroke:#9ca3af"),
    ".tip": ("fill:#6b7280", "fill:#9ca3af"),
    ".cell": ("fill:#eef1f5;stroke:#cbd2dc", "fill:#2a2f3a;stroke:#434b59"),
    ".box": ("fill:#f6f7f9;stroke:#9aa4b2", "fill:#242936;stroke:#5b6676"),
    ".forward": ("fill:#dbe8fd;stroke:#2563eb", "fill:#1d3461;stroke:#6aa1ff"),
    ".backward": ("fill:#fde9d0;stroke:#d97706", "fill:#523410;stroke:#f5a742"),
    ".both": ("fill:#e6defc;stroke:#7c3aed", "fill:#3a2a66;stroke:#a98bfa"),
    ".class": ("fill:#d5f2e3;stroke:#059669", "fill:#123f31;stroke:#3ecf9b"),
    ".forward-line": ("stroke:#2563eb", "stroke:#6aa1ff"),
    ".backward-line": ("stroke:#d97706", "stroke:#f5a742"),
    ".forward-tip": ("fill:#2563eb", "fill:#6aa1ff"),
    ".backward-tip": ("fill:#d97706", "fill:#f5a742"),
}


def style() -> str:
    """The colours of both schemes."""
    light, dark = ("".join(f"{name}{{{look[i]}}}" for name, look in CLASSES.items()) for i in (0, 1))
    text = "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;text-anchor:middle}"
    small = ".small{font-size:11px}.start{text-anchor:start}.end{text-anchor:end}.strong{font-weight:600}"
    return f"<style>{text}{small}{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"


class Drawing:
    """Shapes on a plane of width × height, in the order they are drawn."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, *lines: str, radius: float = 5) -> None:
        """A rectangle with lines of text in its middle; those behind the first are small."""
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
        )
        for i, line in enumerate(lines):
            place = y + height / 2 + 4.5 + 16 * (i - (len(lines) - 1) / 2)
            self.text(x + width / 2, place, line, "ink" if i == 0 else "faint small")

    def text(self, x: float, y: float, line: str, kind: str = "ink") -> None:
        """A line of text around x, or from it on where the kind says "start"."""
        self.shapes.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(line)}</text>')

    def arrow(self, *points: tuple[float, float], kind: str = "", width: float = 1.5, tip: float = 4.5) -> None:
        """A line through the points with a tip at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        length = float(np.hypot(x1 - x0, y1 - y0))
        along_x, along_y = (x1 - x0) / length, (y1 - y0) / length
        base_x, base_y = x1 - 1.8 * tip * along_x, y1 - 1.8 * tip * along_y
        path = " ".join(f"{x:g},{y:g}" for x, y in (*points[:-1], (round(base_x, 2), round(base_y, 2))))
        self.shapes.append(f'<polyline class="{kind}line" fill="none" stroke-width="{width:g}" points="{path}"/>')
        corners = ((x1, y1), *((base_x + s * tip * along_y, base_y - s * tip * along_x) for s in (1, -1)))
        ends = " ".join(f"{x:.2f},{y:.2f}" for x, y in corners)
        self.shapes.append(f'<polygon class="{kind}tip" points="{ends}"/>')

    def image(self, x: float, y: float, side: float, pixels: np.ndarray) -> None:
        """Grey pixels as they are, each a square."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        self.shapes.append(
            f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{data}"/>'
        )

    def svg(self) -> str:
        """The file."""
        size = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", style(), *self.shapes, "</svg>\n"])


def overview() -> Drawing:
    """From an image to its class: patches in a row, the class token among them, read both ways in every block."""
    side, patch, cell = 28, 7, 30
    grid = (side // patch, side // patch)
    layout = token_layout("middle", grid)
    held_out = load_mnist()[1]
    shown = next(i for i in range(len(held_out)) if held_out.target(i) == 5)
    pixels = np.asarray(held_out.image(shown).convert("L"))
    drawing = Drawing(540, 368, "An image is cut into patches, which are read forwards and backwards")
    for number in range(layout.patches):
        row, column = divmod(number, grid[1])
        drawing.image(14 + (cell + 2) * column, 14 + (cell + 2) * row, cell, patch_of(pixels, row, column, patch))
    drawing.text(162, 70, "an image, cut into patches", "ink start")
    drawing.text(162, 90, "laid in a row, with a class token in their middle", "faint start")
    drawing.arrow((77, 148), (77, 172))
    left, top, numbers = 14, 206, iter(range(layout.patches))
    right = left + cell * (layout.patches + len(layout.classes)) - 3
    for place in range(layout.patches + len(layout.classes)):
        x = left + cell * place
        if place in layout.classes:
            drawing.box(x, top, cell - 3, cell - 3, "class", "?", radius=3)
            drawing.arrow((x + 13.5, top + 56), (x + 13.5, top + 90))
            drawing.box(x - 61.5, top + 92, 150, 34, "class", "head: “five”")
        else:
            drawing.image(x, top, cell - 3, patch_of(pixels, *divmod(next(numbers), grid[1]), patch))
    drawing.arrow((left, top - 14), (right, top - 14), kind="forward-", width=2.5)
    drawing.text(right, top - 24, "forward scan, in each of 24 blocks", "ink end")
    drawing.arrow((right, top + 41), (left, top + 41), kind="backward-", width=2.5)
    drawing.text(left, top + 64, "backward scan, in each of 24 blocks", "ink start")
    drawing.text((left + right) / 2, 354, "the class token has seen the whole image", "faint")
    return drawing


def patch_of(pixels: np.ndarray, row: int, column: int, size: int) -> np.ndarray:
    """One patch of an image."""
    return np.ascontiguousarray(pixels[row * size : (row + 1) * size, column * size : (column + 1) * size])


def block() -> Drawing:
    """One block of Vim-Ti, with the sizes that its weights have."""
    mixer = BidirectionalMixer(192)
    inner, dim = mixer.out_proj.in_features, mixer.out_proj.out_features
    state, rank, taps = mixer.A_log.shape[1], mixer.dt_proj.in_features, mixer.conv1d.kernel_size[0]
    drawing = Drawing(560, 742, "One block of Vision Mamba as data flow through it")
    middle, stream = 300, 40
    drawing.text(stream + 62, 18, "residual stream, float32", "faint")
    drawing.arrow((stream, 26), (stream, 700))
    drawing.arrow((stream, 44), (middle, 44), (middle, 60))
    drawing.box(middle - 80, 62, 160, 30, "box", "norm")
    drawing.arrow((middle, 92), (middle, 112))
    drawing.box(middle - 80, 114, 160, 44, "box", "in_proj", f"{dim} → 2 × {inner}")
    for x, kind, name, ending, what in (
        (middle - 122, "forward", "forward: first patch to last", "", "before"),
        (middle + 122, "backward", "backward: last patch to first", "_b", "behind"),
    ):
        drawing.arrow((middle, 158), (middle, 176), (x, 176), (x, 206), kind=f"{kind}-")
        drawing.text(x, 222, name, "ink strong")
        drawing.box(x - 95, 232, 190, 44, kind, f"conv1d{ending}, SiLU", f"each token and {taps - 1} {what}")
        drawing.arrow((x, 276), (x, 298), kind=f"{kind}-")
        drawing.box(x - 95, 300, 190, 44, kind, f"x_proj{ending}", f"{inner} → {rank} + {state} + {state}: dt, B, C")
        drawing.arrow((x, 344), (x, 366), kind=f"{kind}-")
        drawing.box(x - 95, 368, 190, 44, kind, f"dt_proj{ending}, softplus", f"{rank} → {inner}: step sizes Δ")
        drawing.arrow((x, 412), (x, 434), kind=f"{kind}-")
        drawing.box(
            x - 95, 436, 190, 62, kind, "selective scan", "h = exp(Δ A) h + Δ B x", f"y = C h + D x, {state} states"
        )
        drawing.arrow((x, 498), (x, 520), kind=f"{kind}-")
        drawing.box(x - 95, 522, 190, 30, kind, "y × SiLU(z)")
        drawing.arrow(
            (x, 552), (x, 576), (middle + (x - middle) / 4, 576), (middle + (x - middle) / 4, 592), kind=f"{kind}-"
        )
    drawing.text(middle, 190, "x and z", "faint small")
    drawing.box(middle - 80, 594, 160, 30, "both", "mean of both")
    drawing.arrow((middle, 624), (middle, 642))
    drawing.box(middle - 80, 644, 160, 44, "box", "out_proj", f"{inner} → {dim}")
    drawing.arrow((middle, 688), (middle, 712), (stream + 14, 712))
    drawing.box(stream - 12, 700, 24, 24, "box", "+", radius=12)
    drawing.text(middle, 735, "added to the stream, which the next block reads", "faint small")
    return drawing


def paths() -> Drawing:
    """The orders of `ScanPath`, on a grid with the class token left out."""
    grid, cell = (4, 6), 26
    names = ("row", "column", "snake", "window2")
    drawing = Drawing(392, 310, "The order in which each path reads the patches of an image")
    for i, name in enumerate(names):
        left, top = 16 + 204 * (i % 2), 26 + 152 * (i // 2)
        drawing.text(left + grid[1] * cell / 2, top - 8, f'"{name}"', "ink strong")
        for row in range(grid[0]):
            for column in range(grid[1]):
                drawing.box(left + column * cell, top + row * cell, cell, cell, "cell", radius=0)
        order = route(ScanPath.parse(name), Layout(grid), torch.empty(1, grid[0] * grid[1], 1)).order.tolist()
        centres = [(left + (at % grid[1] + 0.5) * cell, top + (at // grid[1] + 0.5) * cell) for at in order]
        drawing.arrow(*centres, kind="forward-", width=2)
        x, y = centres[0]
        drawing.shapes.append(f'<circle class="forward-tip" cx="{x:g}" cy="{y:g}" r="4"/>')
    return drawing


def directions() -> Drawing:
    """Which patches each direction of a mixer takes up into one patch: where its gradients are not zero."""
    grid, cell, at = (5, 7), 22, 17
    drawing = Drawing(560, 178, "What the forward and the backward direction see from one patch")
    seen = {"forward": sees(grid, at, reverse=False), "backward": sees(grid, at, reverse=True)}
    seen["both"] = seen["forward"] | seen["backward"]
    for i, (name, patches) in enumerate(seen.items()):
        left, top = 14 + 189 * i, 30
        drawing.text(
            left + grid[1] * cell / 2, top - 10, f"{name}: {len(patches)} of {grid[0] * grid[1]}", "ink strong"
        )
        for patch in range(grid[0] * grid[1]):
            kind = "class" if patch == at else name if patch in patches else "cell"
            row, column = divmod(patch, grid[1])
            drawing.box(left + column * cell, top + row * cell, cell - 3, cell - 3, kind, radius=2)
    drawing.text(280, 168, "what the green patch can know after one block that reads along the rows", "faint")
    return drawing


def sees(grid: tuple[int, int], at: int, reverse: bool) -> set[int]:
    """The tokens on which a mixer's output at one of them depends."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = BidirectionalMixer(16, mode="none")
        x_BLD = torch.randn(1, grid[0] * grid[1], 16, requires_grad=True)
        mixer(x_BLD, reverse=reverse)[0, at].sum().backward()
    assert x_BLD.grad is not None
    return set(x_BLD.grad[0].abs().sum(-1).nonzero().flatten().tolist())


def class_tokens() -> Drawing:
    """Where the class token stands for each `class_token`, and registers."""
    grid, cell = (3, 4), 26
    choices = {
        '"middle"': ("middle", 0),
        '"head"': ("head", 0),
        '"double"': ("double", 0),
        "num_registers=2": ("middle", 2),
    }
    drawing = Drawing(520, 34 * len(choices) + 12, "Where class and register tokens stand in the sequence")
    for i, (name, (class_token, registers)) in enumerate(choices.items()):
        top = 10 + 34 * i
        drawing.text(8, top + 18, name, "ink start")
        layout = token_layout(class_token, grid, registers)
        number = 0
        for place in range(layout.patches + len(layout.extras)):
            kind = "class" if place in layout.classes else "both" if place in layout.registers else "cell"
            letter = "c" if kind == "class" else "r" if kind == "both" else str(number := number + 1)
            drawing.box(132 + cell * place, top, cell - 3, cell - 2, kind, letter, radius=3)
    return drawing


def icon() -> Drawing:
    """The two directions, as small as a browser shows them."""
    drawing = Drawing(32, 32, "vimamba")
    drawing.arrow((3, 11), (29, 11), kind="forward-", width=5, tip=6)
    drawing.arrow((29, 22), (3, 22), kind="backward-", width=5, tip=6)
    return drawing


def badge(name: str, value: str) -> Drawing:
    """A fact in a line, as people look for it under a title."""
    left, right = (7 * len(text) + 14 for text in (name, value))
    drawing = Drawing(left + right, 22, f"{name} {value}")
    drawing.box(1, 1, left + right - 2, 20, "box", radius=4)
    drawing.text(left / 2 + 2, 15.5, name, "faint small")
    drawing.text(left + right / 2 - 4, 15.5, value, "ink small strong")
    return drawing


def badges() -> dict[str, Drawing]:
    """What the package's own description says."""
    package = metadata("vimamba")
    torch_needed = next(need for need in package.get_all("Requires-Dist") if need.startswith("torch>="))
    facts = {
        "python": ("Python", package["Requires-Python"]),
        "pytorch": ("PyTorch", torch_needed.removeprefix("torch")),
        "licence": ("licence", package["License-Expression"]),
    }
    return {f"badge-{name}": badge(*fact) for name, fact in facts.items()}


def drawings() -> dict[str, str]:
    """Every file's name and content."""
    figures = {draw.__name__: draw() for draw in (overview, block, paths, directions, class_tokens, icon)}
    return {f"{name}.svg": drawing.svg() for name, drawing in (figures | badges()).items()}


def main(folder: Path = FOLDER) -> None:
    """Write them."""
    folder.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
