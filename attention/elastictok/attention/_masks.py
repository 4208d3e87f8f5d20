"""Masks as data: who sees whom, without a (queries, keys) array.

A mask says three things, each linear in the length of the sequence:

- what is known of each query and of each key (`of_queries`, `of_keys`), and whether a query of
  which this is known sees a key of which that is known (`sees`): the exact predicate;
- between which keys a tile of queries can see anything at all (`key_bounds`), which lets a kernel
  skip the rest: conservative, so it may name too many keys but never too few;
- the dense picture (`dense`), written independently of the above, as the oracle for both.

Positions, labels and validity may be traced and vmapped: a new offset never recompiles.
"""

import abc
import functools
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

Offset = int | np.integer | Int[Array, ""]
Bounds = tuple[Int[Array, "tiles"], Int[Array, "tiles"]]

# How many (query, key) pairs `count` and `draw` look at in one go: 16 MB of booleans.
_PAIRS_AT_ONCE = 2**24


class AbstractMask(eqx.Module):
    """Which keys each query sees. Combine masks with `&`.

    Everything that is not an array or a number must be a static field. A new mask implements the
    six abstract methods below; `tests/attention` has one suite for all masks.
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

    def visible(
        self, q_indices: Int[Array, "..."], k_indices: Int[Array, "..."]
    ) -> Bool[Array, "..."]:
        """The exact predicate on index arrays that broadcast against each other."""
        seen = self.sees(self.of_queries(q_indices), self.of_keys(k_indices))
        return jnp.broadcast_to(seen, jnp.broadcast_shapes(q_indices.shape, k_indices.shape))

    def count(self, queries: int, keys: int) -> int:
        """The number of visible pairs. Needs a concrete mask; memory is bounded, time is not."""
        return sum(int(strip.sum()) for _, strip in _strips(self, queries, keys))

    def draw(self, queries: int, keys: int, *, width: int = 64) -> str:
        """A small picture: `#` a fully visible cell, `+` a partly visible one, `.` an empty one.

        **Arguments:**

        - `queries`, `keys`: the lengths.
        - `width`: the most characters in a line. One character covers a square of positions.
        """
        cell = -(-max(queries, keys, 1) // width)
        columns = np.arange(0, keys, cell)
        seen = np.zeros((-(-queries // cell), len(columns)), np.int64)
        for start, strip in _strips(self, queries, keys):
            for row, line in enumerate(np.add.reduceat(strip, columns, axis=1, dtype=np.int64)):
                seen[(start + row) // cell] += line
        rows = np.arange(0, queries, cell)
        size = np.diff(rows, append=queries)[:, None] * np.diff(columns, append=keys)
        symbols = np.where(seen == size, "#", np.where(seen > 0, "+", "."))
        return "\n".join("".join(line) for line in symbols)

    def __and__(self, other: "AbstractMask") -> "And":
        """The pairs that both masks let through."""
        return And(_parts(self) + _parts(other))


class AbstractPositional(AbstractMask):
    """A mask on positions: the query at index `i` stands at `i + offset`, key `j` at `j`."""

    offset: eqx.AbstractVar[Offset]

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

    def dense(self, queries: int, keys: int) -> Bool[Array, "{queries} {keys}"]:
        return jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + self.offset

    def of_queries(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices + self.offset

    def of_keys(self, indices: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return indices

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return key <= query

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

    def __str__(self) -> str:
        return " & ".join(map(str, self.masks))


def _parts(mask: AbstractMask) -> tuple[AbstractMask, ...]:
    return mask.masks if isinstance(mask, And) else (mask,)


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


def _strips(mask: AbstractMask, queries: int, keys: int) -> Iterator[tuple[int, np.ndarray]]:
    """The dense mask, a few rows at a time."""
    mask.check(queries, keys)
    rows = max(1, min(queries, _PAIRS_AT_ONCE // max(keys, 1)))
    for start in range(0, queries, rows):
        at = np.minimum(np.arange(start, start + rows), queries - 1)
        yield start, np.asarray(_strip(mask, at, keys))[: queries - start]


@functools.partial(jax.jit, static_argnums=2)
def _strip(mask: AbstractMask, rows: Int[Array, "rows"], keys: int) -> Bool[Array, "rows keys"]:
    return mask.visible(rows[:, None], jnp.arange(keys)[None, :])
