"""Lookup-free quantization against explicit enumeration of all codes."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import LFQ

TOKENS, DIM = 10, 4
LATENTS = hnp.arrays(
    np.float32, (TOKENS, DIM), elements=st.floats(-3, 3, width=32, allow_subnormal=False)
)
KEEP = hnp.arrays(np.bool_, TOKENS)


def quantizer(**changes) -> LFQ:
    return LFQ(DIM, **({"entropy_weight": 1.0, "diversity": 1.0, "temperature": 2.0} | changes))


def corners(scale: float = 1.0) -> np.ndarray:
    """All 2**DIM codes; the first dimension is the lowest bit."""
    rows = [bits[::-1] for bits in itertools.product([-1.0, 1.0], repeat=DIM)]
    return scale * np.array(rows)


def distribution(z: np.ndarray, temperature: float, scale: float) -> np.ndarray:
    """softmax(-|z - c|^2 / temperature) over all codes, in float64."""
    distances = np.sum((z.astype(np.float64)[:, None] - corners(scale)[None]) ** 2, axis=-1)
    logits = -distances / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


call = eqx.filter_jit(lambda lfq, z, keep: lfq(z, keep))
CALLS = {
    (t, s): jax.jit(quantizer(temperature=t, scale=s).__call__) for t, s in [(2.0, 1.0), (0.7, 0.5)]
}


@pytest.mark.parametrize(("temperature", "scale"), CALLS)
@given(z=LATENTS, keep=KEEP)
def test_entropy_of_a_token_is_exact(temperature, scale, z, keep):
    out = CALLS[temperature, scale](z, keep)
    expected = entropy(distribution(z, temperature, scale))[keep].sum()
    np.testing.assert_allclose(out.statistics.entropy, expected, rtol=1e-4, atol=1e-5)
    assert out.statistics.count == keep.sum()


@pytest.mark.parametrize(("temperature", "scale"), CALLS)
@given(z=LATENTS, keep=KEEP)
def test_entropy_of_the_mean_is_that_of_its_marginals(temperature, scale, z, keep):
    """Exactly the sum of the marginals' entropies, and so never below the joint entropy."""
    if not keep.any():
        return
    lfq = quantizer(temperature=temperature, scale=scale)
    statistics = CALLS[temperature, scale](z, keep).statistics
    mean = distribution(z, temperature, scale)[keep].mean(0)
    set_bits = [mean[corners()[:, i] > 0].sum() for i in range(DIM)]
    marginals = sum(entropy(np.array([p, 1 - p])) for p in set_bits)
    per_token = entropy(distribution(z, temperature, scale))[keep].mean()
    np.testing.assert_allclose(
        lfq.batch_loss(statistics), per_token - marginals, rtol=1e-4, atol=1e-4
    )
    assert marginals >= entropy(mean) - 1e-9


def test_entropy_of_the_mean_is_exact_where_bits_are_independent():
    """All combinations of two values per dimension: the mean code is a product of its bits."""
    values = [(-0.3, 0.9), (0.2, -1.1), (0.5, 0.6), (-2.0, 0.1)]
    z = np.array(list(itertools.product(*values)), np.float32)
    lfq = quantizer()
    statistics = call(lfq, z, np.ones(len(z), bool)).statistics
    p = distribution(z, 2.0, 1.0)
    expected = entropy(p).mean() - entropy(p.mean(0))
    np.testing.assert_allclose(lfq.batch_loss(statistics), expected, rtol=1e-5)


def test_entropy_of_the_mean_is_an_upper_bound_only_where_they_are_not():
    """Two opposite corners: one bit of joint entropy, but DIM bits of marginal entropy."""
    lfq = quantizer(temperature=0.05)
    z = jnp.stack([jnp.ones(DIM), -jnp.ones(DIM)])
    loss = lfq.batch_loss(call(lfq, z, np.ones(2, bool)).statistics)
    np.testing.assert_allclose(loss, -DIM * np.log(2), rtol=1e-5)


@given(z=LATENTS)
def test_weights_of_the_penalty(z):
    statistics = CALLS[2.0, 1.0](z, np.ones(TOKENS, bool)).statistics
    confident, full = (quantizer(diversity=d).batch_loss(statistics) for d in (0.0, 1.0))
    weighted = quantizer(entropy_weight=0.3, diversity=2.5).batch_loss(statistics)
    expected = 0.3 * (confident + 2.5 * (full - confident))
    np.testing.assert_allclose(weighted, expected, rtol=1e-4, atol=1e-5)


def penalty_by_enumeration(z: np.ndarray, temperature: float) -> float:
    p = distribution(z, temperature, 1.0)
    bits = p @ (corners() > 0)
    mean = bits.mean(0)
    return entropy(p).mean() - np.sum(entropy(np.stack([mean, 1 - mean], -1)))


def test_gradient_of_the_penalty_by_differences():
    z = np.random.default_rng(0).normal(size=(TOKENS, DIM))
    lfq, keep = quantizer(), jnp.ones(TOKENS, bool)
    gradient = jax.jit(jax.grad(lambda x: lfq.batch_loss(lfq(x, keep).statistics)))(
        jnp.asarray(z, jnp.float32)
    )
    step, expected = 1e-5, np.zeros_like(z)
    for index in np.ndindex(*z.shape):
        up, down = z.copy(), z.copy()
        up[index] += step
        down[index] -= step
        difference = penalty_by_enumeration(up, 2.0) - penalty_by_enumeration(down, 2.0)
        expected[index] = difference / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e6])
def test_gradient_of_the_penalty_is_finite_at_any_size(size):
    """All tokens saturate to the same bit: the slope of p log p at 0 must not come through."""
    lfq, keep = quantizer(temperature=0.01), jnp.ones(TOKENS, bool)
    z = jnp.full((TOKENS, DIM), size) * jnp.array([1.0, -1.0, 1.0, -1.0])
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: lfq.batch_loss(lfq(x, keep).statistics)))(
        z
    )
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_training_with_the_penalty_uses_both_values_of_every_bit():
    lfq, keep = quantizer(), jnp.ones(64, bool)
    z = 1 + 0.3 * jax.random.normal(jax.random.key(0), (64, DIM))

    @jax.jit
    def step(z):
        gradient = jax.grad(lambda x: lfq.batch_loss(lfq(x, keep).statistics))(z)
        return z - 20 * gradient

    for _ in range(100):
        z = step(z)
    share = np.asarray(z > 0).mean(0)
    assert (share > 0.15).all()
    assert (share < 0.85).all()
    assert np.abs(z).min() > 2, "each token is sure of its bits"


@given(z=LATENTS, keep=KEEP)
def test_commitment(z, keep):
    out = CALLS[0.7, 0.5](z, keep)
    signs = np.where(z >= 0, 0.5, -0.5)
    expected = 0.25 * np.sum(((z - signs) ** 2)[keep])
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: CALLS[0.7, 0.5](x, keep).loss)(jnp.asarray(z))
    wanted = np.where(keep[:, None], 0.5 * (z - signs), 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@given(z=LATENTS)
def test_codes_are_the_bits_of_the_signs(z):
    out = CALLS[2.0, 1.0](z, np.ones(TOKENS, bool))
    expected = [sum(2**i for i in range(DIM) if row[i] >= 0) for row in z]
    np.testing.assert_array_equal(out.codes, expected)
    np.testing.assert_array_equal(out.latents, corners()[np.asarray(out.codes)])


def test_zero_counts_as_positive():
    lfq = quantizer()
    z = jnp.array([[0.0, -0.0, -1e-30, 1e-30]])
    np.testing.assert_array_equal(call(lfq, z, jnp.array([True])).latents, [[1, 1, -1, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 31}, "dim is 31: it must be in 1 .. 30"),
        ({"entropy_weight": -0.1}, "entropy_weight is -0.1"),
        ({"diversity": -1.0}, "diversity is -1.0"),
        ({"commitment": float("nan")}, "commitment is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LFQ(**({"dim": 4} | arguments))
