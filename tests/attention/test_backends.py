"""One suite for every registered backend, against the reference; the reference against a loop.

Each combination of a mask's structure and a shape compiles, so there are few; what is drawn are the
values: offsets, labels, validity and the arrays.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.attention import (
    AbstractMask,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
    attention,
)


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], AbstractMask]


CASES = {
    "packed": Case(
        100, 100, 4, 2, 16, lambda at, q, k, ok: BlockCausal(16, at) & Segments(q) & KeyValid(ok)
    ),
    "cache": Case(33, 136, 4, 1, 8, lambda at, q, k, ok: BlockCausal(16, at) & KeyValid(ok)),
    "cross": Case(70, 120, 2, 2, 16, lambda at, q, k, ok: SlidingBlocks(8, 3, at) & Segments(q, k)),
    "causal": Case(64, 64, 2, 1, 24, lambda at, q, k, ok: Causal(at)),
    "valid": Case(50, 90, 1, 1, 8, lambda at, q, k, ok: KeyValid(ok)),
}
LONGEST = 136

Facts = tuple[np.int32, np.ndarray, np.ndarray, np.ndarray]


@st.composite
def labels(draw: st.DrawFn) -> np.ndarray:
    """Documents one after the other, with or without padding after them, or in any order."""
    cuts = draw(st.lists(st.integers(0, LONGEST), max_size=5))
    label = np.searchsorted(sorted(cuts), np.arange(LONGEST), side="right").astype(np.int32) + 1
    label[draw(st.integers(0, LONGEST)) :] = 0
    if draw(st.booleans()):
        label = np.random.default_rng(len(cuts)).permutation(label)
    return label


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """What a mask is made of: an offset, labels of queries and keys, validity."""
    valid = np.arange(LONGEST) < draw(st.integers(0, LONGEST))
    if draw(st.booleans()):
        valid &= np.random.default_rng(valid.sum()).random(LONGEST) < 0.7
    return np.int32(draw(st.integers(-40, 140))), draw(labels()), draw(labels()), valid


def arrays(case: Case, seed: int, dtype=jnp.float32, batch: tuple[int, ...] = ()):
    rng = np.random.default_rng(seed)
    q, d_out = (rng.normal(size=(*batch, case.queries, case.heads, case.head_dim)) for _ in "qd")
    k, v = (rng.normal(size=(*batch, case.keys, case.kv_heads, case.head_dim)) for _ in "kv")
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(d_out, dtype)


def call(backend: str, name: str) -> Callable:
    case = CASES[name]

    def run(q, k, v, at, q_ids, k_ids, valid):
        mask = case.mask(at, q_ids[: case.queries], k_ids[: case.keys], valid[: case.keys])
        return attention(q, k, v, mask, implementation=backend)

    return run


@functools.cache
def with_gradient(backend: str, name: str) -> Callable:
    """The output and the gradients of q, k and v, compiled once."""

    @jax.jit
    def run(qkv, d_out, facts):
        out, pull = jax.vjp(lambda *qkv: call(backend, name)(*qkv, *facts), *qkv)
        return out, pull(d_out)

    return run


def assert_close(ours, theirs, tolerance: float) -> None:
    """Within a share of the largest value: of the output, and of all gradients together."""
    for mine, right in zip(ours, theirs, strict=True):
        mine, right = (
            [np.asarray(x, np.float64) for x in jax.tree.leaves(y)] for y in (mine, right)
        )
        largest = max(np.abs(x).max() for x in right)
        for a, b in zip(mine, right, strict=True):
            assert np.isfinite(a).all()
            assert np.abs(a - b).max() <= tolerance * largest


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15)
@given(facts=facts(), seed=st.integers(0, 99))
def test_value_and_gradient_are_the_references(backend, name, facts, seed):
    inputs = (*arrays(CASES[name], seed), facts)
    ours, theirs = with_gradient(backend, name)(*inputs), with_gradient("reference", name)(*inputs)
    assert_close(ours, theirs, 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@settings(max_examples=8)
@given(facts=facts(), seed=st.integers(0, 99))
def test_half_precision_is_summed_in_float32(backend, dtype, facts, seed):
    qkv, d_out = arrays(CASES["packed"], seed, dtype)
    ours = with_gradient(backend, "packed")(qkv, d_out, facts)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, d_out))
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
    assert_close(ours, with_gradient("reference", "packed")(*exact, facts), 2e-2)


def by_rows(case: Case, q, k, v, mask: AbstractMask) -> np.ndarray:
    """Attention in float64, one query and head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    seen = np.asarray(mask.dense(case.queries, case.keys))
    out = np.zeros(q.shape)
    for i in range(case.queries):
        for head in range(case.heads):
            of = head // (case.heads // case.kv_heads)
            visible = np.flatnonzero(seen[i])
            weights = np.exp(k[visible, of] @ q[i, head] / np.sqrt(case.head_dim))
            if len(visible):
                out[i, head] = weights / weights.sum() @ v[visible, of]
    return out


@pytest.mark.parametrize("name", ["packed", "cache"])
@settings(max_examples=3)
@given(facts=facts(), seed=st.integers(0, 99))
def test_the_reference_is_a_loop_in_float64(name, facts, seed):
    case = CASES[name]
    qkv, d_out = arrays(case, seed)
    at, *rest = facts
    q_ids, k_ids, valid = rest
    mask = case.mask(at, q_ids[: case.queries], k_ids[: case.keys], valid[: case.keys])
    out, gradients = with_gradient("reference", name)(qkv, d_out, facts)
    truth = by_rows(case, *qkv, mask)
    np.testing.assert_allclose(out, truth, atol=2e-6 * max(np.abs(truth).max(), 1))

    # The gradient, along one direction, by a central difference of the loop.
    towards, _ = arrays(case, seed + 1)
    slope = sum(float(jnp.vdot(g, t)) for g, t in zip(gradients, towards, strict=True))
    pairs = [np.asarray((x, t), np.float64) for x, t in zip(qkv, towards, strict=True)]
    ahead, behind = (
        by_rows(case, *moved, mask)
        for moved in ([x + h * t for x, t in pairs] for h in (1e-5, -1e-5))
    )
    expected = np.vdot((ahead - behind) / 2e-5, np.asarray(d_out, np.float64))
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_rows_that_see_nothing_are_zero_with_zero_gradient(backend):
    case = CASES["packed"]
    odd = np.arange(LONGEST) % 2
    facts = (np.int32(0), odd.astype(np.int32), odd.astype(np.int32), odd == 0)
    out, (dq, dk, dv) = with_gradient(backend, "packed")(*arrays(case, 0), facts)
    assert not np.asarray(out)[1::2].any()
    assert not np.asarray(dq)[1::2].any()
    assert (np.asarray(out)[::2] != 0).all()
    for unseen in (dk, dv):
        assert np.isfinite(unseen).all()
        assert not np.asarray(unseen)[1::2].any()
    nobody = (*facts[:3], np.zeros(LONGEST, bool))
    for x in jax.tree.leaves(with_gradient(backend, "packed")(*arrays(case, 0), nobody)):
        assert not np.asarray(x).any()


def test_what_is_not_seen_changes_nothing(backend):
    (q, k, v), d_out = arrays(CASES["cache"], 0)
    facts = (np.int32(16), *np.zeros((2, LONGEST), np.int32), np.arange(LONGEST) < 40)
    run = with_gradient(backend, "cache")
    ours = run((q, k, v), d_out, facts)
    assert_close(run((q, k.at[40:].set(1e4), v.at[40:].set(-1e4)), d_out, facts), ours, 0)


def test_a_nan_that_is_seen_is_not_hidden(backend):
    (q, k, v), d_out = arrays(CASES["cache"], 0)
    facts = (np.int32(32), *np.zeros((2, LONGEST), np.int32), np.arange(LONGEST) < 48)
    run = with_gradient(backend, "cache")
    for broken in ((q.at[5].set(np.nan), k, v), (q, k.at[7].set(np.nan), v)):
        out, (dq, _, _) = run(broken, d_out, facts)
        assert np.isnan(out[5]).all()
        assert np.isnan(dq[5]).all()


def test_scores_far_from_zero(backend):
    """exp would overflow, or underflow in every key, without the largest score taken off."""
    (q, k, v), d_out = arrays(CASES["causal"], 0)
    facts = (np.int32(0), *np.zeros((2, LONGEST), np.int32), np.ones(LONGEST, bool))
    for shift in (-300.0, 300.0):
        # Adds the same to every score of a query: the softmax stays.
        qkv = (q.at[..., 0].set(shift), k.at[..., 0].set(np.sqrt(24.0)), v)
        theirs = with_gradient("reference", "causal")(qkv, d_out, facts)
        assert_close(with_gradient(backend, "causal")(qkv, d_out, facts), theirs, 1e-4)


# --- batches ------------------------------------------------------------------------------------


def batch_of(name: str, size: tuple[int, ...]):
    """Arguments of `call`, each with a batch axis."""
    case = CASES[name]
    qkv, _ = arrays(case, 3, batch=size)
    rng = np.random.default_rng(3)
    ids = np.sort(rng.integers(0, 3, (*size, 2, LONGEST)), axis=-1).astype(np.int32)
    valid = rng.random((*size, LONGEST)) < 0.8
    at = rng.integers(0, 40, size).astype(np.int32)
    return tuple(jnp.asarray(x) for x in (*qkv, at, ids[..., 0, :], ids[..., 1, :], valid))


@pytest.mark.parametrize("shared", [(), (0,), (3, 4, 5, 6), (0, 1, 2, 4)])
def test_vmap_is_a_loop_whatever_the_batch_shares(backend, shared):
    args = batch_of("packed", (3,))
    args = tuple(x[0] if i in shared else x for i, x in enumerate(args))
    axes = tuple(None if i in shared else 0 for i in range(len(args)))
    together = jax.jit(jax.vmap(call(backend, "packed"), axes))(*args)
    alone = jax.jit(call("reference", "packed"))
    for i in range(3):
        own = (x if axis is None else x[i] for x, axis in zip(args, axes, strict=True))
        np.testing.assert_allclose(together[i], alone(*own), atol=5e-6)


def test_vmap_over_any_axis(backend):
    args = batch_of("packed", (3,))
    axes = (1, 2, 3, 0, 1, 0, 0)
    moved = tuple(jnp.moveaxis(x, 0, axis) for x, axis in zip(args, axes, strict=True))
    turned = jax.jit(jax.vmap(call(backend, "packed"), axes, out_axes=2))(*moved)
    np.testing.assert_allclose(
        jnp.moveaxis(turned, 2, 0), jax.jit(jax.vmap(call("reference", "packed")))(*args), atol=5e-6
    )


def test_gradients_and_batches_in_any_order(backend):
    args = batch_of("packed", (2, 2))
    flat = tuple(x.reshape(4, *x.shape[2:]) for x in args)

    def loss(name):
        return lambda *args: jnp.sum(jnp.sin(call(name, "packed")(*args)))

    def grad_of_vmap(name):
        def total(*args):
            return jnp.sum(jax.vmap(loss(name))(*args))

        return jax.jit(jax.grad(total, (0, 1, 2)))(*flat)

    theirs = grad_of_vmap("reference")
    ours = jax.grad(loss(backend), (0, 1, 2))
    nested = jax.jit(jax.vmap(jax.vmap(ours)))(*args)
    assert_close([grad_of_vmap(backend)], [theirs], 2e-6)
    assert_close([jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), nested)], [theirs], 2e-6)


def test_gradients_of_what_the_batch_shares(backend):
    """Shared keys and values get the sum of the batch's gradients."""
    q, k, v, *facts = batch_of("packed", (3,))
    axes = (0, None, None, None, 0, 0, None)
    args = (q, k[0], v[0], facts[0][0], *facts[1:3], facts[3][0])

    def gradient(name):
        def total(*args):
            return jnp.sum(jnp.sin(jax.vmap(call(name, "packed"), axes)(*args)))

        return jax.jit(jax.grad(total, (0, 1, 2)))(*args)

    assert_close([gradient(backend)], [gradient("reference")], 2e-6)


def test_jacobian_and_vmap_of_the_pullback(backend):
    """The backward pass may meet a larger batch than the forward pass did."""
    args = tuple(x[0] for x in batch_of("packed", (1,)))

    def rows(name):
        out, pull = jax.vjp(lambda *qkv: call(name, "packed")(*qkv, *args[3:]), *args[:3])
        return jax.vmap(pull)(jnp.stack([out, jnp.ones_like(out), out**2]))

    ours, theirs = (jax.jit(rows, static_argnums=0)(name) for name in (backend, "reference"))
    assert_close([ours], [theirs], 2e-6)


def test_inside_scan_checkpoint_and_vmap_with_a_mask_from_outside(backend):
    q, k, v, *facts = batch_of("packed", (2,))

    def loss(name, q, k, v, facts):
        def layer(x, _):  # the mask's arrays are traced values of the enclosing functions
            return x + call(name, "packed")(x, k, v, *facts), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, None, length=2)[0] ** 2)

    def gradient(name):
        each = jax.vmap(jax.grad(functools.partial(loss, name), (0, 1, 2)))
        return jax.jit(each)(q, k, v, tuple(facts))

    assert_close([gradient(backend)], [gradient("reference")], 5e-6)


# --- causality ----------------------------------------------------------------------------------


@settings(max_examples=10)
@given(later=st.integers(1, 6), facts=facts(), seed=st.integers(0, 9))
def test_a_later_block_changes_no_earlier_output(backend, later, facts, seed):
    (q, k, v), d_out = arrays(CASES["packed"], seed)
    facts = (np.int32(0), *facts[1:])
    run = with_gradient(backend, "packed")
    start = 16 * later
    before, _ = run((q, k, v), d_out, facts)
    after, _ = run((q, k.at[start:].multiply(-2), v.at[start:].add(1)), d_out, facts)
    np.testing.assert_array_equal(before[:start], after[:start])
    # And nothing flows back: what comes in at earlier outputs moves no later key or value.
    _, (dq, dk, dv) = run((q, k, v), d_out.at[start:].set(0), facts)
    assert not any(np.asarray(x)[start:].any() for x in (dq, dk, dv))


def test_a_query_sees_its_whole_block(backend):
    (q, k, v), d_out = arrays(CASES["packed"], 0)
    facts = (np.int32(0), *np.zeros((2, LONGEST), np.int32), np.ones(LONGEST, bool))
    run = with_gradient(backend, "packed")
    before, _ = run((q, k, v), d_out, facts)
    after, _ = run((q, k, v.at[31].add(5)), d_out, facts)
    changed = np.abs(np.asarray(before - after)).max(axis=(1, 2)) > 0
    np.testing.assert_array_equal(changed, np.arange(100) >= 16)


# --- the function -------------------------------------------------------------------------------


def test_scale(backend):
    (q, k, v), _ = arrays(CASES["causal"], 0)
    own = attention(q, k, v, Causal(), implementation=backend, scale=0.5)
    np.testing.assert_allclose(
        own, attention(q * 0.5 * np.sqrt(24.0), k, v, Causal(), implementation=backend), atol=5e-6
    )


def test_types_may_differ_and_the_output_has_the_queries(backend):
    (q, k, v), _ = arrays(CASES["causal"], 0)
    half = attention(q.astype(jnp.bfloat16), k, v, Causal(), implementation=backend)
    assert half.dtype == jnp.bfloat16
    mixed = attention(
        q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), Causal(), implementation=backend
    )
    assert mixed.dtype == jnp.float32
    whole = attention(q, k, v, Causal(), implementation="reference")
    for x in (half, mixed):
        np.testing.assert_allclose(x.astype(jnp.float32), whole, atol=0.05)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 1), (1, 40), (50, 60)])
def test_extreme_lengths(backend, queries, keys):
    q, k = jnp.ones((queries, 2, 8)), jnp.ones((keys, 1, 8))
    out = attention(q, k, k, Full(), implementation=backend)
    np.testing.assert_allclose(out, np.full(q.shape, float(keys > 0)), rtol=1e-6)
