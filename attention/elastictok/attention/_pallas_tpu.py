"""Attention kernels for TPUs: forward, the gradient of queries, and that of keys and values.

The grid is (batch, heads, tiles of queries); the third kernel's is (batch, key heads, tiles of
keys). Inside, a loop of dynamic length goes over the visible tiles of the other side only, and
fetches them from HBM itself, the next one while this one is computed. So there is no table of
visible tiles (it would outgrow the scalar memory at a million tokens) and no empty step in the grid
(half of all for a causal mask); moving through a cache or packing other documents compiles nothing
anew. Of the mask a kernel sees:

- for each tile, where the visible tiles of the other side begin and end, and the smallest and the
  largest of each fact: a few numbers per tile, in scalar memory;
- for each token, its facts, laid out along the lanes.

A tile that the ranges show to be hidden is passed over; one that they show to be all visible is
computed without asking the predicate; of the others only those with a visible pair are computed.

Compiled for TPUs by their compiler and run by Pallas' interpreters on CPUs; never yet run on a TPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int, PyTree

from elastictok.attention._backend import Shaped, unsupported_types
from elastictok.attention._masks import AbstractMask, ranges
from elastictok.attention._tile_sizes import (
    TileKey,
    TileSizes,
    TPUTileSizes,
    chip_here,
    tile_sizes,
)
from elastictok.attention._tiled import UNSEEN, AbstractTiled, Sight, hull

_LANES = 128
_HEAD_DIM_LIMIT = 256
# Scalar memory of a TPU core is 1 MB on the chips known; Pallas fetches blocks ahead, twice.
_SMEM_LIMIT = 2**20 // 3


class PallasTPU(AbstractTiled):
    """Kernels for TPUs.

    **Arguments:**

    - `chip`: the kind of TPU to compile for, as `jax.Device.device_kind` has it; `TPU_CHIPS` lists
      those with tile sizes of their own. Default: the one of this machine. Naming one makes it
      possible to compile ahead of time where there is none.
    - `tiles`: the tile sizes. Default: what the table has for the chip.
    - `interpret`: `True` runs the kernels on any machine in Pallas' interpreter, and
      `pltpu.InterpretParams(...)` in its simulation of a TPU: slow, for tests.
    - `name`: the name to register it by.
    """

    chip: str | None = eqx.field(static=True, default=None)
    tiles: TPUTileSizes | None = eqx.field(static=True, default=None)
    interpret: Any = eqx.field(static=True, default=False)
    name: str = eqx.field(static=True, default="pallas_tpu")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        reasons = unsupported_types(q, k, v)
        if self.chip is None and not self.interpret and jax.default_backend() != "tpu":
            reasons.append(
                f"it runs on TPUs and this machine's devices are {jax.devices()[0].device_kind!r}: "
                "name a chip, PallasTPU(chip='TPU v5 lite'), to compile for one, or use "
                "PallasTPU(interpret=True) to try the kernels here"
            )
        if q.shape[-1] > _HEAD_DIM_LIMIT:
            reasons.append(
                f"head_dim is {q.shape[-1]} and its tiles are made for at most {_HEAD_DIM_LIMIT}: "
                "use more heads, or the backend 'xla'"
            )
        if not reasons and q.shape[0] and k.shape[0]:
            reasons += self._reasons_against_mask(q, k, mask)
        return reasons

    def _reasons_against_mask(self, q: Shaped, k: Shaped, mask: AbstractMask) -> list[str]:
        of_queries, of_keys = jax.eval_shape(
            lambda mask: (
                mask.of_queries(jnp.arange(q.shape[0])),
                mask.of_keys(jnp.arange(k.shape[0])),
            ),
            mask,
        )
        reasons = [
            f"the mask knows of its {whose} something of type {fact.dtype}; the kernels compare "
            "integers and booleans of up to 32 bits: return those from of_queries and of_keys"
            for whose, facts in (("queries", of_queries), ("keys", of_keys))
            for fact in jax.tree.leaves(facts)
            if not (jnp.issubdtype(fact.dtype, jnp.integer) or fact.dtype == jnp.bool_)
        ]
        sizes = self._sizes(q, mask)
        facts = len(jax.tree.leaves((of_queries, of_keys)))
        for name, kernel in (("forward", sizes.forward), ("dq", sizes.dq), ("dkv", sizes.dkv)):
            if not self.interpret and (kernel.queries % _LANES or kernel.keys % _LANES):
                reasons.append(
                    f"the {name} tiles are {kernel.queries} x {kernel.keys}; on a TPU they must be "
                    f"multiples of {_LANES}"
                )
            tiles = -(-q.shape[0] // kernel.queries) + -(-k.shape[0] // kernel.keys)
            if (size := 4 * (2 + 2 * facts) * tiles) > _SMEM_LIMIT:
                reasons.append(
                    f"{q.shape[0]} queries and {k.shape[0]} keys in tiles of {kernel.queries} and "
                    f"{kernel.keys} make tables of {size} bytes, above the {_SMEM_LIMIT} that the "
                    "scalar memory has room for: use larger tiles, PallasTPU(tiles=...), or a Ring "
                    "over several devices"
                )
                break
        return reasons

    def forward(
        self, q: Array, k: Array, v: Array, sight: Sight, *, scale: float, dtype: Any
    ) -> tuple[Array, Array]:
        sizes = self._sizes(q, sight.mask)
        call = _Call(self.interpret, sizes.vmem, sight, sizes.forward, q, k, scale)
        q_rows = call.rows(q)
        (batch, heads, rows, _), tile = q_rows.shape, call.plan.q_tile
        out, lse = call.over_queries(
            _forward_kernel,
            blocked=[q_rows],
            fetched=[call.columns(k), call.columns(v)],
            outs=[
                jax.ShapeDtypeStruct(q_rows.shape, dtype),
                jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32),
            ],
            scratch=[
                pltpu.VMEM((tile, _LANES), jnp.float32),
                pltpu.VMEM((tile, _LANES), jnp.float32),
                pltpu.VMEM((tile, q_rows.shape[3]), jnp.float32),
            ],
            products=2,
        )
        return _unrowed(out, q), lse[:, :, 0, : q.shape[1]]

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
        sizes = self._sizes(q, sight.mask)
        d_out = d_out.astype(q.dtype)
        numbers = jnp.stack([lse, delta], axis=2)  # [batch heads 2 queries]

        call = _Call(self.interpret, sizes.vmem, sight, sizes.dq, q, k, scale)
        q_rows = call.rows(q)
        (dq,) = call.over_queries(
            _dq_kernel,
            blocked=[q_rows, call.rows(d_out), call.along_rows(numbers)],
            fetched=[call.columns(k), call.columns(v)],
            outs=[jax.ShapeDtypeStruct(q_rows.shape, dtype)],
            scratch=[
                pltpu.VMEM((2, call.plan.q_tile, _LANES), jnp.float32),
                pltpu.VMEM((call.plan.q_tile, q_rows.shape[3]), jnp.float32),
            ],
            products=3,
        )
        call = _Call(self.interpret, sizes.vmem, sight, sizes.dkv, q, k, scale)
        k_rows = call.columns(k)
        dk, dv = call.over_keys(
            _dkv_kernel,
            blocked=[k_rows, call.columns(v)],
            fetched=[call.rows(q), call.rows(d_out), call.along_rows(numbers)],
            outs=[jax.ShapeDtypeStruct(k_rows.shape, dtype)] * 2,
            scratch=[pltpu.VMEM((call.plan.k_tile, k_rows.shape[3]), jnp.float32)] * 2,
            products=4,
        )
        return _unrowed(dq, q), _unrowed(dk, k), _unrowed(dv, v)

    def _sizes(self, q: Shaped, mask: AbstractMask) -> TPUTileSizes:
        if self.tiles is not None:
            return self.tiles
        chip = self.chip or chip_here()
        key = TileKey("pallas_tpu", chip, q.dtype.name, q.shape[-1], mask.granularity())
        tiles = tile_sizes(key).tiles
        assert isinstance(tiles, TPUTileSizes)
        return tiles


def _unrowed(x: Array, like: Array) -> Array:
    """Undoes `rows`: to [batch length heads head_dim]."""
    return x.swapaxes(1, 2)[:, : like.shape[1], :, : like.shape[3]]


class _Facts(NamedTuple):
    """How the facts of a token are packed into rows of 32-bit integers."""

    structure: Any
    is_bool: tuple[bool, ...]

    @property
    def rows(self) -> int:
        return max(len(self.is_bool), 1)  # an array without rows is not a thing in a kernel

    def unpack(self, rows: Sequence[Array]) -> PyTree[Array]:
        pairs = zip(rows, self.is_bool, strict=True)
        return jax.tree.unflatten(self.structure, [x != 0 if flag else x for x, flag in pairs])


def _pack(facts: PyTree[Array], length: int, tile: int) -> tuple[_Facts, Array]:
    """The facts as [batch rows padded length]; padding repeats the last token's."""
    leaves, structure = jax.tree.flatten(facts)
    how = _Facts(structure, tuple(leaf.dtype == jnp.bool_ for leaf in leaves))
    batch = max((leaf.shape[0] for leaf in leaves), default=1)
    leaves = leaves or [jnp.zeros((1, length), jnp.int32)]
    rows = [jnp.broadcast_to(leaf.astype(jnp.int32), (batch, length)) for leaf in leaves]
    packed = jnp.stack(rows, axis=1)
    return how, jnp.pad(packed, ((0, 0), (0, 0), (0, -length % tile)), mode="edge")


class _Plan(NamedTuple):
    """All that a kernel knows at compile time."""

    mask: AbstractMask  # without its arrays
    of_queries: _Facts
    of_keys: _Facts
    keys: int
    q_tile: int
    k_tile: int
    group: int
    scale: float
    precision: lax.Precision

    def product(self, a: Array, b: Array, over: tuple[int, int]) -> Array:
        """The product of two tiles over an axis of each, summed in float32."""
        return lax.dot_general(
            a,
            b,
            (((over[0],), (over[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


class _Call:
    """One call of a kernel: cuts the arrays into tiles and lays the mask out for it."""

    def __init__(
        self,
        interpret: Any,
        vmem: int,
        sight: Sight,
        sizes: TileSizes,
        q: Array,
        k: Array,
        scale: float,
    ):
        self._interpret, self._vmem = interpret, vmem
        self._batch, queries, self._heads, head_dim = q.shape
        _, keys, self._kv_heads, _ = k.shape
        # Widths that the matrix unit and the layouts are known to take.
        self._head_dim = next(size for size in (32, 64, 128, 256) if size >= head_dim)
        q_tile, k_tile = _tile(queries, sizes.queries), _tile(keys, sizes.keys)
        of_queries, of_keys = sight.facts()
        near = sight.near(q_tile, k_tile)
        q_facts, self._q_facts = _pack(of_queries, queries, q_tile)
        k_facts, self._k_facts = _pack(of_keys, keys, k_tile)
        self._q_table = _table(near, self._q_facts, q_tile)
        self._k_table = _table(near.swapaxes(1, 2), self._k_facts, k_tile)
        exact = q.dtype == jnp.float32
        self.plan = _Plan(
            sight.mask,
            q_facts,
            k_facts,
            keys,
            q_tile,
            k_tile,
            self._heads // self._kv_heads,
            scale,
            lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        )

    def rows(self, x: Array) -> Array:
        """[batch queries heads head_dim] as [batch heads padded padded]."""
        return self._heads_first(x, self.plan.q_tile)

    def columns(self, x: Array) -> Array:
        """[batch keys heads head_dim] as [batch heads padded padded]."""
        return self._heads_first(x, self.plan.k_tile)

    def along_rows(self, x: Array) -> Array:
        """[batch heads numbers queries], padded."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % self.plan.q_tile)))

    def _heads_first(self, x: Array, tile: int) -> Array:
        padding = ((0, 0), (0, 0), (0, -x.shape[1] % tile), (0, self._head_dim - x.shape[3]))
        return jnp.pad(x.swapaxes(1, 2), padding)

    def over_queries(self, kernel: Callable[..., None], **arrays: Any) -> Sequence[Array]:
        """Runs a kernel for each head and tile of queries, which fetches tiles of keys."""
        plan = self.plan
        grid = (self._batch, self._heads, self._q_facts.shape[2] // plan.q_tile)
        scratch = [pltpu.VMEM((plan.of_queries.rows, plan.q_tile, _LANES), jnp.int32)]
        return self._run(kernel, grid, self._q_facts, self._k_facts, plan.k_tile, scratch, **arrays)

    def over_keys(self, kernel: Callable[..., None], **arrays: Any) -> Sequence[Array]:
        """Runs a kernel for each key head and tile of keys, which fetches tiles of queries."""
        plan = self.plan
        grid = (self._batch, self._kv_heads, self._k_facts.shape[2] // plan.k_tile)
        scratch = [pltpu.VMEM((plan.of_keys.rows, plan.k_tile, _LANES), jnp.int32)]
        return self._run(kernel, grid, self._k_facts, self._q_facts, plan.q_tile, scratch, **arrays)

    def _run(
        self,
        kernel: Callable[..., None],
        grid: tuple[int, int, int],
        own_facts: Array,
        fetched_facts: Array,
        fetched_tile: int,
        turned: list[Any],
        *,
        blocked: list[Array],
        fetched: list[Array],
        outs: list[jax.ShapeDtypeStruct],
        scratch: list[Any],
        products: int,
    ) -> Sequence[Array]:
        fetched = [fetched_facts, *fetched]
        buffers = [_buffer(x, fetched_tile) for x in fetched]
        q_length, k_length = self._q_facts.shape[2], self._k_facts.shape[2]
        pairs = self._batch * self._heads * q_length * k_length
        arrays = [self._q_table, self._k_table, own_facts, *blocked, *fetched]
        tile = own_facts.shape[2] // grid[2]
        return pl.pallas_call(
            functools.partial(kernel, self.plan),
            grid=grid,
            in_specs=[
                *(_table_spec(x) for x in (self._q_table, self._k_table)),
                _fact_spec(own_facts, tile),
                *(_tile_spec(x, tile) for x in blocked),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in fetched),
            ],
            out_specs=[_tile_spec(x, tile) for x in outs],
            out_shape=outs,
            scratch_shapes=[
                *buffers,
                pltpu.SemaphoreType.DMA((2, len(fetched))),
                *turned,
                *scratch,
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel"),
                vmem_limit_bytes=self._vmem,
            ),
            # Of all pairs: what is visible is known only when it runs.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * pairs * self._head_dim,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outs)),
            ),
            interpret=self._interpret,
            name=f"elastictok_attention{kernel.__name__.removesuffix('_kernel')}",
        )(*arrays)


def _tile(length: int, limit: int) -> int:
    """The limit, or less for what is shorter; a multiple of the lanes if the limit is one."""
    unit = min(limit, _LANES)
    return min(limit, -(-length // unit) * unit)


def _table(near: Bool[Array, "batch own others"], facts: Array, tile: int) -> Array:
    """For each tile: the first and last of the others' tiles, the smallest and largest facts."""
    lo, hi = ranges(facts, tile)
    first, last = hull(near)
    batch = max(near.shape[0], facts.shape[0])
    parts = [first[:, None], last[:, None], lo, hi]
    return jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in parts], axis=1)


def _table_spec(x: Array) -> pl.BlockSpec:
    own = int(x.shape[0] > 1)  # or the batch shares the one that there is
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, h, i: (b * own, 0, 0), memory_space=pltpu.SMEM)


def _fact_spec(x: Array, tile: int) -> pl.BlockSpec:
    own = int(x.shape[0] > 1)
    return pl.BlockSpec((1, x.shape[1], tile), lambda b, h, i: (b * own, 0, i))


def _tile_spec(x: Array | jax.ShapeDtypeStruct, tile: int) -> pl.BlockSpec:
    """Of [batch heads length head_dim], or of float32 [batch heads numbers length]."""
    if _is_along_lanes(x):
        return pl.BlockSpec((1, 1, x.shape[2], tile), lambda b, h, i: (b, h, 0, i))
    return pl.BlockSpec((1, 1, tile, x.shape[3]), lambda b, h, i: (b, h, i, 0))


def _is_along_lanes(x: Array | jax.ShapeDtypeStruct) -> bool:
    return x.shape[2] <= 2


def _buffer(x: Array, tile: int) -> Any:
    """Room for two tiles of an array that the kernel fetches itself."""
    if x.ndim == 3 or _is_along_lanes(x):
        return pltpu.VMEM((2, x.shape[-2], tile), x.dtype)
    return pltpu.VMEM((2, tile, x.shape[3]), x.dtype)


# --- kernels -------------------------------------------------------------------------------------


def _forward_kernel(
    plan: _Plan,
    q_table: Any,
    k_table: Any,
    q_facts: Any,
    q: Any,
    k_facts_hbm: Any,
    k_hbm: Any,
    v_hbm: Any,
    out: Any,
    lse: Any,
    k_facts: Any,
    k: Any,
    v: Any,
    semaphores: Any,
    turned: Any,
    peak: Any,
    total: Any,
    values: Any,
) -> None:
    batch, head, i = (pl.program_id(axis) for axis in range(3))
    _turn_facts(q_facts, turned)
    peak[...] = jnp.full_like(peak, UNSEEN)
    total[...] = jnp.zeros_like(total)
    values[...] = jnp.zeros_like(values)

    def with_keys(j: Array, slot: Array) -> None:
        def compute(seen: Array | None) -> None:
            scores = _scores(plan, q[0, 0], k[slot], seen)
            before = peak[...][:, :1]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights, shrink = jnp.exp(scores - now), jnp.exp(before - now)
            sums = total[...][:, :1] * shrink + weights.sum(axis=1, keepdims=True)
            values[...] = values[...] * shrink + plan.product(
                weights.astype(v.dtype), v[slot], (1, 0)
            )
            peak[...] = jnp.broadcast_to(now, peak.shape)
            total[...] = jnp.broadcast_to(sums, total.shape)

        _if_visible(plan, (q_table, i, turned), (k_table, j, k_facts.at[slot]), compute)

    sources = _key_sources(plan, batch, head, k_facts_hbm, k_hbm, v_hbm)
    _sweep(q_table[0, 0, i], q_table[0, 1, i], sources, (k_facts, k, v), semaphores, with_keys)

    # A NaN is to be seen: the largest of it and a number may be the number, not their sum.
    empty = (peak[...] <= UNSEEN) & jnp.logical_not(jnp.isnan(total[...]))
    sums = jnp.where(empty, 1.0, total[...])
    share = jnp.where(empty, 0.0, 1.0 / sums)
    out[0, 0] = (values[...] * share[:, :1]).astype(out.dtype)
    lse[0, 0] = jnp.where(empty, UNSEEN, peak[...] + jnp.log(sums)).T[:1]


def _dq_kernel(
    plan: _Plan,
    q_table: Any,
    k_table: Any,
    q_facts: Any,
    q: Any,
    d_out: Any,
    numbers: Any,
    k_facts_hbm: Any,
    k_hbm: Any,
    v_hbm: Any,
    dq: Any,
    k_facts: Any,
    k: Any,
    v: Any,
    semaphores: Any,
    turned: Any,
    turned_numbers: Any,
    total: Any,
) -> None:
    batch, head, i = (pl.program_id(axis) for axis in range(3))
    _turn_facts(q_facts, turned)
    for n in range(2):
        turned_numbers[n] = _turned(numbers[0, 0, n : n + 1])
    total[...] = jnp.zeros_like(total)

    def with_keys(j: Array, slot: Array) -> None:
        def compute(seen: Array | None) -> None:
            lse, delta = (turned_numbers[n][:, :1] for n in range(2))
            weights = jnp.exp(_scores(plan, q[0, 0], k[slot], seen) - lse)
            d_weights = plan.product(d_out[0, 0], v[slot], (1, 1))
            d_scores = weights * (d_weights - delta) * plan.scale
            total[...] += plan.product(d_scores.astype(k.dtype), k[slot], (1, 0))

        _if_visible(plan, (q_table, i, turned), (k_table, j, k_facts.at[slot]), compute)

    sources = _key_sources(plan, batch, head, k_facts_hbm, k_hbm, v_hbm)
    _sweep(q_table[0, 0, i], q_table[0, 1, i], sources, (k_facts, k, v), semaphores, with_keys)
    dq[0, 0] = total[...].astype(dq.dtype)


def _dkv_kernel(
    plan: _Plan,
    q_table: Any,
    k_table: Any,
    k_facts: Any,
    k: Any,
    v: Any,
    q_facts_hbm: Any,
    q_hbm: Any,
    d_out_hbm: Any,
    numbers_hbm: Any,
    dk: Any,
    dv: Any,
    q_facts: Any,
    q: Any,
    d_out: Any,
    numbers: Any,
    semaphores: Any,
    turned: Any,
    dk_total: Any,
    dv_total: Any,
) -> None:
    """Here scores stand upright, [keys queries]: what is known of queries lies along the lanes."""
    batch, head, j = (pl.program_id(axis) for axis in range(3))
    _turn_facts(k_facts, turned)
    dk_total[...] = jnp.zeros_like(dk_total)
    dv_total[...] = jnp.zeros_like(dv_total)
    first, last = k_table[0, 0, j], k_table[0, 1, j]
    rows = jnp.maximum(last - first, 1)  # tiles of queries, for each head of the group

    def with_queries(t: Array, slot: Array) -> None:
        i = first + lax.rem(t, rows)

        def compute(seen: Array | None) -> None:
            lse, delta = numbers[slot, 0:1], numbers[slot, 1:2]
            weights = jnp.exp(_scores(plan, k[0, 0], q[slot], seen) - lse)
            dv_total[...] += plan.product(weights.astype(v.dtype), d_out[slot], (1, 0))
            d_weights = plan.product(v[0, 0], d_out[slot], (1, 1))
            d_scores = weights * (d_weights - delta) * plan.scale
            dk_total[...] += plan.product(d_scores.astype(q.dtype), q[slot], (1, 0))

        _if_visible(plan, (q_table, i, q_facts.at[slot]), (k_table, j, turned), compute)

    def at(t: Array) -> tuple[Array, Any]:
        of_group = head * plan.group + lax.div(t, rows)
        return of_group, pl.ds((first + lax.rem(t, rows)) * plan.q_tile, plan.q_tile)

    def rows_of(x: Any) -> Callable[[Array], Any]:
        return lambda t: x.at[batch, at(t)[0], at(t)[1]]

    own = jnp.minimum(batch, q_facts_hbm.shape[0] - 1)
    sources = (
        lambda t: q_facts_hbm.at[own, :, at(t)[1]],
        rows_of(q_hbm),
        rows_of(d_out_hbm),
        lambda t: numbers_hbm.at[batch, at(t)[0], :, at(t)[1]],
    )
    steps = (last - first) * plan.group
    _sweep(jnp.int32(0), steps, sources, (q_facts, q, d_out, numbers), semaphores, with_queries)
    dk[0, 0] = dk_total[...].astype(dk.dtype)
    dv[0, 0] = dv_total[...].astype(dv.dtype)


def _key_sources(
    plan: _Plan, batch: Array, head: Array, k_facts: Any, k: Any, v: Any
) -> tuple[Callable[[Array], Any], ...]:
    """From where a tile of keys is fetched: its facts, keys and values."""
    own, kv_head = jnp.minimum(batch, k_facts.shape[0] - 1), lax.div(head, plan.group)

    def span(j: Array) -> Any:
        return pl.ds(j * plan.k_tile, plan.k_tile)

    return (
        lambda j: k_facts.at[own, :, span(j)],
        lambda j: k.at[batch, kv_head, span(j)],
        lambda j: v.at[batch, kv_head, span(j)],
    )


def _sweep(
    first: Int[Array, ""],
    last: Int[Array, ""],
    sources: tuple[Callable[[Array], Any], ...],
    buffers: tuple[Any, ...],
    semaphores: Any,
    compute: Callable[[Array, Array], None],
) -> None:
    """Fetches tile after tile, each while the one before it is computed."""

    def copies(step: Array, slot: Array) -> list[Any]:
        return [
            pltpu.make_async_copy(source(step), buffer.at[slot], semaphores.at[slot, n])
            for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]

    @pl.when(first < last)
    def _() -> None:
        for copy in copies(first, jnp.int32(0)):
            copy.start()

    def step(at: Array, _: None) -> None:
        slot = lax.rem(at - first, 2)

        @pl.when(at + 1 < last)
        def _() -> None:
            for copy in copies(at + 1, 1 - slot):
                copy.start()

        for copy in copies(at, slot):
            copy.wait()
        compute(at, slot)

    lax.fori_loop(first, last, step, None)


def _if_visible(
    plan: _Plan,
    of_queries: tuple[Any, Array, Any],
    of_keys: tuple[Any, Array, Any],
    compute: Callable[[Array | None], None],
) -> None:
    """Calls `compute` with what is visible of a tile, with `None` if that is all, or not at all.

    Each side is its table, the number of its tile, and its facts: along the lanes, or turned.
    """
    query, key = (
        _range(table, facts, tile)
        for (table, tile, _), facts in ((of_queries, plan.of_queries), (of_keys, plan.of_keys))
    )
    every = plan.mask.sees_all(query, key)
    may = plan.mask.may_see(query, key)
    padded = plan.keys % plan.k_tile != 0
    j = of_keys[1]
    if padded:
        every = every & ((j + 1) * plan.k_tile <= plan.keys)

    @pl.when(every)
    def _() -> None:
        compute(None)

    @pl.when(may & jnp.logical_not(every))
    def _() -> None:
        upright = of_keys[2].shape[-1] == _LANES and len(of_keys[2].shape) == 3
        shape = (plan.k_tile, plan.q_tile) if upright else (plan.q_tile, plan.k_tile)
        facts = (
            how.unpack([_spread(refs, row, shape) for row in range(len(how.is_bool))])
            for how, refs in ((plan.of_queries, of_queries[2]), (plan.of_keys, of_keys[2]))
        )
        seen = jnp.broadcast_to(plan.mask.sees(*facts), shape)
        if padded:
            at = lax.broadcasted_iota(jnp.int32, shape, 0 if upright else 1)
            seen = seen & (j * plan.k_tile + at < plan.keys)

        @pl.when(jnp.max(jnp.where(seen, 1.0, 0.0)) > 0)
        def _() -> None:
            compute(seen)


def _range(table: Any, facts: _Facts, tile: Array) -> tuple[PyTree[Array], PyTree[Array]]:
    rows = range(len(facts.is_bool))
    smallest = facts.unpack([table[0, 2 + row, tile] for row in rows])
    return smallest, facts.unpack([table[0, 2 + facts.rows + row, tile] for row in rows])


def _spread(facts: Any, row: int, shape: tuple[int, int]) -> Array:
    """A fact over a whole tile of scores."""
    if len(facts.shape) == 3:  # turned: [facts tokens lanes]
        return jnp.broadcast_to(facts[row][:, :1], shape)
    return jnp.broadcast_to(facts[row : row + 1], shape)


def _scores(plan: _Plan, rows: Array, columns: Array, seen: Array | None) -> Array:
    scores = plan.product(rows, columns, (1, 1)) * plan.scale
    return scores if seen is None else jnp.where(seen, scores, UNSEEN)


def _turn_facts(facts: Any, turned: Any) -> None:
    for row in range(facts.shape[1]):
        turned[row] = _turned(facts[0, row : row + 1])


def _turned(row: Array) -> Array:
    """From along the lanes, [1 tokens], to down the rows, the same in every lane."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T
