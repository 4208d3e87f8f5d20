"""Masks as data: who sees whom, without a (queries, keys) array.

A mask says three things, none of them more than linear in the length of the sequence:

- what is known of each query and of each key (`of_queries`, `of_keys`), and whether a query of
  which this is known sees a key of which that is known (`sees`): the exact predicate;
- between which keys a tile of queries can see anything at all (`key_bounds`), and whether some or
  every pair of a tile is visible given the range of its facts (`may_see`, `sees_all`), which lets a
  kernel skip the rest: conservative, so it may name too many keys but never too few;
- the dense picture (`dense`), written independently of the above, as the oracle for both.

Positions, labels and validity may be traced and vmapped: a new offset never recompiles.
"""

import abc
import functools

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

Offset = int | np.integer | Int[Array, ""]
Bounds = tuple[Int[Array, "tiles"], Int[Array, "tiles"]]
# The smallest and the largest of what is known of the queries, or the keys, of a tile.
Range = tuple[PyTree[Array], PyTree[Array]]

# Queries, and keys, that `count` looks at in one go.
_TILE = 512


class AbstractMask(eqx.Module):
    """Which keys each query sees. Combine masks with `&`.

    Everything that is not an array or a number must be a static field. A new mask implements the
    six abstract methods below, and `may_see` and `sees_all` if kernels are to skip more tiles than
    `key_bounds` spares them. `docs/attention.md` shows one from beginning to end.
    """

    @abc.abstractmethod
    def check(self, queries: int, keys: int) -> None:
        """Raises a `ValueError` if the mask does not fit that many queries and keys."""

    @abc.abstractmethod
    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        """The whole mask as one array: the oracle, for short sequences and tests."""

    @abc.abstractmethod
    def of_queries(self, indices: Int[Array, "*shape"]) -> PyTree[Array]:
        """What the mask knows of the queries at these indices: arrays of the shape of `indices`."""

    @abc.abstractmethod
    def of_keys(self, indices: Int[Array, "*shape"]) -> PyTree[Array]:
        """What the mask knows of the keys at these indices: arrays of the shape of `indices`."""

    @abc.abstractmethod
    def sees(self, query: PyTree[Array], key: PyTree[Array]) -> Bool[Array, "..."]:
        """Whether a query of which `query` is known sees a key of which `key` is known.

        Elementwise with broadcasting, and from the facts alone, because a kernel calls it on the
        facts of one tile: it may use the mask's static fields but not its arrays. The result may be
        smaller than the tile if it broadcasts to it.
        """

    @abc.abstractmethod
    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        """Between which keys each tile of queries can see anything.

        **Arguments:**

        - `queries`, `keys`: the lengths.
        - `tile`: queries per tile. The last tile may be partly filled.

        **Returns:**

        `(start, stop)`, one entry per tile: a query of the tile sees no key before `start` and none
        from `stop` on. A tile that sees nothing has `start >= stop`.
        """

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        """Whether a tile may hold a visible pair, given the range of its facts.

        Elementwise with broadcasting, like `sees`, and as conservative as `key_bounds`: true where
        in doubt. Order is that of the numbers, and false comes before true.

        **Arguments:**

        - `query`: the smallest and the largest of each fact over the tile's queries.
        - `key`: the same over its keys.
        """
        return jnp.ones((), bool)

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        """Whether all pairs of a tile are visible, given the range of its facts: false where in
        doubt. Where true, a kernel does not ask `sees`.
        """
        return jnp.zeros((), bool)

    def visible(
        self, q_indices: Int[Array, "..."], k_indices: Int[Array, "..."]
    ) -> Bool[Array, "..."]:
        """The exact predicate on index arrays that broadcast against each other."""
        seen = self.sees(self.of_queries(q_indices), self.of_keys(k_indices))
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(q_indices.shape, k_indices.shape))

    def count(self, queries: int, keys: int) -> int:
        """The number of visible pairs. Needs a concrete mask.

        Looks into a tile of `512 x 512` pairs only where the range of its facts leaves a doubt:
        the time grows with the tiles on the edges of what is visible.
        """
        self.check(queries, keys)
        if queries == 0 or keys == 0:
            return 0
        tile = _TILE
        rows, columns = (np.arange(0, n, tile) for n in (queries, keys))
        sizes = (np.minimum(tile, n - at) for n, at in ((queries, rows), (keys, columns)))
        pairs = functools.reduce(np.multiply.outer, sizes)
        some, every = (np.broadcast_to(x, pairs.shape) for x in _doubt(self, queries, keys, tile))
        total = int(pairs[every].sum())
        for i, j in np.argwhere(some & ~every):
            total += int(_count_tile(self, rows[i], columns[j], queries, keys, tile))
        return total

    def draw(self, queries: int, keys: int, *, width: int = 64) -> str:
        """A small picture: `#` a fully visible cell, `+` a partly visible one, `.` an empty one.

        **Arguments:**

        - `queries`, `keys`: the lengths.
        - `width`: the most characters in a line. One character covers a square of positions, of
          which at most 32 x 32, evenly spread, are looked at.
        """
        self.check(queries, keys)
        cell = -(-max(queries, keys, 1) // width)
        rows, row_starts = _samples(queries, cell)
        columns, column_starts = _samples(keys, cell)
        if len(rows) == 0 or len(columns) == 0:
            return "\n".join("" for _ in row_starts)
        seen = np.asarray(_visible(self, rows[:, None], columns[None, :]))
        every, some = (
            np.asarray(
                ufunc.reduceat(ufunc.reduceat(seen, row_starts, axis=0), column_starts, axis=1)
            )
            for ufunc in (np.logical_and, np.logical_or)
        )
        symbols = np.where(every, "#", np.where(some, "+", "."))
        return "\n".join("".join(line) for line in symbols)

    def granularity(self) -> int:
        """Tokens in a row that the mask treats alike, such as a block; 1 if it knows of none. What
        good tile sizes depend on, and nothing else.
        """
        return 1

    def extent(self) -> tuple[int | None, int | None]:
        """The numbers of queries and keys that the mask is made for; `None` where any will do."""
        return None, None

    def __str__(self) -> str:
        """The parts, and a picture at the mask's own lengths or at some that show its shape."""
        title = " & ".join(map(repr, _parts(self)))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return f"{title} (traced: no picture)"
        queries, keys = _lengths_to_show(self)
        drawn = self.draw(queries, keys, width=16)
        return f"{title}, {queries} queries (down) x {keys} keys (across)\n{drawn}"

    def __and__(self, other: "AbstractMask") -> "And":
        """The pairs that both masks let through."""
        return And(_parts(self) + _parts(other))


class AbstractPositional(AbstractMask):
    """A mask on positions: the query at index `i` stands at `i + offset`, key `j` at `j`."""

    offset: eqx.AbstractVar[Offset]

    @abc.abstractmethod
    def few(self) -> int:
        """So many tokens that a picture of them shows what the mask does."""

    def check(self, queries: int, keys: int) -> None:
        pass  # any lengths do


def _offset(value: Offset) -> int | Int[Array, ""]:
    return value if isinstance(value, int) else jnp.asarray(value)


class Causal(AbstractPositional):
    """A query sees the keys up to its own position.

    **Arguments:**

    - `offset`: the position of the first query among the keys. An array may be traced.
    """

    offset: Offset = eqx.field(default=0, converter=_offset)

    def few(self) -> int:
        return 16

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        return jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + self.offset

    def of_queries(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices + self.offset

    def of_keys(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return key <= query

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[0] <= query[1]

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[1] <= query[0]

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        _, last = _first_and_last(queries, tile)
        return _clip(jnp.zeros_like(last), last + self.offset + 1, keys)


class BlockCausal(AbstractPositional):
    """A query sees the whole of its own block and of every earlier one.

    This is the mask of ElasticTok (arXiv 2410.08368, section 3.2): the tokens of a block of frames
    see each other in both directions, and the past.

    **Arguments:**

    - `block`: tokens per block.
    - `offset`: the position of the first query among the keys, for queries that meet a cache of
      earlier keys. An array may be traced: moving through a cache does not recompile.
    """

    block: int = eqx.field(static=True)
    offset: Offset = eqx.field(default=0, converter=_offset)

    def __check_init__(self) -> None:
        _check_block(self.block)

    def granularity(self) -> int:
        return self.block

    def few(self) -> int:
        return 4 * self.block

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        query_block = (jnp.arange(queries) + self.offset) // self.block
        key_block = jnp.arange(keys) // self.block
        return key_block[None, :] <= query_block[:, None]

    def of_queries(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return (indices + self.offset) // self.block

    def of_keys(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices // self.block

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return key <= query

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[0] <= query[1]

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[1] <= query[0]

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        _, last = _first_and_last(queries, tile)
        return _clip(jnp.zeros_like(last), (self.of_queries(last) + 1) * self.block, keys)


class SlidingBlocks(AbstractPositional):
    """A query sees its own block and the `window - 1` blocks before it.

    **Arguments:**

    - `block`: tokens per block.
    - `window`: blocks seen, the query's own included.
    - `offset`: the position of the first query among the keys. An array may be traced.
    """

    block: int = eqx.field(static=True)
    window: int = eqx.field(static=True)
    offset: Offset = eqx.field(default=0, converter=_offset)

    def __check_init__(self) -> None:
        _check_block(self.block)
        if self.window < 1:
            raise ValueError(
                f"window is {self.window} blocks; it must be at least 1, the query's own block"
            )

    def granularity(self) -> int:
        return self.block

    def few(self) -> int:
        return (self.window + 2) * self.block

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        query_block = ((jnp.arange(queries) + self.offset) // self.block)[:, None]
        key_block = (jnp.arange(keys) // self.block)[None, :]
        return (key_block <= query_block) & (key_block > query_block - self.window)

    def of_queries(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return (indices + self.offset) // self.block

    def of_keys(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices // self.block

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key <= query) & (query - key < self.window)

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return (key[0] <= query[1]) & (query[0] - key[1] < self.window)

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return (key[1] <= query[0]) & (query[1] - key[0] < self.window)

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        first, last = (self.of_queries(end) for end in _first_and_last(queries, tile))
        return _clip((first - self.window + 1) * self.block, (last + 1) * self.block, keys)


class Full(AbstractMask):
    """Every query sees every key."""

    def check(self, queries: int, keys: int) -> None:
        pass  # any lengths do

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        return jnp.ones((queries, keys), bool)

    def of_queries(self, indices: Int[Array, "*shape"]) -> PyTree[Array]:
        return ()

    def of_keys(self, indices: Int[Array, "*shape"]) -> PyTree[Array]:
        return ()

    def sees(self, query: PyTree[Array], key: PyTree[Array]) -> Bool[Array, "..."]:
        return jnp.ones((), bool)

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return jnp.ones((), bool)

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        _, last = _first_and_last(queries, tile)
        return jnp.zeros_like(last), jnp.full_like(last, keys)


class Segments(AbstractMask):
    """A query sees the keys of its own segment: documents packed into one sequence stay apart.

    Labels are compared and nothing else: 0 is an ordinary label, and a segment need not be
    contiguous. Padding is the business of `KeyValid`.

    **Arguments:**

    - `q_ids`: the segment of each query.
    - `k_ids`: the segment of each key. Default: as the queries.
    """

    q_ids: Int[Array, "tokens"] = eqx.field(converter=jnp.asarray)
    k_ids: Int[Array, "keys"] | None = eqx.field(
        default=None, converter=lambda ids: None if ids is None else jnp.asarray(ids)
    )

    def check(self, queries: int, keys: int) -> None:
        _check_length("Segments.q_ids", "queries", self.q_ids, queries)
        _check_length("Segments.k_ids", "keys", self._key_ids(), keys)

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        self.check(queries, keys)
        return self.q_ids[:, None] == self._key_ids()[None, :]

    def of_queries(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return self.q_ids[indices]

    def of_keys(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return self._key_ids()[indices]

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return query == key

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return (query[0] <= key[1]) & (key[0] <= query[1])

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return (query[0] == query[1]) & (key[0] == key[1]) & (query[0] == key[0])

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        # A stable sort puts the keys of one segment side by side, the first one first and the last
        # one last: exact for every label, whatever their order. O(S log S), and S small integers.
        order = jnp.argsort(self._key_ids(), stable=True)
        labels = self._key_ids()[order]
        begin = jnp.searchsorted(labels, self.q_ids, side="left")
        end = jnp.searchsorted(labels, self.q_ids, side="right")
        present = begin < end
        first = jnp.where(present, order[jnp.minimum(begin, keys - 1)], keys)
        last = jnp.where(present, order[jnp.maximum(end, 1) - 1], -1)
        fill = (0, -queries % tile)
        first = jnp.pad(first, fill, constant_values=keys).reshape(-1, tile)
        last = jnp.pad(last, fill, constant_values=-1).reshape(-1, tile)
        return first.min(axis=1), last.max(axis=1) + 1

    def extent(self) -> tuple[int | None, int | None]:
        return len(self.q_ids), len(self._key_ids())

    def _key_ids(self) -> Int[Array, "keys"]:
        return self.q_ids if self.k_ids is None else self.k_ids


class KeyValid(AbstractMask):
    """Only the marked keys are seen: padding, or the unwritten rest of a cache.

    The keys and values at the other positions contribute nothing, but must be finite.

    **Arguments:**

    - `valid`: true where a key may be seen.
    """

    valid: Bool[Array, "keys"] = eqx.field(converter=jnp.asarray)

    def check(self, queries: int, keys: int) -> None:
        _check_length("KeyValid.valid", "keys", self.valid, keys)

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        self.check(queries, keys)
        return jnp.tile(self.valid, (queries, 1))

    def of_queries(self, indices: Int[Array, "*shape"]) -> PyTree[Array]:
        return ()

    def of_keys(self, indices: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        return self.valid[indices]

    def sees(self, query: PyTree[Array], key: Bool[Array, "..."]) -> Bool[Array, "..."]:
        return key

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[1]

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        return key[0]

    def extent(self) -> tuple[int | None, int | None]:
        return None, len(self.valid)

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        where = jnp.arange(keys)
        start = jnp.min(jnp.where(self.valid, where, keys), initial=keys)
        stop = jnp.max(jnp.where(self.valid, where + 1, 0), initial=0)
        tiles = -(-queries // tile)
        return jnp.full(tiles, start), jnp.full(tiles, stop)


class And(AbstractMask):
    """What all of several masks let through: what `&` makes.

    **Arguments:**

    - `masks`: the parts.

    **Raises:**

    `ValueError` if two parts put the queries at different (known) offsets: a mask speaks of one
    placement of the queries among the keys.
    """

    masks: tuple[AbstractMask, ...]

    def __check_init__(self) -> None:
        offsets = [
            (part, part.offset) for part in self.masks if isinstance(part, AbstractPositional)
        ]
        known = [(part, int(at)) for part, at in offsets if not isinstance(at, jax.core.Tracer)]
        for part, at in known[1:]:
            if at != known[0][1]:
                raise ValueError(
                    f"{type(known[0][0]).__name__} has offset {known[0][1]} and "
                    f"{type(part).__name__} has offset {at}; the queries of one mask stand at one "
                    "offset: give both the same"
                )

    def check(self, queries: int, keys: int) -> None:
        for part in self.masks:
            part.check(queries, keys)

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        dense = jnp.ones((queries, keys), bool)
        for part in self.masks:
            dense &= part.dense(queries, keys)
        return dense

    def of_queries(self, indices: Int[Array, "*shape"]) -> tuple[PyTree[Array], ...]:
        return tuple(part.of_queries(indices) for part in self.masks)

    def of_keys(self, indices: Int[Array, "*shape"]) -> tuple[PyTree[Array], ...]:
        return tuple(part.of_keys(indices) for part in self.masks)

    def sees(
        self, query: tuple[PyTree[Array], ...], key: tuple[PyTree[Array], ...]
    ) -> Bool[Array, "..."]:
        parts = zip(self.masks, query, key, strict=True)
        return functools.reduce(jnp.logical_and, (part.sees(q, k) for part, q, k in parts))

    def key_bounds(self, queries: int, keys: int, tile: int) -> Bounds:
        starts, stops = zip(
            *(part.key_bounds(queries, keys, tile) for part in self.masks), strict=True
        )
        return functools.reduce(jnp.maximum, starts), functools.reduce(jnp.minimum, stops)

    def may_see(self, query: Range, key: Range) -> Bool[Array, "..."]:
        tiles = zip(self.masks, *query, *key, strict=True)
        return functools.reduce(
            jnp.logical_and, (part.may_see((a, b), (c, d)) for part, a, b, c, d in tiles)
        )

    def sees_all(self, query: Range, key: Range) -> Bool[Array, "..."]:
        tiles = zip(self.masks, *query, *key, strict=True)
        return functools.reduce(
            jnp.logical_and, (part.sees_all((a, b), (c, d)) for part, a, b, c, d in tiles)
        )

    def granularity(self) -> int:
        return max(part.granularity() for part in self.masks)

    def extent(self) -> tuple[int | None, int | None]:
        some = [part.extent() for part in self.masks]
        queries, keys = (
            next((n for n in side if n is not None), None) for side in zip(*some, strict=True)
        )
        return queries, keys


def _parts(mask: AbstractMask) -> tuple[AbstractMask, ...]:
    return mask.masks if isinstance(mask, And) else (mask,)


def _lengths_to_show(mask: AbstractMask) -> tuple[int, int]:
    """The lengths that a mask is made for, or a few blocks."""
    queries, keys = mask.extent()
    positional = [part for part in _parts(mask) if isinstance(part, AbstractPositional)]
    offset = max([int(part.offset) for part in positional], default=0)
    if queries is None:
        few = max([part.few() for part in positional], default=8)
        queries = few if keys is None else max(min(few, keys - offset), 1)
    return queries, max(queries + offset, 1) if keys is None else keys


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"block is {block} tokens; it must be at least 1")


def _check_length(name: str, noun: str, array: Array, expected: int) -> None:
    if array.shape != (expected,):
        raise ValueError(
            f"{name} has shape {array.shape} but there are {expected} {noun}; give one entry per "
            f"{noun.removesuffix('s') if noun != 'queries' else 'query'}, and batch with jax.vmap"
        )


def _first_and_last(queries: int, tile: int) -> tuple[Int[Array, "tiles"], Int[Array, "tiles"]]:
    """The first and the last query of each tile."""
    first = jnp.arange(0, queries, tile)
    return first, jnp.minimum(first + tile, queries) - 1


def _clip(start: Int[Array, "tiles"], stop: Int[Array, "tiles"], keys: int) -> Bounds:
    return jnp.clip(start, 0, keys), jnp.clip(stop, 0, keys)


def ranges(facts: PyTree[Array], tile: int) -> Range:
    """The smallest and the largest fact of each tile: from [... length] to [... tiles]."""

    def cut(x: Array) -> Array:
        last = -x.shape[-1] % tile  # repeats the last one, which changes neither
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, last)], mode="edge")
        return x.reshape(*x.shape[:-1], -1, tile)

    tiles = jax.tree.map(cut, facts)
    return jax.tree.map(lambda x: x.min(-1), tiles), jax.tree.map(lambda x: x.max(-1), tiles)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _doubt(
    mask: AbstractMask, queries: int, keys: int, tile: int
) -> tuple[Bool[Array, "..."], Bool[Array, "..."]]:
    """Of each tile, whether it may hold a visible pair, and whether it holds no other."""
    query = ranges(mask.of_queries(jnp.arange(queries)), tile)
    key = ranges(mask.of_keys(jnp.arange(keys)), tile)
    query = jax.tree.map(lambda x: x[:, None], query)
    return mask.may_see(query, key), mask.sees_all(query, key)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _count_tile(
    mask: AbstractMask, row: Array, column: Array, queries: int, keys: int, tile: int
) -> Int[Array, ""]:
    rows, columns = row + jnp.arange(tile)[:, None], column + jnp.arange(tile)[None, :]
    seen = mask.visible(jnp.minimum(rows, queries - 1), jnp.minimum(columns, keys - 1))
    return (seen & (rows < queries) & (columns < keys)).sum()


def _samples(length: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in every cell, its first and its last among them, and where each cell's begin."""
    starts = np.arange(0, length, cell)
    stops = np.minimum(starts + cell, length)
    each = [
        np.unique(np.linspace(a, b - 1, min(b - a, 32)).astype(int))
        for a, b in zip(starts, stops, strict=True)
    ]
    begins = np.cumsum([0, *map(len, each)])[:-1]
    return np.concatenate([np.empty(0, int), *each]), begins


@jax.jit
def _visible(mask: AbstractMask, rows: Array, columns: Array) -> Bool[Array, "..."]:
    return mask.visible(rows, columns)
