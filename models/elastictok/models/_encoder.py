"""From patches to latents."""

import abc
import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from elastictok.attention import AbstractMask, KeyValid, Segments

from ._cells import Cells
from ._execution import LOCAL, AbstractExecution
from ._place import PlaceEmbedding
from ._rope import AbstractRotary
from ._transformer import KVCache, Linear, RMSNorm, Transformer
from ._visibility import EARLIER_BLOCKS, AbstractVisibility


class AbstractEncoder(eqx.Module):
    """Patches, and which tokens are kept, to latents before quantization: one per token.

    How many tokens a block has is the encoder's business: one per patch (`Encoder`), or as many as
    it likes (`RegisterEncoder`). A block sees no later one, and `extend` gives block by block what
    a call gives for all.
    """

    in_proj: eqx.AbstractVar[Linear]
    transformer: eqx.AbstractVar[Transformer]

    @property
    def patch_dim(self) -> int:
        """Values in a patch."""
        return self.in_proj.weight.shape[-2]

    @property
    @abc.abstractmethod
    def latent_dim(self) -> int:
        """Values that a token has before quantization."""

    @abc.abstractmethod
    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of a block with so many cells along time, height and width."""

    @abc.abstractmethod
    def positions(self, grid: tuple[int, int, int]) -> int:
        """Positions that a block takes in the transformer."""

    @abc.abstractmethod
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
        """Latents of a whole sequence.

        **Arguments:**

        - `patches`: of whole blocks, in the order of `cells`.
        - `keep`: which tokens are kept, as the encoder is to be told.
        - `cells`: of a block's patches.
        - `segments`: document of each patch.
        - `key_valid`: false for patches that nobody sees.
        - `positions`: of each patch, for the rotary embedding; the index in the sequence by
            default.
        - `execution`: how the layers are carried out.
        """

    @abc.abstractmethod
    def init_cache(self, window: int, grid: tuple[int, int, int]) -> PyTree:
        """The state of a stream that has not started, for `window` blocks, the own one included."""

    @abc.abstractmethod
    def extend(
        self,
        patches: Float[Array, "cells patch"],
        keep: Bool[Array, "tokens"],
        cache: PyTree,
        cells: Cells,
    ) -> tuple[Float[Array, "tokens latent_dim"], PyTree]:
        """Latents of the next block of a stream, and the state after it."""

    @abc.abstractmethod
    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        """Floating-point operations of the matrix products of a call, those of attention included:
        as many multiplications as additions.

        **Arguments:**

        - `blocks`: in the sequence.
        - `grid`: cells of a block.
        """


@final
class Encoder(AbstractEncoder):
    """A token for each patch (arXiv 2410.08368, section 3): a learned vector, *kept* or *masked*,
    is added to each patch's embedding, and what comes out at its place is its latent.
    """

    in_proj: Linear
    kept: Float[Array, "dim"]
    masked: Float[Array, "dim"]
    place: PlaceEmbedding | None
    transformer: Transformer
    norm: RMSNorm
    out_proj: Linear
    visibility: AbstractVisibility = EARLIER_BLOCKS

    def __init__(
        self,
        patch_dim: int,
        latent_dim: int,
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

        - `patch_dim`: values in a patch.
        - `latent_dim`: what the quantizer takes per token (its `input_dim`).
        - `place_frequencies`: of a `PlaceEmbedding`; None for none, as in the paper.
        - `visibility`: which blocks a block sees.
        - the others: see `Transformer`.
        """
        i, k, m, p, t, o = jax.random.split(key, 6)
        self.in_proj = Linear(patch_dim, dim, std=std, key=i)
        self.kept = std * jax.random.normal(k, (dim,))
        self.masked = std * jax.random.normal(m, (dim,))
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
        self.out_proj = Linear(dim, latent_dim, std=std, key=o)
        self.visibility = visibility

    @property
    def latent_dim(self) -> int:
        return self.out_proj.weight.shape[-1]

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return math.prod(grid)

    def positions(self, grid: tuple[int, int, int]) -> int:
        return math.prod(grid)

    def embed(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        positions: Int[Array, "tokens"],
        cells: Cells,
    ) -> Float[Array, "tokens dim"]:
        """Input embeddings: each patch's, its *kept* or *masked* vector and its place."""
        x = self.in_proj(patches) + jnp.where(keep[:, None], self.kept, self.masked)
        return placed(x, self.place, positions, cells)

    def readout(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens latent_dim"]:
        """Latents from the last layer's output."""
        return self.out_proj(self.norm(x))

    def __call__(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        cells: Cells,
        *,
        segments: Int[Array, "tokens"] | None = None,
        key_valid: Bool[Array, "tokens"] | None = None,
        positions: Int[Array, "tokens"] | None = None,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "tokens latent_dim"]:
        positions = jnp.arange(len(keep)) if positions is None else positions
        mask = restricted(self.visibility.mask(cells.count, 0), segments, key_valid)
        x = self.embed(patches, keep, positions, cells)
        return self.readout(self.transformer(x, mask, positions, cells, execution))

    def init_cache(self, window: int, grid: tuple[int, int, int]) -> KVCache:
        return self.transformer.init_cache(window, self.positions(grid))

    def extend(
        self,
        patches: Float[Array, "tokens patch"],
        keep: Bool[Array, "tokens"],
        cache: KVCache,
        cells: Cells,
    ) -> tuple[Float[Array, "tokens latent_dim"], KVCache]:
        x = self.embed(patches, keep, jnp.arange(len(keep)), cells)
        x, cache = self.transformer.extend(x, cache, cells, self.visibility)
        return self.readout(x), cache

    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        tokens = blocks * self.tokens(grid)
        pairs = self.visibility.mask(self.tokens(grid), 0).count(tokens, tokens)
        ends = (self.in_proj, self.out_proj)
        return self.transformer.flops(tokens, pairs) + linear_flops(ends, tokens)


def restricted(
    mask: AbstractMask,
    segments: Int[Array, "positions"] | None,
    key_valid: Bool[Array, "positions"] | None,
) -> AbstractMask:
    """A mask in which documents do not see each other, and nobody sees padding."""
    if segments is not None:
        mask = mask & Segments(segments)
    if key_valid is not None:
        mask = mask & KeyValid(key_valid)
    return mask


def linear_flops(layers: tuple[Linear, ...], tokens: int) -> float:
    """Floating-point operations of each token's products with these matrices."""
    return 2.0 * tokens * sum(math.prod(layer.weight.shape) for layer in layers)


def place_embedding(
    frequencies: int | None, dim: int, std: float, key: Key[Array, ""]
) -> PlaceEmbedding | None:
    """One of so many frequencies, or none."""
    if frequencies is None:
        return None
    return PlaceEmbedding(dim, frequencies=frequencies, std=std, key=key)


def placed(
    x: Float[Array, "tokens dim"],
    place: PlaceEmbedding | None,
    positions: Int[Array, "tokens"],
    cells: Cells,
) -> Float[Array, "tokens dim"]:
    """Embeddings plus their places, if there is an embedding of those."""
    return x if place is None else x + place(cells.coordinates(positions))
