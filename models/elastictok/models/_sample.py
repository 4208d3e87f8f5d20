"""Which patches a training step asks a decoder for."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ._cells import Cells


class Asked(eqx.Module):
    """Some patches of some blocks of a sequence.

    - `blocks`: which blocks.
    - `ranks`: which patches of each, by their rank in the block.
    """

    blocks: Int[Array, "blocks"]
    ranks: Int[Array, "blocks asked"]

    def of(self, patches: Float[Array, "cells patch"], cells: Cells) -> Float[Array, "b a patch"]:
        """These patches, of all patches of the sequence."""
        return patches.reshape(-1, cells.count, patches.shape[-1])[self.blocks[:, None], self.ranks]


@final
class PatchSample(eqx.Module):
    """Random patches of random blocks of a sequence, none twice: as much work for a long clip as
    for a short one (CoordTok, arXiv 2411.14762, section 3, which draws from whole clips).

    Blocks that are not padding come first. The mean of a loss over what is drawn has the mean over
    the sequence's blocks and patches as its expectation.

    - `blocks`: at most so many blocks.
    - `patches`: at most so many patches of each.
    """

    blocks: int = eqx.field(static=True)
    patches: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        for name in ("blocks", "patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a sample has at least 1")

    def draw(self, key: Key[Array, ""], valid: Bool[Array, "all_blocks"], cells: Cells) -> Asked:
        """**Arguments:**

        - `key`: of the step and example.
        - `valid`: false for blocks of padding.
        - `cells`: of a block's patches.
        """
        which, where = jax.random.split(key)
        late = jax.random.uniform(which, valid.shape) + ~valid
        blocks = jnp.argsort(late)[: self.blocks]
        order = jax.random.uniform(where, (len(blocks), cells.count))
        return Asked(blocks, jnp.argsort(order, axis=1)[:, : self.patches])
