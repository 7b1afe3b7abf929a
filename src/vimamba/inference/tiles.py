import dataclasses


@dataclasses.dataclass
class TileOptions:
    """Tiles.

    Args:
        tile: x
        overlap: y
    """

    tile: int | None = None
    overlap: int = 128
