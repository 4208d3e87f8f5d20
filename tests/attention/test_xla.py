"""What the XLA backend promises: linear memory, skipped tiles, loops that vmap leaves alone."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from elastictok.attention import (
    XLA,
    BlockCausal,
    KeyValid,
    Segments,
    TileSizes,
    XLATileSizes,
    attention,
)

SMALL = XLA(XLATileSizes(TileSizes(32, 24), TileSizes(40, 24)))


def equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def gradient(backend, mask):
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, mask, implementation=backend) ** 2)

    return jax.value_and_grad(loss, (0, 1, 2))


def test_nothing_of_the_square_of_the_length_is_held():
    length = 2048
    mask = BlockCausal(512) & Segments(np.arange(length) // 700) & KeyValid(np.ones(length, bool))
    x = jnp.ones((length, 1, 8))
    everything = list(equations(jax.make_jaxpr(gradient(XLA(), mask))(x, x, x).jaxpr))
    assert sum(equation.primitive.name == "dot_general" for equation in everything) == 2 + 5
    assert max(v.aval.size for e in everything for v in e.outvars) <= max(512**2, 8 * length)


def test_compiled_memory_grows_with_the_length_and_not_its_square():
    def temporary(length: int) -> int:
        x = jax.ShapeDtypeStruct((length, 1, 8), jnp.float32)
        compiled = jax.jit(gradient(SMALL, BlockCausal(64))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.5 * temporary(1024)


def test_tiles_that_nobody_sees_are_not_read():
    """NaN spreads through any product, even with a weight of 0: what stays finite was skipped."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2, 8)), jnp.float32)
    cache = jnp.full((200, 2, 8), jnp.nan).at[:48].set(1.0)

    @jax.jit
    def step(q, k, v, at):  # the cache of a stream: the offset moves and nothing recompiles
        mask = BlockCausal(16, at) & KeyValid(jnp.arange(200) < at + 16)
        return gradient(SMALL, mask)(q, k, v)

    for at in (0, 32):
        value, (dq, dk, dv) = step(q, cache, cache, at)
        assert np.isfinite(value)
        assert np.isfinite(dq).all()
        assert not np.asarray(dk)[48:].any()
        assert not np.asarray(dv)[48:].any()
    assert np.isnan(step(q, cache, cache, 48)[0])


def test_packed_documents_do_not_read_each_other():
    ids = np.repeat([4, 2, 9], 48)  # 48: a multiple of both tiles' greatest common divisor only
    x = jnp.ones((144, 1, 8)).at[96:].set(jnp.nan)
    out = attention(
        x,
        x,
        x,
        Segments(ids),
        implementation=XLA(XLATileSizes(TileSizes(48, 48), TileSizes(48, 48))),
    )
    assert np.isfinite(out[:96]).all()


@pytest.mark.parametrize("batched_mask", [True, False])
def test_vmap_grows_the_tiles_and_leaves_the_loops_scalar(batched_mask):
    """A batched `while` would run as long as the longest example and gather its slices."""

    def loss(q, k, v, at):
        mask = BlockCausal(16, at) & KeyValid(jnp.arange(144) < 100)
        return jnp.sum(attention(q, k, v, mask, implementation=SMALL) ** 2)

    x = jnp.ones((3, 5, 144, 2, 8))
    at = jnp.zeros((3, 5) if batched_mask else (), jnp.int32)
    axes = (0, 0, 0, 0 if batched_mask else None)
    run = jax.vmap(jax.vmap(jax.grad(loss, (0, 1, 2)), axes), axes)
    everything = list(equations(jax.make_jaxpr(run)(x, x, x, at).jaxpr))
    loops = [e for e in everything if e.primitive.name == "while"]
    assert len(loops) == 2  # one forward, one backward
    for loop in loops:
        trips = loop.params["cond_jaxpr"].jaxpr
        assert all(v.aval.shape == () for e in trips.eqns for v in (*e.invars, *e.outvars))
        inside = [e for body in jaxprs_in_params(loop.params) for e in equations(body)]
        assert not any(e.primitive.name in ("gather", "scatter", "scatter-add") for e in inside)
        assert any(v.aval.shape[:1] == (15,) for e in inside for v in e.outvars)


def test_no_recompilation_for_another_offset_or_other_documents():
    x = jnp.ones((60, 1, 8))
    traces = []

    @jax.jit
    def run(x, at, ids):
        traces.append(None)
        return attention(x, x, x, BlockCausal(16, at) & Segments(ids), implementation=SMALL)

    for at in (0, 8, 16):
        run(x, at, jnp.arange(60) // (at + 4))
    assert len(traces) == 1


def test_tiles_shrink_as_the_batch_grows():
    """Forward alone and backward in a batch, so that the two use different tiles."""
    backend = XLA(XLATileSizes(TileSizes(100, 40), TileSizes(100, 40)), scores=8192)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(100, 2, 8)), jnp.float32) for _ in range(3))

    def pulled(implementation):
        mask = BlockCausal(16) & KeyValid(np.arange(100) < 90)
        out, pull = jax.vjp(lambda *a: attention(*a, mask, implementation=implementation), q, k, v)
        return jax.vmap(pull)(jnp.stack([out, out**2, jnp.ones_like(out)]))

    jaxpr = jax.make_jaxpr(lambda: pulled(backend))().jaxpr
    loops = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    assert len(loops) == 1  # forward takes all queries at once, backward 56 at a time
    ours, theirs = (jax.jit(pulled, static_argnums=0)(x) for x in (backend, "reference"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_call_outside_jit_compiles_once():
    x = jnp.ones((61, 1, 8))
    for at in (0, 1):
        attention(x, x, x, BlockCausal(16, jnp.int32(at)), implementation=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(XLA, "forward", None)  # tracing it again would fail
        attention(x, x, x, BlockCausal(16, jnp.int32(2)), implementation=SMALL)


def test_under_64_bit_types():
    x = np.random.default_rng(0).normal(size=(100, 2, 8)).astype(np.float32)
    mask = (BlockCausal(16), np.arange(100) // 40, np.arange(100) < 90)
    ours = jax.jit(gradient(SMALL, mask[0] & Segments(mask[1]) & KeyValid(mask[2])))(x, x, x)
    with jax.enable_x64(True):
        wide = mask[0] & Segments(jnp.asarray(mask[1])) & KeyValid(mask[2])
        theirs = jax.jit(gradient(SMALL, wide))(*(jnp.asarray(x),) * 3)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_tile_sizes_must_be_positive():
    with pytest.raises(ValueError, match=r"TileSizes.keys is 0; it must be at least 1"):
        TileSizes(8, 0)
