"""From latents to patches."""

import abc
import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ._cells import Cells
from ._encoder import linear_flops, place_embedding, placed, restricted
from ._execution import LOCAL, AbstractExecution
from ._place import PlaceEmbedding
from ._rope import AbstractRotary
from ._sample import Asked, PatchSample
from ._transformer import KVCache, Linear, RMSNorm, Transformer
from ._visibility import EARLIER_BLOCKS, AbstractVisibility


class AbstractDecoder(eqx.Module):
    """Latents, zero where dropped, to patches in (-1, 1).

    It is told no lengths, and takes a latent of zeros as dropped. A block sees no later one, and
    `extend` gives block by block what a call gives for all.
    """

    in_proj: eqx.AbstractVar[Linear]
    transformer: eqx.AbstractVar[Transformer]
    out_proj: eqx.AbstractVar[Linear]

    @property
    def latent_dim(self) -> int:
        """Values that a quantized token has."""
        return self.in_proj.weight.shape[-2]

    @property
    def patch_dim(self) -> int:
        """Values in a patch."""
        return self.out_proj.weight.shape[-1]

    @property
    def sample(self) -> PatchSample | None:
        """Which patches a training step asks for; None, the default, for all of them."""
        return None

    @abc.abstractmethod
    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of a block with so many cells along time, height and width."""

    @abc.abstractmethod
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
        """Patches of a whole sequence.

        **Arguments:** as of `AbstractEncoder`.
        """

    def ask(
        self,
        latents: Float[Array, "tokens latent_dim"],
        asked: Asked,
        cells: Cells,
        *,
        segments: Int[Array, "cells"] | None = None,
        key_valid: Bool[Array, "cells"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "blocks asked patch"]:
        """Some patches of some blocks. By default all are made, and those picked.

        **Arguments:** as of `__call__`, and which patches.
        """
        patches = self(latents, cells, segments=segments, key_valid=key_valid, execution=execution)
        return asked.of(patches, cells)

    @abc.abstractmethod
    def init_cache(self, window: int, grid: tuple[int, int, int]) -> PyTree:
        """The state of a stream that has not started, for `window` blocks, the own one included."""

    @abc.abstractmethod
    def extend(
        self, latents: Float[Array, "tokens latent_dim"], cache: PyTree, cells: Cells
    ) -> tuple[Float[Array, "cells patch"], PyTree]:
        """Patches of the next block of a stream, and the state after it."""

    @abc.abstractmethod
    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        """As `AbstractEncoder.flops`, of what a training step asks for."""


@final
class Decoder(AbstractDecoder):
    """A patch for each token, at its place (arXiv 2410.08368, section 3)."""

    in_proj: Linear
    place: PlaceEmbedding | None
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear
    visibility: AbstractVisibility = EARLIER_BLOCKS

    def __init__(
        self,
        latent_dim: int,
        patch_dim: int,
        *,
        dim: int,
        hidden: int,
        layers: int,
        heads: int,
        rotary: AbstractRotary,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        place_frequencies: int | None = None,
        visibility: AbstractVisibility = EARLIER_BLOCKS,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `latent_dim`: what the quantizer gives per token (its `latent_dim`).
        - `patch_dim`: values in a patch.
        - `place_frequencies`: of a `PlaceEmbedding`; None for none, as in the paper.
        - `visibility`: which blocks a block sees.
        - the others: see `Transformer`.
        """
        i, p, t, o = jax.random.split(key, 4)
        self.in_proj = Linear(latent_dim, dim, std=std, key=i)
        self.place = place_embedding(place_frequencies, dim, std, p)
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
        return math.prod(grid)

    def embed(
        self,
        latents: Float[Array, "tokens latent_dim"],
        positions: Int[Array, "tokens"],
        cells: Cells,
    ) -> Float[Array, "tokens dim"]:
        """Input embeddings: each latent's, plus its place."""
        x = self.in_proj(latents)
        return placed(x, self.place, positions, cells)

    def readout(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens patch"]:
        """Patches from the last layer's output."""
        return jnp.tanh(self.out_proj(self.norm(x)))

    def __call__(
        self,
        latents: Float[Array, "tokens latent_dim"],
        cells: Cells,
        *,
        segments: Int[Array, "tokens"] | None = None,
        key_valid: Bool[Array, "tokens"] | None = None,
        positions: Int[Array, "tokens"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens patch"]:
        positions = jnp.arange(len(latents)) if positions is None else positions
        mask = restricted(self.visibility.mask(cells.count, 0), segments, key_valid)
        x = self.embed(latents, positions, cells)
        return self.readout(self.transformer(x, mask, positions, cells, execution))

    def init_cache(self, window: int, grid: tuple[int, int, int]) -> KVCache:
        return self.transformer.init_cache(window, math.prod(grid))

    def extend(
        self, latents: Float[Array, "tokens latent_dim"], cache: KVCache, cells: Cells
    ) -> tuple[Float[Array, "tokens patch"], KVCache]:
        x = self.embed(latents, jnp.arange(len(latents)), cells)
        x, cache = self.transformer.extend(x, cache, cells, self.visibility)
        return self.readout(x), cache

    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        tokens = blocks * math.prod(grid)
        pairs = self.visibility.mask(math.prod(grid), 0).count(tokens, tokens)
        ends = (self.in_proj, self.out_proj)
        return self.transformer.flops(tokens, pairs) + linear_flops(ends, tokens)
