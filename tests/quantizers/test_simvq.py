"""One learned map of a frozen book, against NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.quantizers import Residual, RotationTrick, SimVQ

TOKENS, CODES, DIM = 40, 24, 3
CALL = eqx.filter_jit(lambda q, z, keep: q(z, keep))


def make(seed: int = 0) -> SimVQ:
    q = SimVQ(CODES, DIM, key=jax.random.key(1), commitment=0.3)
    return eqx.tree_at(lambda q: q.weight, q, jax.random.normal(jax.random.key(seed), (DIM, DIM)))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(TOKENS, DIM)).astype(np.float32), rng.random(TOKENS) < 0.7


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_against_numpy(seed):
    q, (z, keep) = make(seed), draw(seed)
    base, weight = (np.asarray(x, np.float64) for x in (q.base, q.weight))
    entries, wide = base @ weight, z.astype(np.float64)
    codes = np.sum((wide[:, None] - entries) ** 2, -1).argmin(-1)
    error = np.where(keep[:, None], wide - entries[codes], 0)

    def loss(q, z):
        out = CALL(q, z, keep)
        return out.loss, out

    (_, out), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(q, jnp.asarray(z))
    np.testing.assert_array_equal(np.asarray(out.codes)[keep], codes[keep])
    np.testing.assert_allclose(out.latents, np.where(keep[:, None], entries[codes], 0), atol=1e-5)
    np.testing.assert_allclose(out.loss, 1.3 * np.sum(error**2), rtol=1e-4)
    # d/dW of |z - c W|^2 is -2 c' (z - c W); of the commitment nothing reaches W.
    expected = -2 * base[codes].T @ error
    np.testing.assert_allclose(gradient.weight, expected, rtol=1e-3, atol=1e-3)
    assert not np.asarray(gradient.base).any()
    pulled = jax.grad(lambda z: loss(q, z)[0])(jnp.asarray(z))
    np.testing.assert_allclose(pulled, 0.6 * error, rtol=1e-3, atol=1e-4)


def test_the_decoder_does_not_train_the_map():
    q, (z, keep) = make(), draw(0)
    gradient = eqx.filter_grad(lambda q: jnp.sum(CALL(q, z, keep).latents))(q)
    assert not np.asarray(gradient.weight).any()


def test_only_the_map_is_trained():
    marks = make().trainable()
    assert marks.weight is True
    assert marks.base is False


def test_entries_are_computed_once_for_a_batch():
    """Under vmap and in its gradient, products with W have no batch axis."""
    q, batch = make(), 7

    def objective(weight, z):
        book = eqx.tree_at(lambda q: q.weight, q, weight)
        return jnp.sum(jax.vmap(book)(z, jnp.ones((batch, TOKENS), bool)).loss)

    z = jnp.zeros((batch, TOKENS, DIM))
    jaxpr = jax.make_jaxpr(jax.grad(objective))(q.weight, z)
    shapes = [v.aval.shape for e in products(jaxpr.jaxpr) for v in (*e.invars, *e.outvars)]
    maps = [shape for shape in shapes if DIM in shape and TOKENS not in shape]
    assert (CODES, DIM) in maps
    assert (DIM, DIM) in maps
    assert not any(batch in shape for shape in maps)


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("estimator", [None, RotationTrick()])
def test_learning_the_map_uses_all_entries(estimator):
    """Latents in a corner that few of the first entries reach."""
    rng = np.random.default_rng(0)
    q = SimVQ(32, DIM, key=jax.random.key(0), estimator=estimator)
    z = (rng.normal(size=(512, DIM)) @ np.diag([3.0, 1.0, 0.2])).astype(np.float32)
    keep = jnp.ones(512, bool)

    @eqx.filter_jit
    def step(q):
        gradient = eqx.filter_grad(lambda q: q(jnp.asarray(z), keep).loss / 512)(q)
        return eqx.tree_at(lambda q: q.weight, q, q.weight - 0.05 * gradient.weight)

    before = CALL(q, z, keep)
    for _ in range(100):
        q = step(q)
    after = CALL(q, z, keep)
    assert after.loss < 0.5 * before.loss
    assert len(np.unique(after.codes)) >= 24


def test_stages_of_residual():
    q = make()
    finer = q.refined()
    np.testing.assert_array_equal(finer.base, q.base / 2)
    z, keep = draw(1)
    out = CALL(Residual(q, 3), z, keep)
    assert out.codes.shape == (TOKENS, 3)
    turned = SimVQ(CODES, DIM, key=jax.random.key(0), estimator=RotationTrick())
    with pytest.raises(NotImplementedError, match="SimVQ has the estimator RotationTrick"):
        Residual(turned, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"dim": 0}, "dim is 0"),
        ({"commitment": -1.0}, "commitment is -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(**({"codebook_size": 4, "dim": 2, "key": jax.random.key(0)} | arguments))
