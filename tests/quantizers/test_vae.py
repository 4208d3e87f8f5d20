"""The Gaussian bottleneck against its closed formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import GaussianVAE

TOKENS, CHANNELS = 12, 3
VAE = GaussianVAE(CHANNELS)
CALL = jax.jit(lambda z, keep, key=None: VAE(z, keep, key=key))
LATENTS = hnp.arrays(
    np.float32, (TOKENS, 2 * CHANNELS), elements=st.floats(-9, 9, width=32, allow_subnormal=False)
)
KEEP = hnp.arrays(np.bool_, TOKENS)


def divergence(mean, log_variance):
    """KL(N(mean, variance) || N(0, 1)) in nats, in float64."""
    mean, log_variance = mean.astype(np.float64), log_variance.astype(np.float64)
    return 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)


@given(z=LATENTS, keep=KEEP)
def test_loss_is_the_divergence_of_kept_tokens(z, keep):
    out = CALL(z, keep)
    expected = divergence(z[keep, :CHANNELS], z[keep, CHANNELS:]).sum()
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5, atol=1e-5)
    assert out.codes is None
    assert out.statistics == ()


@given(z=LATENTS, keep=KEEP)
def test_without_a_key_it_is_the_mode(z, keep):
    expected = np.where(keep[:, None], z[:, :CHANNELS], 0)
    np.testing.assert_array_equal(CALL(z, keep).latents, expected)


@given(z=LATENTS, keep=KEEP)
def test_gradient_of_the_loss(z, keep):
    gradient = jax.grad(lambda x: CALL(x, keep).loss)(jnp.asarray(z))
    expected = np.concatenate([z[:, :CHANNELS], (np.exp(z[:, CHANNELS:]) - 1) / 2], axis=-1)
    expected = np.where(keep[:, None], expected, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_divergence_by_integration():
    """The closed formula is the one meant: integrate p log(p / q) on a fine grid."""
    mean, log_variance = 0.7, -1.3
    x = np.linspace(-12, 12, 200001)
    variance = np.exp(log_variance)
    log_p = -0.5 * ((x - mean) ** 2 / variance + log_variance)
    log_q = -0.5 * x**2
    integral = np.trapezoid(np.exp(log_p) / np.sqrt(2 * np.pi) * (log_p - log_q), x)
    out = GaussianVAE(1)(jnp.array([[mean, log_variance]]), jnp.array([True]))
    np.testing.assert_allclose(out.loss, integral, rtol=1e-5)


def test_samples_have_the_moments():
    vae, draws = GaussianVAE(2), 40_000
    z = jnp.tile(jnp.array([1.5, -0.5, 0.4, -3.0]), (draws, 1))
    samples = np.asarray(vae(z, jnp.ones(draws, bool), key=jax.random.key(0)).latents)
    deviations = np.exp(np.array([0.4, -3.0]) / 2)
    errors = deviations / np.sqrt(draws)
    assert (np.abs(samples.mean(0) - [1.5, -0.5]) < 4 * errors).all()
    np.testing.assert_allclose(samples.std(0), deviations, rtol=0.02)
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(samples[1:, 0], samples[:-1, 0])[0, 1]) < 0.03


def test_samples_depend_on_the_key():
    z, keep = np.zeros((TOKENS, 2 * CHANNELS), np.float32), np.ones(TOKENS, bool)
    one, same, other = (CALL(z, keep, jax.random.key(i)).latents for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(other)).all()


@pytest.mark.parametrize(("value", "clipped"), [(-1e9, -30.0), (-31, -30), (21, 20), (1e9, 20)])
def test_log_variance_is_clipped(value, clipped):
    vae = GaussianVAE(1)
    z, keep = jnp.array([[0.5, value]]), jnp.array([True])
    expected = divergence(np.array([0.5]), np.array([clipped])).item()
    np.testing.assert_allclose(vae(z, keep).loss, expected, rtol=1e-6)
    gradient = jax.grad(lambda x: vae(x, keep).loss)(z)
    np.testing.assert_array_equal(gradient, [[0.5, 0.0]])


def test_widths():
    assert (VAE.input_dim, VAE.latent_dim, VAE.bits_per_token) == (6, 3, None)


def test_bad_channels():
    with pytest.raises(ValueError, match="channels is 0: at least 1"):
        GaussianVAE(0)
