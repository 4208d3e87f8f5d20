"""Gradients past the nearest entry against matrices in NumPy, and safe lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.quantizers import RotationTrick, StraightThrough
from elastictok.quantizers._estimators import unit

ROWS = 6
ESTIMATORS = {"straight_through": StraightThrough(), "rotation": RotationTrick()}
PULL = {
    name: jax.jit(lambda q, z, g, e=e: jax.vjp(lambda x: e(q, x), z)[1](g)[0])
    for name, e in ESTIMATORS.items()
}


def rotation(z: np.ndarray, q: np.ndarray) -> np.ndarray:
    """|q| / |z| times the rotation in the plane of both: 1 + K + K^2 / (1 + cos)."""
    long, other = np.linalg.norm(z), np.linalg.norm(q)
    z, q = z / long, q / other
    turn = np.outer(q, z) - np.outer(z, q)
    return other / long * (np.eye(len(z)) + turn + turn @ turn / (1 + z @ q))


def draw(seed: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z, q, g = rng.normal(size=(3, ROWS, dim)) * rng.choice([0.1, 1.0, 30.0], (3, ROWS, 1))
    return z.astype(np.float32), q.astype(np.float32), g.astype(np.float32)


def test_the_oracle_rotates():
    z, q, _ = (np.asarray(x, np.float64) for x in draw(0, 5))
    matrix = rotation(z[0], q[0])
    np.testing.assert_allclose(matrix @ z[0], q[0], rtol=1e-9)
    size = np.linalg.norm(q[0]) / np.linalg.norm(z[0])
    np.testing.assert_allclose(matrix.T @ matrix, size**2 * np.eye(5), atol=float(1e-9 * size**2))
    assert np.linalg.det(matrix) > 0


@given(seed=st.integers(0, 2**32 - 1), dim=st.sampled_from([2, 3, 16]))
def test_rotation_against_a_matrix(seed, dim):
    z, q, g = draw(seed, dim)
    got = np.asarray(PULL["rotation"](q, z, g))
    for row in range(ROWS):
        matrix = rotation(z[row].astype(np.float64), q[row].astype(np.float64))
        expected = matrix.T @ g[row]
        # Nearly opposite vectors, whose plane float32 hardly knows, are the next test's.
        a, b = (x[row] / np.linalg.norm(x[row]) for x in (z, q))
        if a @ b > -0.99:
            size = float(np.linalg.norm(expected))
            np.testing.assert_allclose(got[row], expected, atol=1e-4 * size)


@pytest.mark.parametrize("name", ESTIMATORS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_value_is_the_entry(name, seed):
    z, q, _ = draw(seed, 4)
    z[0], z[1], z[2] = np.nan, 0.0, np.inf
    out = np.asarray(jax.jit(ESTIMATORS[name])(q, z))
    np.testing.assert_array_equal(out[[1, 3, 4, 5]], q[[1, 3, 4, 5]])
    assert np.isnan(out[[0, 2]]).all(), "what is not finite is seen"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_gradient_reaches_the_entries(name):
    z, q, g = draw(0, 4)
    gradient = jax.grad(lambda q: jnp.sum(ESTIMATORS[name](q, jnp.asarray(z)) * g))(jnp.asarray(q))
    assert not np.asarray(gradient).any()


def test_straight_through_passes_the_gradient():
    z, q, g = draw(0, 4)
    np.testing.assert_array_equal(PULL["straight_through"](q, z, g), g)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e-7])
def test_rotation_of_latents_without_length_is_straight_through(size):
    _, q, g = draw(1, 4)
    z = np.full((ROWS, 4), size, np.float32)
    np.testing.assert_array_equal(PULL["rotation"](q, z, g), g)


@pytest.mark.parametrize("factor", [2.0, -2.0, -1.0, 0.0, 1e20, -1e-20])
def test_rotation_of_parallel_and_opposite_vectors(factor):
    z, _, g = draw(2, 4)
    q = np.float32(factor) * z
    got = np.asarray(PULL["rotation"](q, z, g))
    assert np.isfinite(got).all()
    # Along z the map is known in any case: z goes to q.
    along = np.sum(z * np.asarray(PULL["rotation"](q, z, z / np.float32(1))), -1) / np.sum(
        z * z, -1
    )
    np.testing.assert_allclose(along, factor, rtol=1e-4)
    if factor > 0:
        np.testing.assert_allclose(got, factor * g, rtol=1e-3, atol=1e-4 * factor * abs(g).max())


def test_rotation_has_a_forward_derivative():
    z, q, g = (jnp.asarray(x) for x in draw(3, 3))
    _, change = jax.jvp(lambda x: RotationTrick()(q, x), (z,), (g,))
    other = jnp.asarray(draw(4, 3)[2])
    left, right = jnp.sum(change * other), jnp.sum(PULL["rotation"](q, z, other) * g)
    np.testing.assert_allclose(left, right, rtol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), power=st.sampled_from([-9, -3, 0, 10, 30]))
def test_unit_against_numpy(seed, power):
    z, _, g = draw(seed, 4)
    z = z * np.float32(10.0**power)
    out, pull = jax.vjp(unit, jnp.asarray(z))
    wide = z.astype(np.float64)
    size = np.linalg.norm(wide, axis=-1, keepdims=True)
    expected = wide / size
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    gradient = (g - expected * np.sum(expected * g, -1, keepdims=True)) / size
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], gradient, rtol=1e-3, atol=1e-4 / size.min())


@pytest.mark.parametrize("size", [0.0, 1e-40, -1e-40, 1e-13])
def test_unit_of_nothing_is_zero(size):
    out, pull = jax.vjp(unit, jnp.full((2, 3), size))
    assert not np.asarray(out).any()
    assert not np.asarray(pull(jnp.ones((2, 3)))[0]).any()


def test_unit_of_what_is_not_finite_is_seen():
    rows = jnp.array([[np.nan, 0.0], [np.inf, 1.0], [0.0, 0.0], [3e38, 3e38]])
    seen = np.isnan(np.asarray(unit(rows))).any(-1)
    np.testing.assert_array_equal(seen, [True, True, False, False])
    assert np.isnan(unit(rows)[0]).all()
    np.testing.assert_allclose(unit(rows)[3], 0.5**0.5, rtol=1e-6)
