"""Checks for masks and backends of your own: what this package asks of its own ones.

Plain functions that raise an `AssertionError`; call them in a test of any framework.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from elastictok.attention._attention import attention
from elastictok.attention._backend import AbstractBackend
from elastictok.attention._masks import (
    AbstractMask,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
    ranges,
)
from elastictok.attention._reference import Reference

# Of the largest value of the reference: of the output, and of all gradients together.
TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-2}


def check_mask(mask: AbstractMask, queries: int, keys: int) -> None:
    """Checks that what a mask tells the kernels agrees with its dense picture.

    **Arguments:**

    - `mask`: the mask, with concrete arrays.
    - `queries`, `keys`: the lengths. Short ones will do; let them be no multiples of each other.

    **Raises:**

    `AssertionError` that names the method and where it is wrong.
    """
    dense = np.asarray(mask.dense(queries, keys))
    assert dense.shape == (queries, keys), f"dense has shape {dense.shape}"
    assert dense.dtype == np.bool_, f"dense has type {dense.dtype}"
    i, j = jnp.arange(queries), jnp.arange(keys)
    visible = np.asarray(mask.visible(i[:, None], j[None, :]))
    _agree("of_queries, of_keys and sees", visible, dense)
    for tile in (1, 3, 8, max(queries, keys)):
        start, stop = (np.asarray(x) for x in mask.key_bounds(queries, keys, tile))
        tiles = -(-queries // tile)
        assert start.shape == stop.shape == (tiles,), f"key_bounds: {start.shape} for {tiles} tiles"
        rows = np.arange(queries) // tile
        inside = (np.arange(keys) >= start[rows, None]) & (np.arange(keys) < stop[rows, None])
        _agree(f"key_bounds with tile {tile}", dense & inside, dense)
        query = jax.tree.map(lambda x: x[:, None], ranges(mask.of_queries(i), tile))
        key = ranges(mask.of_keys(j), tile)
        shape = (tiles, -(-keys // tile))
        may, every = (
            np.broadcast_to(ask(query, key), shape)[np.ix_(rows, np.arange(keys) // tile)]
            for ask in (mask.may_see, mask.sees_all)
        )
        _agree(f"may_see with tile {tile}", dense & may, dense)
        _agree(f"sees_all with tile {tile}", dense | every, dense)


def _agree(what: str, ours: np.ndarray, dense: np.ndarray) -> None:
    wrong = np.argwhere(ours != dense)
    if len(wrong):
        query, key = wrong[0]
        raise AssertionError(
            f"{what}: disagrees with dense at {len(wrong)} of {dense.size} pairs, first at query "
            f"{query} and key {key}, which dense says is "
            f"{'visible' if dense[query, key] else 'hidden'}"
        )


def check_backend(
    backend: AbstractBackend,
    *,
    cases: int = 10,
    seed: int = 0,
    longest: int = 150,
    head_dims: Sequence[int] = (32, 64, 128, 256),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> int:
    """Checks a backend's values and gradients against the reference on random calls.

    Lengths, grouped heads, types and compositions of masks are drawn; every third case runs as a
    batch, as the gradient of a batch and as a batch of gradients. Calls that the backend has
    reasons against are passed over.

    **Arguments:**

    - `backend`: the backend; it need not be registered.
    - `cases`: how many calls to draw. Each compiles.
    - `seed`: of what is drawn: the same seed draws the same calls.
    - `longest`: the longest length.
    - `head_dims`, `dtypes`: what to choose from.

    **Returns:**

    How many of the calls ran.

    **Raises:**

    `AssertionError` that names the call and the error, or if not one call could run.
    """
    rng = np.random.default_rng(seed)
    ran = 0
    for number in range(cases):
        queries, keys = (int(n) for n in rng.integers(1, longest + 1, 2))
        if rng.random() < 0.5:
            keys = queries
        kv_heads, group = (int(n) for n in rng.integers(1, 3, 2))
        head_dim, dtype = int(rng.choice(head_dims)), str(rng.choice(dtypes))
        mask = _random_mask(rng, queries, keys)
        batch = (2,) if number % 3 == 2 else ()
        q, d_out = (
            jnp.asarray(rng.normal(size=(*batch, queries, kv_heads * group, head_dim)), dtype)
            for _ in range(2)
        )
        k, v = (
            jnp.asarray(rng.normal(size=(*batch, keys, kv_heads, head_dim)), dtype)
            for _ in range(2)
        )
        one_q, one_k = (jax.ShapeDtypeStruct(x.shape[len(batch) :], x.dtype) for x in (q, k))
        if backend.reasons_against(one_q, one_k, one_k, mask):
            continue
        ran += 1
        call = f"q {q.shape}, k {k.shape}, {dtype}, {eqx.tree_pformat(mask, width=1000)}"
        exact = tuple(x.astype(jnp.float32) for x in (q, k, v, d_out))
        theirs = _run(Reference(), bool(batch), False, exact, mask)
        for inside in (False, True) if batch else (False,):
            ours = _run(backend, bool(batch), inside, (q, k, v, d_out), mask)
            how = "" if not batch else ", a batch of gradients" if inside else ", grad of a batch"
            for what, a, b in zip(("output", "gradient"), ours, theirs, strict=True):
                _close(f"{what} of {call}{how}", a, b, TOLERANCES[dtype])
    assert ran, f"{backend.name} has reasons against every one of {cases} calls"
    return ran


def _run(
    backend: AbstractBackend, batched: bool, inside: bool, arrays: tuple[Any, ...], mask: Any
) -> tuple[Any, Any]:
    """Output and gradients: of one call, of a batch as a whole, or of each example of a batch."""

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return attention(q, k, v, mask, implementation=backend)

    def pull(attend: Any, q: Any, k: Any, v: Any, d_out: Any, mask: Any) -> tuple[Any, Any]:
        out, back = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
        return out, back(d_out)

    if not batched:
        run = functools.partial(pull, attend)
    elif inside:
        run = jax.vmap(functools.partial(pull, attend), in_axes=(0, 0, 0, 0, None))
    else:
        run = functools.partial(pull, jax.vmap(attend, in_axes=(0, 0, 0, None)))
    return jax.jit(run)(*arrays, mask)


def _close(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    a, b = ([np.asarray(x, np.float64) for x in jax.tree.leaves(y)] for y in (ours, theirs))
    largest = max(np.abs(x).max() for x in b)
    error = max(np.abs(x - y).max() for x, y in zip(a, b, strict=True))
    if not error <= tolerance * largest:  # also where it is NaN
        raise AssertionError(
            f"{what}: off by {error:.3g}, {error / max(largest, 1e-30):.3g} of the largest value; "
            f"the limit is {tolerance:g}"
        )


def _random_mask(rng: np.random.Generator, queries: int, keys: int) -> AbstractMask:
    block, offset = int(rng.choice([1, 7, 16, 32])), jnp.int32(rng.integers(-10, keys + 10))

    def labels(length: int) -> np.ndarray:
        cuts = np.sort(rng.integers(0, length + 1, 3))
        ids = np.searchsorted(cuts, np.arange(length), side="right") * 3 % 5
        return rng.permutation(ids) if rng.random() < 0.3 else ids

    def valid() -> np.ndarray:
        holes = rng.random(keys) < 0.8 if rng.random() < 0.5 else np.ones(keys, bool)
        return holes & (np.arange(keys) < rng.integers(0, keys + 1))

    makers = [
        Full,
        lambda: Causal(offset),
        lambda: BlockCausal(block, offset),
        lambda: SlidingBlocks(block, int(rng.integers(1, 4)), offset),
        lambda: Segments(labels(queries), labels(keys)),
        lambda: KeyValid(valid()),
    ]
    chosen = rng.choice(len(makers), size=int(rng.integers(1, 4)), replace=False)
    return functools.reduce(operator.and_, (makers[n]() for n in chosen))
