"""Tile sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """How much is computed at once: the most, for any length.

    Lengths up to a tile run as one tile, without a loop. The defaults suit the caches of CPUs.

    **Arguments:**

    - `queries`, `keys`: tokens per tile.
    - `scores`: scores held at once, over the tile, the heads and the batch. Where they would be
      more, the query tiles shrink, but not below 64.
    """

    queries: int = 512
    keys: int = 512
    scores: int = 2**21

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ValueError(f"TileSizes.{name} is {size}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class PallasTileSizes:
    forward: TileSizes = TileSizes(512, 1024)
    dq: TileSizes = TileSizes(512, 1024)
    dkv: TileSizes = TileSizes(512, 1024)
    vmem: int = 64 * 2**20
