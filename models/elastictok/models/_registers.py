"""Tokens that are no patches: learned queries, which gather what they are to hold."""

import math
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from ._cells import Cells
from ._decoder import AbstractDecoder
from ._encoder import AbstractEncoder, linear_flops, restricted
from ._execution import LOCAL, AbstractExecution
from ._place import PlaceEmbedding
from ._rope import AbstractRotary
from ._transformer import KVCache, Linear, RMSNorm, Transformer
from ._visibility import EARLIER_BLOCKS, AbstractVisibility


@final
class RegisterEncoder(AbstractEncoder):
    """As many tokens as there are registers, whatever the size of the frames: the transformer sees
    a block's patches and, behind them, its registers, and what comes out at a register is a latent
    (the 1-D tokens of TiTok, arXiv 2406.07550; with dropped tails FlexTok, arXiv 2502.13967, and
    One-D-Piece, arXiv 2501.10064; block by block over time AdapTok, arXiv 2505.17011).

    The learned vectors *kept* and *masked* are added to the registers; patches are told nothing.
    Documents must not meet inside a block: a block is of the document of its first patch.
    """

    in_proj: Linear
    place: PlaceEmbedding
    registers: Float[Array, "registers dim"]
    kept: Float[Array, "dim"]
    masked: Float[Array, "dim"]
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear
    visibility: AbstractVisibility = EARLIER_BLOCKS

    def __init__(
        self,
        patch_dim: int,
        latent_dim: int,
        *,
        registers: int,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        place_frequencies: int,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        visibility: AbstractVisibility = EARLIER_BLOCKS,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `patch_dim`: values in a patch.
        - `latent_dim`: what the quantizer takes per token (its `input_dim`).
        - `registers`: tokens of a block.
        - `place_frequencies`: of the `PlaceEmbedding` of patches.
        - `visibility`: which blocks a block sees.
        - the others: see `Transformer`. Registers lie in the middle of their block.
        """
        check_registers(registers)
        i, p, r, k, m, t, o = jax.random.split(key, 7)
        self.in_proj = Linear(patch_dim, dim, std=std, key=i)
        self.place = PlaceEmbedding(dim, frequencies=place_frequencies, std=std, key=p)
        self.registers = std * jax.random.normal(r, (registers, dim))
        self.kept = std * jax.random.normal(k, (dim,))
        self.masked = std * jax.random.normal(m, (dim,))
        self.transformer = Transformer(
            dim=dim,
            hidden=hidden,
            layers=layers,
            heads=heads,
            rotary=rotary,
            eps=eps,
            std=std,
            dtype=dtype,
            remat=remat,
            key=t,
        )
        self.norm = RMSNorm(dim, eps)
        self.out_proj = Linear(dim, latent_dim, std=std, key=o)
        self.visibility = visibility

    @property
    def latent_dim(self) -> int:
        return self.out_proj.weight.shape[-1]

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return self.registers.shape[0]

    def positions(self, grid: tuple[int, int, int]) -> int:
        return math.prod(grid) + self.registers.shape[0]

    def _embed(
        self, patches: Float[Array, "cells patch"], keep: Bool[Array, "tokens"], cells: Cells
    ) -> Float[Array, "positions dim"]:
        place = self.place(cells.coordinates(jnp.arange(cells.count)))
        x = self.in_proj(patches).reshape(-1, *place.shape) + place
        told = jnp.where(keep[:, None], self.kept, self.masked)
        return joined(x, told.reshape(-1, *self.registers.shape) + self.registers)

    def _readout(
        self, x: Float[Array, "positions dim"], cells: Cells
    ) -> Float[Array, "tokens latent_dim"]:
        _, registers = parted(x, cells.count, self.registers.shape[0])
        return self.out_proj(self.norm(registers))

    def __call__(
        self,
        patches: Float[Array, "cells patch"],
        keep: Bool[Array, "tokens"],
        cells: Cells,
        *,
        segments: Int[Array, "cells"] | None = None,
        key_valid: Bool[Array, "cells"] | None = None,
        positions: Int[Array, "cells"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens latent_dim"]:
        """See `AbstractEncoder`.

        **Raises:** `ValueError` if there are `positions`: registers need theirs between them.
        """
        x = self._embed(patches, keep, cells)
        x = through(
            self.transformer,
            x,
            cells,
            self.registers.shape[0],
            self.visibility,
            (segments, key_valid, positions),
            execution,
        )
        return self._readout(x, cells)

    def init_cache(self, window: int, grid: tuple[int, int, int]) -> KVCache:
        return self.transformer.init_cache(window, self.positions(grid))

    def extend(
        self,
        patches: Float[Array, "cells patch"],
        keep: Bool[Array, "tokens"],
        cache: KVCache,
        cells: Cells,
    ) -> tuple[Float[Array, "tokens latent_dim"], KVCache]:
        x = self._embed(patches, keep, cells)
        both = cells.with_registers(self.registers.shape[0])
        x, cache = self.transformer.extend(x, cache, both, self.visibility)
        return self._readout(x, cells), cache

    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        block = self.positions(grid)
        pairs = self.visibility.mask(block, 0).count(blocks * block, blocks * block)
        return (
            self.transformer.flops(blocks * block, pairs)
            + linear_flops((self.in_proj,), blocks * math.prod(grid))
            + linear_flops((self.out_proj,), blocks * self.tokens(grid))
        )


@final
class RegisterDecoder(AbstractDecoder):
    """Patches from the latents of registers: the transformer sees a learned query at each cell and,
    behind them, the latents, each with its register's learned vector. Papers: see
    `RegisterEncoder`.
    """

    in_proj: Linear
    place: PlaceEmbedding
    registers: Float[Array, "registers dim"]
    query: Float[Array, "dim"]
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear
    visibility: AbstractVisibility = EARLIER_BLOCKS

    def __init__(
        self,
        latent_dim: int,
        patch_dim: int,
        *,
        registers: int,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        place_frequencies: int,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        visibility: AbstractVisibility = EARLIER_BLOCKS,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `latent_dim`: what the quantizer gives per token (its `latent_dim`).
        - the others: as of `RegisterEncoder`.
        """
        check_registers(registers)
        i, p, r, q, t, o = jax.random.split(key, 6)
        self.in_proj = Linear(latent_dim, dim, std=std, key=i)
        self.place = PlaceEmbedding(dim, frequencies=place_frequencies, std=std, key=p)
        self.registers = std * jax.random.normal(r, (registers, dim))
        self.query = std * jax.random.normal(q, (dim,))
        self.transformer = Transformer(
            dim=dim,
            hidden=hidden,
            layers=layers,
            heads=heads,
            rotary=rotary,
            eps=eps,
            std=std,
            dtype=dtype,
            remat=remat,
            key=t,
        )
        self.norm = RMSNorm(dim, eps)
        self.out_proj = Linear(dim, patch_dim, std=std, key=o)
        self.visibility = visibility

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return self.registers.shape[0]

    def _embed(
        self, latents: Float[Array, "tokens latent_dim"], cells: Cells
    ) -> Float[Array, "positions dim"]:
        registers = self.in_proj(latents).reshape(-1, *self.registers.shape) + self.registers
        queries = self.place(cells.coordinates(jnp.arange(cells.count))) + self.query
        return joined(jnp.broadcast_to(queries, (len(registers), *queries.shape)), registers)

    def _readout(
        self, x: Float[Array, "positions dim"], cells: Cells
    ) -> Float[Array, "cells patch"]:
        patches, _ = parted(x, cells.count, self.registers.shape[0])
        return jnp.tanh(self.out_proj(self.norm(patches)))

    def __call__(
        self,
        latents: Float[Array, "tokens latent_dim"],
        cells: Cells,
        *,
        segments: Int[Array, "cells"] | None = None,
        key_valid: Bool[Array, "cells"] | None = None,
        positions: Int[Array, "cells"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "cells patch"]:
        """See `AbstractDecoder`.

        **Raises:** `ValueError` if there are `positions`: registers need theirs between them.
        """
        x = self._embed(latents, cells)
        x = through(
            self.transformer,
            x,
            cells,
            self.registers.shape[0],
            self.visibility,
            (segments, key_valid, positions),
            execution,
        )
        return self._readout(x, cells)

    def init_cache(self, window: int, grid: tuple[int, int, int]) -> KVCache:
        return self.transformer.init_cache(window, math.prod(grid) + self.registers.shape[0])

    def extend(
        self, latents: Float[Array, "tokens latent_dim"], cache: KVCache, cells: Cells
    ) -> tuple[Float[Array, "cells patch"], KVCache]:
        x = self._embed(latents, cells)
        both = cells.with_registers(self.registers.shape[0])
        x, cache = self.transformer.extend(x, cache, both, self.visibility)
        return self._readout(x, cells), cache

    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        registers = self.registers.shape[0]
        block = math.prod(grid) + registers
        pairs = self.visibility.mask(block, 0).count(blocks * block, blocks * block)
        return (
            self.transformer.flops(blocks * block, pairs)
            + linear_flops((self.in_proj,), blocks * registers)
            + linear_flops((self.out_proj,), blocks * math.prod(grid))
        )


def check_registers(registers: int) -> None:
    """**Raises:** `ValueError` if there are none."""
    if registers < 1:
        raise ValueError(f"registers is {registers}; a block has at least 1 token")


def joined(
    cells: Float[Array, "blocks cells dim"], registers: Float[Array, "blocks registers dim"]
) -> Float[Array, "positions dim"]:
    """A sequence: of each block first its cells, then its registers."""
    both = jnp.concatenate([cells, registers], axis=1)
    return both.reshape(-1, both.shape[-1])


def parted(
    x: Float[Array, "positions dim"], cells: int, registers: int
) -> tuple[Float[Array, "all_cells dim"], Float[Array, "all_registers dim"]]:
    """The inverse of `joined`, blocks one after the other."""
    blocks = x.reshape(-1, cells + registers, x.shape[-1])
    first, last = blocks[:, :cells], blocks[:, cells:]
    return first.reshape(-1, x.shape[-1]), last.reshape(-1, x.shape[-1])


def through(
    transformer: Transformer,
    x: Float[Array, "positions dim"],
    cells: Cells,
    registers: int,
    visibility: AbstractVisibility,
    of_cells: tuple[Array | None, Array | None, Array | None],
    execution: AbstractExecution,
) -> Float[Array, "positions dim"]:
    """A whole sequence with registers, given the segments, validity and positions of its cells.

    **Raises:** `ValueError` if there are positions.
    """
    segments, key_valid, positions = of_cells
    if positions is not None:
        raise ValueError(
            "positions of patches leave none for the registers between them; leave them out"
        )
    both = cells.with_registers(registers)
    mask = restricted(
        visibility.mask(both.count, 0),
        _of_block(segments, cells.count, both.count),
        _of_block(key_valid, cells.count, both.count),
    )
    return transformer(x, mask, jnp.arange(len(x)), both, execution)


def _of_block(of_cells: Array | None, cells: int, positions: int) -> Array | None:
    """What is said of a block's first cell, for each of its positions."""
    return None if of_cells is None else jnp.repeat(of_cells[::cells], positions)
