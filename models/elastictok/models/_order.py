"""In which order the cells of a block become tokens: what the first tokens of a block stand for."""

import abc
import functools

import equinox as eqx
import numpy as np


class AbstractOrder(eqx.Module):
    """Says which cell of a block's grid each token starts from."""

    @abc.abstractmethod
    def cells(self, grid: tuple[int, int, int]) -> np.ndarray:
        """Raster index of the cell at each rank: a permutation of `range(t * h * w)`.

        **Arguments:**

        - `grid`: number of patches of a block along time, height and width.
        """

    def ranks(self, grid: tuple[int, int, int]) -> np.ndarray:
        """Rank of each cell, cells in raster order: the inverse of `cells`."""
        return np.argsort(self.cells(grid), kind="stable")


class Raster(AbstractOrder):
    """Time, then rows, then columns: the order of the paper and of the released models."""

    def cells(self, grid: tuple[int, int, int]) -> np.ndarray:
        return np.arange(grid[0] * grid[1] * grid[2])


class CoarseToFine(AbstractOrder):
    """Coarse grids first: every prefix of a block's tokens covers the whole block.

    Cells are sorted by their interleaved bit-reversed coordinates, so that for each j the cells
    whose coordinates are all divisible by 2^j come first. A quarter of the tokens of a square
    picture is then every second cell on both axes, instead of the picture's top quarter. Not in the
    paper; works for any grid.
    """

    def cells(self, grid: tuple[int, int, int]) -> np.ndarray:
        return _coarse_to_fine(grid)


@functools.lru_cache(maxsize=64)
def _coarse_to_fine(grid: tuple[int, int, int]) -> np.ndarray:
    coordinates = np.indices(grid).reshape(3, -1)
    bits = max(int(size - 1).bit_length() for size in grid)
    # np.lexsort takes its last key as the most significant one: bit 0 of t, h, w decides first.
    keys = [(axis >> bit) & 1 for bit in reversed(range(bits)) for axis in reversed(coordinates)]
    order = np.lexsort(keys) if keys else np.arange(1)
    order.flags.writeable = False
    return order
