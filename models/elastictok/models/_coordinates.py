"""A decoder that makes the patches it is asked for, and no others."""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from elastictok.attention import BlockCausal, KeyValid

from ._cells import Cells
from ._decoder import AbstractDecoder
from ._encoder import linear_flops
from ._execution import LOCAL, AbstractExecution, Local
from ._place import PlaceEmbedding
from ._rope import AbstractRotary
from ._sample import Asked, PatchSample
from ._transformer import CrossTransformer, Linear, RMSNorm, Transformer


class LatentCache(eqx.Module):
    """The latents of the last blocks of a stream, the newest last.

    - `count`: blocks that there were.
    """

    latents: Float[Array, "window tokens latent_dim"]
    count: Int[Array, ""]


@final
class CoordDecoder(AbstractDecoder):
    """A patch from its coordinates and the latents around it (the idea of CoordTok, arXiv
    2411.14762, section 3, whose latents are three planes for a whole clip).

    A transformer reads the latents of a block and of the `reach - 1` blocks before it; then a query
    for each patch that is asked for, made of its coordinates, looks at what was read
    (`CrossTransformer`). Patches do not see each other, so that each is the same whichever others
    are asked for. A training step asks for a `sample`: the decoder's work is then the same for a
    clip of any length.

    A block depends on `reach` blocks, not on all before it as with `Decoder`. Documents must not
    meet inside a block: a block is of the document of its first patch. On a mesh, the patches of an
    example are not split over devices, only examples are.
    """

    in_proj: Linear
    place: PlaceEmbedding
    transformer: Transformer
    memory_norm: RMSNorm
    query: Float[Array, "dim"]
    cross: CrossTransformer
    norm: RMSNorm
    out_proj: Linear
    reach: int = eqx.field(static=True)
    asks: PatchSample | None

    def __init__(
        self,
        latent_dim: int,
        patch_dim: int,
        *,
        dim: int,
        hidden: int,
        layers: int,
        cross_layers: int,
        heads: int,
        rotary: AbstractRotary,
        place_frequencies: int,
        reach: int = 2,
        sample: PatchSample | None = None,
        eps: float = 1e-5,
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        key: Key[Array, ""],
    ):
        """**Arguments:**

        - `latent_dim`: what the quantizer gives per token (its `latent_dim`).
        - `patch_dim`: values in a patch.
        - `layers`: of the transformer that reads latents.
        - `cross_layers`: in which queries look at what was read.
        - `place_frequencies`: of the `PlaceEmbedding` of latents and queries.
        - `reach`: blocks whose latents a block is made of, its own included.
        - `sample`: what a training step asks for; all patches of all blocks if None.
        - the others: see `Transformer`.
        """
        if reach < 1:
            raise ValueError(f"reach is {reach} blocks; it must be at least 1, the own one")
        i, p, t, q, c, o = jax.random.split(key, 6)
        self.in_proj = Linear(latent_dim, dim, std=std, key=i)
        self.place = PlaceEmbedding(dim, frequencies=place_frequencies, std=std, key=p)
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
        self.memory_norm = RMSNorm(dim, eps)
        self.query = std * jax.random.normal(q, (dim,))
        self.cross = CrossTransformer(
            dim=dim,
            hidden=hidden,
            layers=cross_layers,
            heads=heads,
            rotary=rotary,
            eps=eps,
            std=std,
            dtype=dtype,
            remat=remat,
            key=c,
        )
        self.norm = RMSNorm(dim, eps)
        self.out_proj = Linear(dim, patch_dim, std=std, key=o)
        self.reach = reach
        self.asks = sample

    @property
    def sample(self) -> PatchSample | None:
        return self.asks

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return math.prod(grid)

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

        **Raises:** `ValueError` if there are `positions`: those of a window are its own.
        """
        if positions is not None:
            raise ValueError("a window of blocks has positions of its own; leave positions out")
        blocks = len(latents) // cells.count
        every = jnp.broadcast_to(jnp.arange(cells.count), (blocks, cells.count))
        patches = self.ask(
            latents,
            Asked(jnp.arange(blocks), every),
            cells,
            segments=segments,
            key_valid=key_valid,
            execution=execution,
        )
        return patches.reshape(-1, patches.shape[-1])

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
        """Some patches of some blocks, at the cost of those."""
        sources = asked.blocks[:, None] + jnp.arange(1 - self.reach, 1)
        there = sources >= 0
        sources = jnp.maximum(sources, 0)
        if segments is not None:
            documents = segments[:: cells.count]
            there &= documents[sources] == documents[asked.blocks][:, None]
        if key_valid is not None:
            there &= key_valid[:: cells.count][sources]
        windows = latents.reshape(-1, cells.count, latents.shape[-1])[sources]
        return jax.vmap(
            lambda window, there, ranks: self._paint(window, there, ranks, cells, execution)
        )(windows, there, asked.ranks)

    def _paint(
        self,
        window: Float[Array, "reach tokens latent_dim"],
        there: Bool[Array, "reach"],
        ranks: Int[Array, "asked"],
        cells: Cells,
        execution: AbstractExecution = LOCAL,
    ) -> Float[Array, "asked patch"]:
        """Patches of the last block of a window."""
        positions = jnp.arange(self.reach * cells.count)
        seen = KeyValid(jnp.repeat(there, cells.count))
        x = self.in_proj(window.reshape(len(positions), -1))
        x = x + self.place(cells.coordinates(positions))
        mask = BlockCausal(block=cells.count) & seen
        # Windows are short and are not split: whatever the execution, each is where it is.
        memory = self.transformer(x, mask, positions, cells, Local(remat=execution.remat))
        queries = self.query + self.place(cells.coordinates(ranks))
        at = (self.reach - 1) * cells.count + ranks
        made = self.cross(queries, self.memory_norm(memory), seen, at, positions, cells, execution)
        return jnp.tanh(self.out_proj(self.norm(made)))

    def init_cache(self, window: int, grid: tuple[int, int, int]) -> LatentCache:
        if window < 1:
            raise ValueError(f"a cache of {window} blocks holds nothing; ask for at least 1")
        shape = (min(window, self.reach), math.prod(grid), self.latent_dim)
        return LatentCache(jnp.zeros(shape), jnp.zeros((), jnp.int32))

    def extend(
        self, latents: Float[Array, "tokens latent_dim"], cache: LatentCache, cells: Cells
    ) -> tuple[Float[Array, "cells patch"], LatentCache]:
        kept = jnp.concatenate([cache.latents[1:], latents[None]])
        count = cache.count + 1
        # Of a window narrower than the reach, the blocks that are missing are as if not there.
        missing = self.reach - len(kept)
        window = jnp.pad(kept, ((missing, 0), (0, 0), (0, 0)))
        there = jnp.arange(self.reach) >= self.reach - jnp.minimum(count, len(kept))
        patches = self._paint(window, there, jnp.arange(cells.count), cells)
        return patches, LatentCache(kept, count)

    def flops(self, blocks: int, grid: tuple[int, int, int]) -> float:
        tokens, keys = math.prod(grid), self.reach * math.prod(grid)
        asks = PatchSample(blocks, tokens) if self.asks is None else self.asks
        asked = min(asks.patches, tokens)
        pairs = BlockCausal(block=tokens).count(keys, keys)
        each = (
            self.transformer.flops(keys, pairs)
            + self.cross.flops(asked, keys, asked * keys)
            + linear_flops((self.in_proj,), keys)
            + linear_flops((self.out_proj,), asked)
        )
        return min(asks.blocks, blocks) * each
