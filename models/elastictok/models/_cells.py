"""Where the tokens of a sequence lie."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._order import AbstractOrder


class Cells(eqx.Module):
    """The cells of a block's tokens, for a token order and a grid."""

    table: Int[np.ndarray, "block_tokens 3"]
    grid: tuple[int, int, int] = eqx.field(static=True)

    def __init__(self, order: AbstractOrder, grid: tuple[int, int, int]):
        """**Arguments:**

        - `order`: which cell each token of a block starts from.
        - `grid`: cells of a block along time, height and width.
        """
        places = np.unravel_index(order.cells(grid), grid)
        self.table = np.stack(places, axis=-1).astype(np.int32)
        self.grid = grid

    @property
    def count(self) -> int:
        """Positions of a block: its cells, and the registers after them."""
        return len(self.table)

    def with_registers(self, count: int) -> "Cells":
        """The same block with `count` more positions behind its cells, which lie in its middle."""
        middle = np.array([[size // 2 for size in self.grid]], np.int32)
        table = np.concatenate([self.table, np.repeat(middle, count, axis=0)])
        return eqx.tree_at(lambda cells: cells.table, self, table)

    def indices(self, positions: Int[Array, "tokens"]) -> Int[Array, "tokens 3"]:
        """Time, height and width of each token's cell, in cells; time runs on over the blocks.

        **Arguments:**

        - `positions`: index of each token in its sequence or stream.
        """
        block, rank = jnp.divmod(positions, self.count)
        where = jnp.asarray(self.table)[rank]
        return where.at[:, 0].add(block * self.grid[0])

    def coordinates(self, positions: Int[Array, "tokens"]) -> Float[Array, "tokens 3"]:
        """Time, height and width of the middle of each token's cell in its block, in (0, 1)."""
        where = jnp.asarray(self.table)[positions % self.count]
        return (where + 0.5) / jnp.asarray(self.grid, jnp.float32)
