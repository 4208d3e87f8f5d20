"""Binary spherical quantization against enumeration of all codes, in NumPy float64."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import BSQ, LFQ, Residual

TOKENS, DIM = 10, 4
LATENTS = hnp.arrays(
    np.float32, (TOKENS, DIM), elements=st.floats(-3, 3, width=32, allow_subnormal=False)
)
KEEP = hnp.arrays(np.bool_, TOKENS)
TEMPERATURES = (1.0, 0.05)
QUANTIZERS = {t: BSQ(DIM, temperature=t, entropy_weight=1.0, commitment=0.5) for t in TEMPERATURES}
CALLS = {t: jax.jit(q.__call__) for t, q in QUANTIZERS.items()}
call = eqx.filter_jit(lambda q, z, keep: q(z, keep))


def sphere(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    zero = np.abs(z).max(-1, keepdims=True) <= 1e-12
    return np.where(zero, 0, z / np.where(zero, 1, np.linalg.norm(z, axis=-1, keepdims=True)))


def corners(dim: int = DIM) -> np.ndarray:
    """All codes' points; the first dimension is the lowest bit."""
    rows = [bits[::-1] for bits in itertools.product([-1.0, 1.0], repeat=dim)]
    return np.array(rows) / np.sqrt(dim)


def distribution(z: np.ndarray, temperature: float) -> np.ndarray:
    """The paper's exp(tau u.c) over its sum, with tau = 2 / temperature."""
    p = np.exp(2 / temperature * sphere(z) @ corners().T)
    return p / p.sum(-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


@given(z=LATENTS)
def test_codes_and_points(z):
    # Where an entry is all but nothing beside another it may underflow to zero, and so to plus.
    z = np.where(np.abs(z) < 1e-6, 0, z)
    out = CALLS[1.0](z, np.ones(TOKENS, bool))
    u = sphere(z)
    expected = [sum(2**i for i in range(DIM) if row[i] >= 0) for row in u]
    np.testing.assert_array_equal(out.codes, expected)
    np.testing.assert_allclose(out.latents, corners()[expected], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(out.latents, axis=-1), 1, rtol=1e-6)


@given(z=LATENTS, keep=KEEP)
def test_commitment_is_to_the_latents_on_the_sphere(z, keep):
    out = CALLS[1.0](z, keep)
    u = sphere(z)
    expected = 0.5 * np.sum(((u - np.where(u >= 0, 0.5, -0.5)) ** 2)[keep])
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@given(z=LATENTS, keep=KEEP)
def test_statistics_are_those_of_the_distribution_over_all_codes(temperature, z, keep):
    statistics = CALLS[temperature](z, keep).statistics
    p = distribution(z, temperature)[keep]
    np.testing.assert_allclose(statistics.entropy, entropy(p).sum(), rtol=1e-4, atol=1e-4)
    bits = (p @ (corners() > 0)).sum(0)
    np.testing.assert_allclose(statistics.probabilities, bits, rtol=1e-4, atol=1e-4)
    assert statistics.count == keep.sum()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", [BSQ, LFQ])
@given(z=LATENTS)
def test_bounds_of_the_entropies(kind, temperature, z):
    """0 <= mean entropy of a token <= entropy of the mean <= dim ln 2."""
    statistics = call(kind(DIM, temperature=temperature), z, np.ones(TOKENS, bool)).statistics
    per_token, both = (
        float(kind(DIM, entropy_weight=1.0, diversity=d).batch_loss(statistics)) for d in (0.0, 1.0)
    )
    of_mean = per_token - both
    assert -1e-5 <= per_token <= of_mean + 1e-4
    assert of_mean <= DIM * np.log(2) + 1e-4


def test_the_penalty_against_enumeration():
    z = np.random.default_rng(0).normal(size=(TOKENS, DIM)).astype(np.float32)
    statistics = CALLS[0.05](z, np.ones(TOKENS, bool)).statistics
    p = distribution(z, 0.05)
    mean = (p @ (corners() > 0)).mean(0)
    marginals = entropy(np.stack([mean, 1 - mean], -1)).sum()
    quantizer = BSQ(DIM, entropy_weight=0.3, diversity=2.5, temperature=0.05)
    expected = 0.3 * (entropy(p).mean() - 2.5 * marginals)
    np.testing.assert_allclose(quantizer.batch_loss(statistics), expected, rtol=1e-4)
    assert marginals >= entropy(p.mean(0)), "an upper bound of the entropy of the mean code"


@pytest.mark.parametrize("dim", [1, 2, 5, 18, 30])
def test_no_error_is_larger_than_the_bound_of_the_paper(dim):
    """sqrt(2 - 2 / sqrt(dim)), which a latent along one axis has."""
    rng = np.random.default_rng(dim)
    z = rng.normal(size=(500, dim)) * (rng.random((500, dim)) < 0.3)
    z = np.concatenate([z[np.abs(z).max(-1) > 0], np.eye(dim)[:1]]).astype(np.float32)
    quantizer = BSQ(dim)
    errors = np.linalg.norm(call(quantizer, z, np.ones(len(z), bool)).latents - sphere(z), axis=-1)
    bound = np.sqrt(2 - 2 / np.sqrt(dim))
    assert errors.max() <= bound + 1e-5
    np.testing.assert_allclose(errors[-1], bound, atol=1e-5)


@given(z=LATENTS, power=st.integers(-30, 30))
def test_the_length_of_a_latent_does_not_matter(z, power):
    z = np.where(np.abs(z) < 0.01, 0, z)
    keep = np.ones(TOKENS, bool)
    one, other = CALLS[1.0](z, keep), CALLS[1.0](z * np.float32(2.0**power), keep)
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5, atol=1e-6)


def test_training_with_the_penalty_uses_both_values_of_every_bit():
    quantizer, keep = BSQ(DIM, entropy_weight=1.0, temperature=0.3), jnp.ones(64, bool)
    z = 1 + 0.3 * jax.random.normal(jax.random.key(0), (64, DIM))

    @jax.jit
    def step(z):
        return z - 20 * jax.grad(lambda x: quantizer.batch_loss(quantizer(x, keep).statistics))(z)

    assert (np.asarray(z > 0).mean(0) > 0.95).all()
    for _ in range(200):
        z = step(z)
    share = np.asarray(z > 0).mean(0)
    assert (share > 0.15).all()
    assert (share < 0.85).all()


def test_it_is_no_stage_of_residual():
    for n in (1, 2):
        with pytest.raises(NotImplementedError, match="BSQ cannot be a stage of Residual"):
            Residual(BSQ(4), n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": 31}, "dim is 31: it must be in 1 .. 30"),
        ({"entropy_weight": -0.1}, "entropy_weight is -0.1"),
        ({"diversity": -1.0}, "diversity is -1.0"),
        ({"commitment": float("nan")}, "commitment is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BSQ(**({"dim": 4} | arguments))
