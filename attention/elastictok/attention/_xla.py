"""Attention in plain XLA that runs anywhere: an online softmax over the visible tiles only.

The scores are computed tile by tile and never kept (arXiv 1805.02867, 2205.14135): forward saves
the output and one number per row, backward recomputes a tile from them. For each tile of queries
the mask says between which keys anything is visible; a loop with a dynamic trip count runs over the
tiles of keys in between, so what is masked costs little and a new mask does not recompile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from elastictok.attention._backend import Shaped, unsupported_types
from elastictok.attention._masks import AbstractMask
from elastictok.attention._tile_sizes import TileKey, TileSizes, XLATileSizes, chip_here, tile_sizes
from elastictok.attention._tiled import UNSEEN, AbstractTiled, Sight, hull


class XLA(AbstractTiled):
    """Tiled attention for any device, with linear memory and its own gradient.

    **Arguments:**

    - `tiles`: the tile sizes. Default: what the table has for this machine's devices.
    - `scores`: scores held at once, over the tile, the heads and the batch. Where they would be
      more, the query tiles shrink, but not below 64.
    - `name`: the name to register it by.
    """

    tiles: XLATileSizes | None = eqx.field(static=True, default=None)
    scores: int = eqx.field(static=True, default=2**21)
    name: str = eqx.field(static=True, default="xla")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        return unsupported_types(q, k, v)

    def forward(
        self, q: Array, k: Array, v: Array, sight: Sight, *, scale: float, dtype: Any
    ) -> tuple[Array, Array]:
        (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
        group = heads // kv_heads
        plan = _plan(
            self._sizes(q, sight.mask).forward, self.scores // (batch * heads), queries, keys
        )
        facts = _facts(sight, plan)
        k_at, v_at = _key_tiles(k, plan), _key_tiles(v, plan)

        def a_tile_of_queries(_: None, tile: PyTree[Array]) -> tuple[None, tuple[Array, Array]]:
            q, of_queries, first, last = tile

            def with_keys(j: Array | int) -> _Softmax:
                start = _start(j, plan)
                seen = facts.tile(of_queries, start, j, plan)
                scores = _scores(q, k_at(start), seen, scale, plan)
                peak = scores.max(axis=-1)
                weights = jnp.exp(scores - peak[..., None])
                values = _product("bhrs,bhsd->bhrd", weights.astype(v.dtype), v_at(start))
                return _Softmax(peak, weights.sum(axis=-1), values)

            if plan.k_tiles == 1:
                softmax = with_keys(0)
            else:
                rows = (batch, kv_heads, group * plan.q_tile)
                nothing = _Softmax(
                    jnp.full(rows, UNSEEN, jnp.float32),
                    jnp.zeros(rows, jnp.float32),
                    jnp.zeros((*rows, head_dim), jnp.float32),
                )
                softmax = lax.fori_loop(
                    first, last, lambda j, so_far: so_far.merge(with_keys(j)), nothing
                )
            # A NaN is to be seen: the largest of it and a number may be the number, not their sum.
            empty = (softmax.peak <= UNSEEN) & ~jnp.isnan(softmax.total)
            out = jnp.where(empty[..., None], 0.0, softmax.values / softmax.total[..., None])
            lse = jnp.where(empty, UNSEEN, softmax.peak + jnp.log(softmax.total))
            return None, (out.astype(dtype), lse)

        tiles = (_query_tiles(_grouped(q, kv_heads), plan), *facts.by_query_tile(plan))
        _, (out, lse) = _scan(a_tile_of_queries, None, tiles, plan.q_tiles)
        out, lse = (_join_queries(x, plan, group) for x in (out, lse))
        return out.reshape(q.shape), lse.reshape(batch, queries, heads).swapaxes(1, 2)

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        lse: Array,
        delta: Array,
        d_out: Array,
        sight: Sight,
        *,
        scale: float,
        dtype: Any,
    ) -> tuple[Array, Array, Array]:
        (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
        group = heads // kv_heads
        plan = _plan(
            self._sizes(q, sight.mask).backward, self.scores // (batch * heads), queries, keys
        )
        facts = _facts(sight, plan)
        k_at, v_at = _key_tiles(k, plan), _key_tiles(v, plan)

        def a_tile_of_queries(
            totals: tuple[Array, Array], tile: PyTree[Array]
        ) -> tuple[tuple[Array, Array], Array]:
            q, d_out, lse, delta, of_queries, first, last = tile
            # On CPUs, rows times columns is a product several times faster than columns times rows.
            q_turned, d_out_turned = q.swapaxes(2, 3), d_out.swapaxes(2, 3)

            def with_keys(
                j: Array | int, so_far: tuple[Array, Array, Array]
            ) -> tuple[Array, Array, Array]:
                dq, dk, dv = so_far
                start = _start(j, plan)
                k_tile = k_at(start)
                seen = facts.tile(of_queries, start, j, plan)
                weights = jnp.exp(_scores(q, k_tile, seen, scale, plan) - lse[..., None])
                d_weights = _product("bhrd,bhsd->bhrs", d_out, v_at(start))
                d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(k.dtype)
                weights = weights.astype(v.dtype)
                return (
                    dq + _product("bhrs,bhsd->bhrd", d_scores, k_tile),
                    _add_at(dk, _product("bhdr,bhrs->bhds", q_turned, d_scores), start),
                    _add_at(dv, _product("bhdr,bhrs->bhds", d_out_turned, weights), start),
                )

            so_far = (jnp.zeros(q.shape, jnp.float32), *totals)
            if plan.k_tiles == 1:
                dq, dk, dv = with_keys(0, so_far)
            else:
                dq, dk, dv = lax.fori_loop(first, last, with_keys, so_far)
            return (dk, dv), dq.astype(dtype)

        per_query = (
            _grouped(q, kv_heads),
            _grouped(d_out.astype(v.dtype), kv_heads),
            *(_grouped(x.swapaxes(1, 2), kv_heads) for x in (lse, delta)),
        )
        nothing = jnp.zeros((batch, kv_heads, head_dim, keys), jnp.float32)
        tiles = (*(_query_tiles(x, plan) for x in per_query), *facts.by_query_tile(plan))
        (dk, dv), dq = _scan(a_tile_of_queries, (nothing, nothing), tiles, plan.q_tiles)
        dk, dv = (jnp.moveaxis(x, 3, 1).astype(dtype) for x in (dk, dv))
        return _join_queries(dq, plan, group).reshape(q.shape), dk, dv

    def _sizes(self, q: Array, mask: AbstractMask) -> XLATileSizes:
        if self.tiles is not None:
            return self.tiles
        key = TileKey("xla", chip_here(), q.dtype.name, q.shape[-1], mask.granularity())
        tiles = tile_sizes(key).tiles
        assert isinstance(tiles, XLATileSizes)
        return tiles


def _grouped(x: Array, kv_heads: int) -> Array:
    """[batch queries heads ...] as [batch queries kv_heads group ...]."""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


class _Plan(NamedTuple):
    """How the lengths are cut into tiles."""

    queries: int
    keys: int
    q_tile: int
    k_tile: int

    @property
    def q_tiles(self) -> int:
        return -(-self.queries // self.q_tile)

    @property
    def k_tiles(self) -> int:
        return -(-self.keys // self.k_tile)


def _plan(tiles: TileSizes, scores: int, queries: int, keys: int) -> _Plan:
    """Of at most so many scores for each head of each example."""
    k_tile = _even(keys, tiles.keys)
    limit = max(scores // k_tile, 64)
    return _Plan(queries, keys, _even(queries, min(tiles.queries, limit)), k_tile)


def _even(length: int, limit: int) -> int:
    """The tile that cuts a length into as few pieces as the limit allows, all nearly the same."""
    pieces = -(-length // limit)
    return length if pieces == 1 else min(limit, -(-length // (pieces * 8)) * 8)


class _Facts(NamedTuple):
    """What the mask says, with a leading batch axis that is 1 where the batch shares the mask."""

    mask: AbstractMask  # without its arrays: the predicate is asked of facts alone
    of_queries: PyTree[Array]  # [batch, padded queries]
    of_keys: PyTree[Array]  # [batch, keys]
    first: Int[Array, "q_tiles"]  # tiles of keys to visit, for each tile of queries
    last: Int[Array, "q_tiles"]

    def tile(self, of_queries: PyTree[Array], start: Array, j: Array | int, plan: _Plan) -> Array:
        """Which pairs of a tile are visible: broadcasts to [batch heads group queries keys]."""
        of_keys = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, plan.k_tile, 1)[:, None, :], self.of_keys
        )
        of_queries = jax.tree.map(lambda x: x[:, :, None], of_queries)
        seen = self.mask.sees(of_queries, of_keys)
        if plan.keys % plan.k_tile:  # the last tile begins early and repeats some keys: once only
            seen = seen & (start + jnp.arange(plan.k_tile) >= j * plan.k_tile)
        seen = jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, (1, 1, 1)))
        return seen[:, None, None]  # over key heads and groups

    def by_query_tile(self, plan: _Plan) -> tuple[PyTree[Array], Array, Array]:
        """What is known of the queries, as [tiles batch tile], and the tiles of keys to visit."""
        of_queries = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0], plan.q_tiles, plan.q_tile), 1, 0),
            self.of_queries,
        )
        return of_queries, self.first, self.last


def _facts(sight: Sight, plan: _Plan) -> _Facts:
    of_queries, of_keys = sight.facts()
    # Rows of padding are copies of the last query: something in range, and dropped at the end.
    padding = ((0, 0), (0, plan.q_tiles * plan.q_tile - plan.queries))
    of_queries = jax.tree.map(lambda x: jnp.pad(x, padding, mode="edge"), of_queries)
    if plan.k_tiles == 1:  # nothing to skip
        first, last = jnp.zeros(plan.q_tiles, int), jnp.ones(plan.q_tiles, int)
    else:  # a batch visits the tiles that any of its examples needs
        first, last = hull(sight.near(plan.q_tile, plan.k_tile).any(axis=0))
    return _Facts(sight.mask, of_queries, of_keys, first, last)


class _Softmax(NamedTuple):
    """A softmax under way: sums of weights `exp(score - peak)` over the keys met so far."""

    peak: Float[Array, "batch heads rows"]
    total: Float[Array, "batch heads rows"]
    values: Float[Array, "batch heads rows head_dim"]

    def merge(self, other: "_Softmax") -> "_Softmax":
        peak = jnp.maximum(self.peak, other.peak)
        ours, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return _Softmax(
            peak,
            self.total * ours + other.total * theirs,
            self.values * ours[..., None] + other.values * theirs[..., None],
        )


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """A product of tiles: operands as they are stored, sums in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, seen: Bool[Array, "..."], scale: float, plan: _Plan) -> Array:
    """The scores of a tile [batch heads group*queries keys], `UNSEEN` where not visible."""
    scores = _product("bhrd,bhsd->bhrs", q, k) * scale
    grouped = scores.reshape(*scores.shape[:2], -1, plan.q_tile, plan.k_tile)
    return jnp.where(seen, grouped, UNSEEN).reshape(scores.shape)


def _start(j: Array | int, plan: _Plan) -> Array:
    """Where a tile of keys begins. The last one begins early, so that it ends with the keys: that
    needs no padded copy of what may be a long cache."""
    return jnp.minimum(j * plan.k_tile, plan.keys - plan.k_tile)


def _key_tiles(x: Array, plan: _Plan) -> Callable[[Array], Array]:
    """From [batch keys heads head_dim], the tile [batch heads tile head_dim] at a position."""
    if plan.queries < plan.keys:  # a cache: turn the tiles that are used, and never the rest
        return lambda at: jnp.swapaxes(lax.dynamic_slice_in_dim(x, at, plan.k_tile, 1), 1, 2)
    x = jnp.swapaxes(x, 1, 2)
    return lambda at: lax.dynamic_slice_in_dim(x, at, plan.k_tile, 2)


def _add_at(x: Array, tile: Array, at: Array) -> Array:
    """Adds a tile [... tile] to the keys of x [... keys]."""
    sum_ = lax.dynamic_slice_in_dim(x, at, tile.shape[-1], x.ndim - 1) + tile
    return lax.dynamic_update_slice_in_dim(x, sum_, at, x.ndim - 1)


def _query_tiles(x: Array, plan: _Plan) -> Array:
    """[batch queries heads group ...] as [tiles batch heads group*queries ...], padded with 0."""
    rest = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, ((0, 0), (0, plan.q_tiles * plan.q_tile - plan.queries), *rest))
    x = x.reshape(x.shape[0], plan.q_tiles, plan.q_tile, *x.shape[2:])
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _join_queries(x: Array, plan: _Plan, group: int) -> Array:
    """Undoes `_query_tiles`."""
    x = x.reshape(*x.shape[:3], group, plan.q_tile, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : plan.queries]


def _scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: PyTree, tiles: PyTree, count: int
) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one tile."""
    if count > 1:
        return lax.scan(step, carry, tiles)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], out)
