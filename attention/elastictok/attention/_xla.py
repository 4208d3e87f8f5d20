"""Attention in plain XLA that runs anywhere: an online softmax over the visible tiles only.

The scores are computed tile by tile and never kept (arXiv 1805.02867, 2205.14135): forward saves
the output and two numbers per row, backward recomputes a tile from them. For each tile of queries
the mask says between which keys anything is visible; a loop with a dynamic trip count runs over the
tiles of keys in between, so what is masked costs little and a new mask does not recompile.

Inside, every array has a leading batch axis. `jax.vmap` grows that axis instead of batching the
loops, which would run every example as long as the longest and turn slices into gathers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from elastictok.attention._backend import AbstractBackend, Shaped, unsupported_types
from elastictok.attention._masks import AbstractMask

# The score of what is not visible. Finite, so that no difference of scores is NaN: beside any
# visible score its weight is 0, and a row with nothing else is known by its peak: its share is 0.
_UNSEEN = -1e38


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


class XLA(AbstractBackend):
    """Tiled attention for any device, with linear memory and its own gradient.

    **Arguments:**

    - `tiles`: the tile sizes.
    - `name`: the name to register it by.
    """

    tiles: TileSizes = eqx.field(static=True, default=TileSizes())
    name: str = eqx.field(static=True, default="xla")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        return unsupported_types(q, k, v)

    def __call__(
        self,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "keys kv_heads head_dim"],
        v: Float[Array, "keys kv_heads head_dim"],
        mask: AbstractMask,
        *,
        scale: float,
    ) -> Float[Array, "tokens heads head_dim"]:
        leaves, structure = jax.tree.flatten(mask)
        how = _How(structure, self.tiles, scale)
        return _run(how, q, k, v, tuple(jnp.asarray(leaf) for leaf in leaves))


class _How(NamedTuple):
    """All that is known at compile time. Hashable: it is the key of the compiled code."""

    structure: Any  # of the mask, whose arrays travel apart
    tiles: TileSizes
    scale: float


# Compiled here as well, so that a call outside jit does not trace its loops anew each time.
@functools.partial(jax.jit, static_argnums=0)
def _run(how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    # float16 has too few exponents for what the gradient is made of; bfloat16 has those of float32.
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.bfloat16)
    grouped = q.astype(dtype).reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    out: Array = _attend(how, grouped, k.astype(dtype), v.astype(dtype), leaves)
    return out.reshape(tokens, heads, head_dim).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]) -> Array:
    return _attend_forward(how, q, k, v, leaves)[0]


def _attend_forward(
    how: _How, q: Array, k: Array, v: Array, leaves: tuple[Array, ...]
) -> tuple[Array, PyTree[Array]]:
    out, peak, share = _over_a_batch(functools.partial(_forward, how))((q, k, v), leaves)
    return out, (leaves, (q, k, v, out, peak, share))


def _attend_backward(
    how: _How, saved: PyTree[Array], d_out: Array
) -> tuple[Array, Array, Array, None]:
    leaves, arrays = saved
    dq, dk, dv = _over_a_batch(functools.partial(_backward, how))((*arrays, d_out), leaves)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _over_a_batch(
    kernel: Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]],
) -> Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]]:
    """Makes a kernel with a batch axis take one example, and `jax.vmap` grow that axis.

    The kernel's first arguments have a leading axis of the batch's size; the mask's leaves too, or
    of size 1 where the whole batch shares them.
    """

    @jax.custom_batching.custom_vmap
    def batched(arrays: tuple[Array, ...], leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        return kernel(arrays, leaves)

    @batched.def_vmap
    def _(
        size: int,
        is_batched: Sequence[Sequence[bool]],
        arrays: tuple[Array, ...],
        leaves: tuple[Array, ...],
    ) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        inner = arrays[0].shape[1 if is_batched[0][0] else 0]

        def fold(x: Array, is_new: bool) -> Array:
            x = x if is_new else x[None]
            x = jnp.broadcast_to(x, (size, inner, *x.shape[2:]))
            return x.reshape(size * inner, *x.shape[2:])

        folded = tuple(map(fold, arrays, is_batched[0]))
        shared = tuple(
            leaf if not is_new and leaf.shape[0] == 1 else fold(leaf, is_new)
            for leaf, is_new in zip(leaves, is_batched[1], strict=True)
        )
        outs = batched(folded, shared)
        return tuple(out.reshape(size, inner, *out.shape[1:]) for out in outs), (True,) * len(outs)

    def one(arrays: tuple[Array, ...], leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        arrays, leaves = jax.tree.map(lambda x: x[None], (arrays, leaves))
        return tuple(out[0] for out in batched(arrays, leaves))

    return one


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


def _plan(tiles: TileSizes, batch_and_heads: int, queries: int, keys: int) -> _Plan:
    k_tile = _even(keys, tiles.keys)
    limit = max(tiles.scores // (batch_and_heads * k_tile), 64)
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


def _facts(how: _How, plan: _Plan, leaves: tuple[Array, ...]) -> _Facts:
    # Rows of padding are copies of the last query: something in range, and dropped at the end.
    q_indices = jnp.minimum(jnp.arange(plan.q_tiles * plan.q_tile), plan.queries - 1)

    def ask(leaves: tuple[Array, ...]) -> tuple[PyTree[Array], ...]:
        mask = jax.tree.unflatten(how.structure, leaves)
        of_queries, of_keys = mask.of_queries(q_indices), mask.of_keys(jnp.arange(plan.keys))
        if plan.k_tiles == 1:  # nothing to skip
            return of_queries, of_keys, (jnp.zeros(plan.q_tiles, int), jnp.ones(plan.q_tiles, int))
        start, stop = mask.key_bounds(plan.queries, plan.keys, plan.q_tile)
        empty = start >= stop
        first = jnp.where(empty, plan.k_tiles, start // plan.k_tile)
        last = jnp.where(empty, 0, -(-stop // plan.k_tile))
        return of_queries, of_keys, (first, last)

    one_each = tuple(leaf[0] if leaf.shape[0] == 1 else leaf for leaf in leaves)
    axes = tuple(None if leaf.shape[0] == 1 else 0 for leaf in leaves)
    if any(axis == 0 for axis in axes):
        of_queries, of_keys, (first, last) = jax.vmap(ask, in_axes=(axes,))(one_each)
    else:
        asked = ask(one_each)
        of_queries, of_keys, (first, last) = jax.tree.map(lambda x: x[None], asked)
    mask = jax.tree.unflatten(how.structure, [None] * len(leaves))
    # A batch visits the tiles that any of its examples needs.
    return _Facts(mask, of_queries, of_keys, first.min(axis=0), last.max(axis=0))


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


def _forward(
    how: _How, arrays: tuple[Array, ...], leaves: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    """The output [batch queries kv_heads group head_dim] and what it takes to recompute the weights
    of a row: its largest score, and one over the sum of the exponentials relative to that."""
    q, k, v = arrays
    batch, queries, kv_heads, group, head_dim = q.shape
    plan = _plan(how.tiles, batch * kv_heads * group, queries, k.shape[1])
    facts = _facts(how, plan, leaves)
    k_at, v_at = _key_tiles(k, plan), _key_tiles(v, plan)

    def a_tile_of_queries(_: None, tile: PyTree[Array]) -> tuple[None, tuple[Array, ...]]:
        q, of_queries, first, last = tile

        def with_keys(j: Array | int) -> _Softmax:
            start = _start(j, plan)
            seen = facts.tile(of_queries, start, j, plan)
            scores = _scores(q, k_at(start), seen, how, plan)
            peak = scores.max(axis=-1)
            weights = jnp.exp(scores - peak[..., None])
            values = _product("bhrs,bhsd->bhrd", weights.astype(v.dtype), v_at(start))
            return _Softmax(peak, weights.sum(axis=-1), values)

        if plan.k_tiles == 1:
            softmax = with_keys(0)
        else:
            rows = (batch, kv_heads, group * plan.q_tile)
            nothing = _Softmax(
                jnp.full(rows, _UNSEEN, jnp.float32),
                jnp.zeros(rows, jnp.float32),
                jnp.zeros((*rows, head_dim), jnp.float32),
            )
            softmax = lax.fori_loop(
                first, last, lambda j, so_far: so_far.merge(with_keys(j)), nothing
            )
        share = jnp.where(softmax.peak > _UNSEEN, 1.0 / softmax.total, 0.0)
        out = (softmax.values * share[..., None]).astype(q.dtype)
        return None, (out, softmax.peak, share)

    tiles = (_query_tiles(q, plan), _fact_tiles(facts, plan), facts.first, facts.last)
    _, (out, peak, share) = _scan(a_tile_of_queries, None, tiles, plan.q_tiles)
    out, peak, share = (_join_queries(x, plan, group) for x in (out, peak, share))
    return out, peak, share


def _backward(
    how: _How, arrays: tuple[Array, ...], leaves: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    q, k, v, out, peak, share, d_out = arrays
    batch, queries, kv_heads, group, head_dim = q.shape
    keys = k.shape[1]
    plan = _plan(how.tiles, batch * kv_heads * group, queries, keys)
    facts = _facts(how, plan, leaves)
    k_at, v_at = _key_tiles(k, plan), _key_tiles(v, plan)

    def a_tile_of_queries(
        totals: tuple[Array, Array], tile: PyTree[Array]
    ) -> tuple[tuple[Array, Array], Array]:
        q, out, d_out, peak, share, of_queries, first, last = tile
        # Dividing what arrives by the softmax's sum spares dividing each of the weights.
        row_sums = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1) * share
        d_out = (d_out * share[..., None]).astype(v.dtype)
        # On CPUs, rows times columns is a product several times faster than columns times rows.
        q_turned, d_out_turned = q.swapaxes(2, 3), d_out.swapaxes(2, 3)

        def with_keys(
            j: Array | int, so_far: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            dq, dk, dv = so_far
            start = _start(j, plan)
            k_tile = k_at(start)
            seen = facts.tile(of_queries, start, j, plan)
            weights = jnp.exp(_scores(q, k_tile, seen, how, plan) - peak[..., None])
            d_weights = _product("bhrd,bhsd->bhrs", d_out, v_at(start))
            d_scores = (weights * (d_weights - row_sums[..., None]) * how.scale).astype(k.dtype)
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
        return (dk, dv), dq.astype(q.dtype)

    per_query = tuple(_query_tiles(x, plan) for x in (q, out, d_out, peak, share))
    nothing = jnp.zeros((batch, kv_heads, head_dim, keys), jnp.float32)
    tiles = (*per_query, _fact_tiles(facts, plan), facts.first, facts.last)
    (dk, dv), dq = _scan(a_tile_of_queries, (nothing, nothing), tiles, plan.q_tiles)
    dk, dv = (jnp.moveaxis(x, 3, 1) for x in (dk, dv))
    return _join_queries(dq, plan, group), dk.astype(k.dtype), dv.astype(v.dtype)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """A product of tiles: operands as they are stored, sums in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scores(q: Array, k: Array, seen: Bool[Array, "..."], how: _How, plan: _Plan) -> Array:
    """The scores of a tile [batch heads group*queries keys], `_UNSEEN` where not visible."""
    scores = _product("bhrd,bhsd->bhrs", q, k) * how.scale
    grouped = scores.reshape(*scores.shape[:2], -1, plan.q_tile, plan.k_tile)
    return jnp.where(seen, grouped, _UNSEEN).reshape(scores.shape)


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


def _fact_tiles(facts: _Facts, plan: _Plan) -> PyTree[Array]:
    """What is known of the queries, as [tiles batch tile]."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], plan.q_tiles, plan.q_tile), 1, 0),
        facts.of_queries,
    )


def _scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: PyTree, tiles: PyTree, count: int
) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one tile."""
    if count > 1:
        return lax.scan(step, carry, tiles)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], out)
