"""Masks: the predicate, the bounds and the count against the dense oracle, and the oracle against
a predicate in plain Python."""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from elastictok.attention import (
    AbstractMask,
    And,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
)
from elastictok.attention._masks import ranges

# Lengths: few, because each compiles.
LENGTHS = [(37, 37), (12, 50), (50, 12), (1, 40)]
TILES = [1, 8, 12, 64]

Make = Callable[[], AbstractMask]
Predicate = Callable[[int, int], bool]


@st.composite
def ids(draw: st.DrawFn, length: int) -> np.ndarray:
    """Labels: documents one after the other, or in any order, or alternating."""
    kind = draw(st.sampled_from(["packed", "packed with padding", "any"]))
    if kind == "any":
        label = st.integers(-2, 3)
        return np.asarray(draw(st.lists(label, min_size=length, max_size=length)), np.int32)
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    labels = np.searchsorted(cuts, np.arange(length), side="right").astype(np.int32) + 1
    if kind == "packed with padding":
        labels[draw(st.integers(0, length)) :] = 0
    return labels


@st.composite
def parts(draw: st.DrawFn, queries: int, keys: int, offset: int) -> tuple[Make, Predicate]:
    """A mask, yet to be made, and what it means."""
    kinds = ["block", "causal", "sliding", "full", "segments", "cross", "valid"]
    kind = draw(st.sampled_from(kinds))
    block, window = draw(st.sampled_from([1, 5, 16])), draw(st.sampled_from([1, 2]))
    if kind == "block":
        return (
            lambda: BlockCausal(block, offset),
            lambda i, j: j // block <= (i + offset) // block,
        )
    if kind == "causal":
        return lambda: Causal(offset), lambda i, j: j <= i + offset
    if kind == "sliding":
        return (
            lambda: SlidingBlocks(block, window, offset),
            lambda i, j: 0 <= (i + offset) // block - j // block < window,
        )
    if kind == "full":
        return Full, lambda i, j: True
    if kind == "valid":
        valid = np.asarray(draw(st.lists(st.booleans(), min_size=keys, max_size=keys)))
        return lambda: KeyValid(valid), lambda i, j: bool(valid[j])
    q_ids, k_ids = draw(ids(queries)), draw(ids(keys))
    if kind == "segments" and queries == keys:
        return lambda: Segments(q_ids), lambda i, j: q_ids[i] == q_ids[j]
    return lambda: Segments(q_ids, k_ids), lambda i, j: q_ids[i] == k_ids[j]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Make, np.ndarray]:
    """A composed mask, yet to be made, and its picture, computed pair by pair."""
    queries, keys = draw(st.sampled_from(LENGTHS))
    offset = draw(st.integers(-20, 60))
    some = [draw(parts(queries, keys, offset)) for _ in range(draw(st.integers(1, 3)))]
    truth = [[all(see(i, j) for _, see in some) for j in range(keys)] for i in range(queries)]
    return lambda: functools.reduce(operator.and_, (make() for make, _ in some)), np.asarray(truth)


@settings(max_examples=15)
@given(masks())
def test_dense_and_visible_are_the_definition(case):
    mask, truth = case[0](), case[1]
    queries, keys = truth.shape
    np.testing.assert_array_equal(mask.dense(queries, keys), truth)
    visible = mask.visible(jnp.arange(queries)[:, None], jnp.arange(keys)[None, :])
    np.testing.assert_array_equal(visible, truth)


@settings(max_examples=15)
@given(masks(), st.integers(0, 2**32 - 1))
def test_visible_takes_any_indices(case, seed):
    mask, truth = case[0](), case[1]
    rng = np.random.default_rng(seed)
    i, j = (rng.integers(0, n, size=(3, 7)) for n in truth.shape)
    np.testing.assert_array_equal(mask.visible(jnp.asarray(i), jnp.asarray(j)), truth[i, j])


@settings(max_examples=15)
@given(masks(), st.sampled_from(TILES))
def test_nothing_is_visible_outside_the_bounds(case, tile):
    mask, truth = case[0](), case[1]
    queries, keys = truth.shape
    start, stop = mask.key_bounds(queries, keys, tile)
    assert start.shape == stop.shape == (-(-queries // tile),)
    outside = np.ones_like(truth)
    for i in range(queries):
        outside[i, max(int(start[i // tile]), 0) : max(int(stop[i // tile]), 0)] = False
    assert not (truth & outside).any()


@settings(max_examples=15)
@given(masks())
def test_count_and_picture(case):
    mask, truth = case[0](), case[1]
    queries, keys = truth.shape
    assert mask.count(queries, keys) == truth.sum()
    lines = mask.draw(queries, keys, width=10).splitlines()
    cell = -(-max(queries, keys) // 10)
    for row, line in enumerate(lines):
        for column, symbol in enumerate(line):
            inside = truth[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert symbol == ("#" if inside.all() else "+" if inside.any() else ".")
    assert len(lines) == -(-queries // cell)
    assert {len(line) for line in lines} == {-(-keys // cell)}


def test_count_looks_into_no_more_tiles_than_it_must(monkeypatch):
    from elastictok.attention import _masks

    looked = []

    def spy(*args):
        looked.append(args)
        return real(*args)

    real = _masks._count_tile
    monkeypatch.setattr(_masks, "_TILE", 16)
    monkeypatch.setattr(_masks, "_count_tile", spy)
    mask = BlockCausal(7) & KeyValid(np.arange(100) < 90)
    assert mask.count(100, 100) == np.asarray(mask.dense(100, 100)).sum()
    assert 0 < len(looked) < 7 + 7 + 7  # the diagonal and where the valid keys end
    looked.clear()
    assert BlockCausal(32).count(128, 128) == 32**2 * 10
    assert Causal().count(0, 10) == Causal().count(10, 0) == 0
    assert not looked


@settings(max_examples=15)
@given(masks(), st.sampled_from(TILES), st.sampled_from(TILES))
def test_ranges_of_facts_never_say_too_little(case, q_tile, k_tile):
    """May a tile hold a visible pair? Is all of it visible? Never "no", or "yes", by mistake."""
    mask, truth = case[0](), case[1]
    queries, keys = truth.shape
    query = ranges(mask.of_queries(jnp.arange(queries)), q_tile)
    key = ranges(mask.of_keys(jnp.arange(keys)), k_tile)
    query = jax.tree.map(lambda x: x[:, None], query)
    shape = (-(-queries // q_tile), -(-keys // k_tile))
    may, every = (np.broadcast_to(ask(query, key), shape) for ask in (mask.may_see, mask.sees_all))
    for i, j in np.ndindex(shape):
        tile = truth[i * q_tile : (i + 1) * q_tile, j * k_tile : (j + 1) * k_tile]
        assert may[i, j] >= tile.any()
        assert every[i, j] <= tile.all()


def test_ranges_of_facts_leave_few_doubts():
    """Away from the diagonal and from the ends of documents nothing is in doubt."""
    mask = SlidingBlocks(16, 2) & Segments(jnp.arange(128) // 64) & KeyValid(jnp.arange(128) < 112)
    query, key = (ranges(f(jnp.arange(128)), 16) for f in (mask.of_queries, mask.of_keys))
    query = jax.tree.map(lambda x: x[:, None], query)
    tiles = np.asarray(mask.dense(128, 128)).reshape(8, 16, 8, 16)
    np.testing.assert_array_equal(mask.may_see(query, key), tiles.any((1, 3)))
    np.testing.assert_array_equal(mask.sees_all(query, key), tiles.all((1, 3)))


def test_a_picture_of_a_long_sequence_looks_at_samples():
    mask = BlockCausal(2**16) & Segments(np.arange(2**20) // 2**18)
    lines = mask.draw(2**20, 2**20, width=16).splitlines()
    truth = np.asarray((BlockCausal(1) & Segments(np.arange(16) // 4)).dense(16, 16))
    assert lines == ["".join("#" if seen else "." for seen in row) for row in truth]


@pytest.mark.parametrize("offset", [-9, 0, 7, 24, 60])
@pytest.mark.parametrize(
    "make", [Causal, lambda at: BlockCausal(5, at), lambda at: SlidingBlocks(5, 2, at)]
)
def test_bounds_of_positions_are_tight(make, offset):
    mask, tile = make(jnp.int32(offset)), 4
    seen = np.asarray(mask.dense(22, 50))
    start, stop = mask.key_bounds(22, 50, tile)
    for number, (first, last) in enumerate(zip(start, stop, strict=True)):
        keys = np.flatnonzero(seen[number * tile : (number + 1) * tile].any(axis=0))
        assert first >= last if len(keys) == 0 else (first, last) == (keys[0], keys[-1] + 1)


def test_bounds_of_packed_documents_are_tight():
    """What makes packing cheap: a tile of a document meets that document alone."""
    ids = jnp.repeat(jnp.asarray([7, 3, 3, 0, 5]), 20)  # 100 tokens, labels in no order
    start, stop = (BlockCausal(10) & Segments(ids)).key_bounds(100, 100, 10)
    np.testing.assert_array_equal(start, [0, 0, 20, 20, 20, 20, 60, 60, 80, 80])
    np.testing.assert_array_equal(stop, np.arange(10, 101, 10))


def test_bounds_of_a_half_filled_cache_are_tight():
    mask = BlockCausal(8, offset=jnp.int32(24)) & KeyValid(jnp.arange(200) < 32)
    assert [int(x[0]) for x in mask.key_bounds(8, 200, 8)] == [0, 32]
    start, stop = SlidingBlocks(8, 2, offset=24).key_bounds(8, 200, 8)
    assert [int(start[0]), int(stop[0])] == [16, 32]


def test_bounds_where_nothing_is_visible():
    for mask in (
        KeyValid(np.zeros(20, bool)),
        Segments(np.zeros(10, int), np.ones(20, int)),
        Causal(offset=-30),
        Segments(np.zeros(10, int), np.arange(20) // 10) & KeyValid(np.arange(20) >= 10),
    ):
        start, stop = mask.key_bounds(10, 20, 4)
        assert (np.asarray(start) >= np.asarray(stop)).all()


def test_offset_labels_and_validity_may_be_traced_and_batched():
    def bounds(offset, ids, valid):
        mask = BlockCausal(4, offset) & Segments(ids) & KeyValid(valid)
        return mask.key_bounds(24, 24, 6), mask.dense(24, 24)

    rng = np.random.default_rng(0)
    args = (
        jnp.asarray([0, 3, -5]),
        jnp.asarray(rng.integers(0, 3, (3, 24))),
        jnp.asarray(rng.integers(0, 2, (3, 24)) > 0),
    )
    batched = jax.jit(jax.vmap(bounds))(*args)
    for i in range(3):
        alone = bounds(*(x[i] for x in args))
        jax.tree.map(lambda b, a, i=i: np.testing.assert_array_equal(b[i], a), batched, alone)


def test_bounds_need_no_quadratic_array():
    length = 4096

    def bounds(offset, ids, valid):
        mask = SlidingBlocks(512, 4, offset) & BlockCausal(512, offset) & Segments(ids)
        return (mask & KeyValid(valid) & Causal(offset) & Full()).key_bounds(length, length, 512)

    shapes = jax.make_jaxpr(bounds)(
        jnp.int32(0), jnp.zeros(length, jnp.int32), jnp.ones(length, bool)
    )
    assert _largest(shapes.jaxpr) <= 4 * length


def _largest(jaxpr) -> int:
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "size")]
        sizes += [_largest(inner) for inner in jaxprs_in_params(eqn.params)]
    return max(sizes)


def test_and_is_flat_and_readable():
    a, b, c = BlockCausal(4), Full(), KeyValid(np.ones(3, bool))
    mask = (a & b) & (c & a)
    assert isinstance(mask, And)
    assert mask.masks == (a, b, c, a)


def test_a_mask_prints_its_picture():
    assert str(BlockCausal(8)).splitlines() == [
        "BlockCausal(block=8), 32 queries (down) x 32 keys (across)",
        *["####............"] * 4,
        *["########........"] * 4,
        *["############...."] * 4,
        *["################"] * 4,
    ]
    both = str(BlockCausal(2, offset=2) & Segments([1, 1, 2, 2], [0, 0, 1, 1, 2, 2]))
    assert both.splitlines()[1:] == ["..##..", "..##..", "....##", "....##"]
    assert both.startswith("BlockCausal(block=2, offset=2) & Segments(")
    cache = SlidingBlocks(4, 2, offset=jnp.int32(8)) & KeyValid(np.arange(24) < 14)
    lines = str(cache).splitlines()
    assert "16 queries (down) x 24 keys (across)" in lines[0]
    assert lines[1] == "..####......"
    assert lines[5] == "......#....."
    assert [len(lines), lines[-1]] == [1 + 8, "............"]
    said = []
    jax.eval_shape(lambda at: said.append(str(Causal(at))), 1)
    assert said[0].startswith("Causal(offset=")
    assert said[0].endswith("(traced: no picture)")


def test_two_offsets_in_one_mask_are_an_error():
    with pytest.raises(ValueError, match=r"BlockCausal has offset 8 and Causal has offset 0.*same"):
        BlockCausal(4, offset=8) & Causal()
    with pytest.raises(ValueError, match="offset"):
        BlockCausal(4, offset=jnp.int32(8)) & Full() & SlidingBlocks(4, 2, offset=9)
    assert (BlockCausal(4, offset=8) & Causal(jnp.int32(8))).count(2, 20) == 9 + 10

    def traced(offset, other):
        same = BlockCausal(4, offset) & SlidingBlocks(4, 2, offset)
        return same.dense(2, 20).sum(), (Causal(offset) & Causal(other)).dense(2, 20).sum()

    assert [int(n) for n in jax.jit(traced)(8, 8)] == [16, 9 + 10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockCausal(0), "block is 0 tokens; it must be at least 1"),
        (lambda: SlidingBlocks(-1, 1), "block is -1"),
        (lambda: SlidingBlocks(4, 0), "window is 0 blocks; it must be at least 1"),
    ],
)
def test_impossible_masks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Segments(np.zeros(9, int)), r"q_ids has shape \(9,\) but there are 10 queries.*per query"),
        (Segments(np.zeros(10, int)), r"k_ids has shape \(10,\) but there are 12 keys.*one entry"),
        (Segments(np.zeros(10, int), np.zeros(3, int)), r"k_ids has shape \(3,\)"),
        (KeyValid(np.ones(10, bool)), r"valid has shape \(10,\) but there are 12 keys.*per key"),
        (Full() & KeyValid(np.ones(10, bool)), r"valid has shape \(10,\)"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    for use in (mask.check, mask.dense, mask.count, mask.draw):
        with pytest.raises(ValueError, match=message):
            use(10, 12)
