import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.models import rotary, rotate


@pytest.mark.parametrize("theta", [1e4, 5e6, 5e7])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_angles_are_within_a_millionth_of_float64_up_to_a_million(theta, head_dim):
    positions = np.unique(
        np.concatenate(
            [
                np.arange(300),
                np.random.default_rng(0).integers(0, 1 << 20, 2000),
                np.array([4095, 4096, 65535, 65536, (1 << 20) - 1, 1 << 20]),
            ]
        )
    )
    cos, sin = rotary(jnp.asarray(positions, jnp.int32), head_dim, theta)
    exponents = -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    angles = positions[:, None].astype(np.float64) * theta**exponents
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-6)


@given(shift=st.integers(0, 100_000), seed=st.integers(0, 9))
def test_scores_depend_on_the_distance_alone(shift, seed):
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.normal(size=(4, 1, 8)), jnp.float32) for _ in range(2))

    def scores(offset):
        cos, sin = rotary(jnp.arange(4, dtype=jnp.int32) + offset, 8, 100.0)
        return np.einsum("qhd,khd->qk", rotate(q, cos, sin), rotate(k, cos, sin))

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-5)


def test_rotation_turns_interleaved_pairs():
    x = jnp.asarray([[[1.0, 0.0, 0.0, 1.0]]])
    cos, sin = jnp.asarray([[0.0, 1.0]]), jnp.asarray([[1.0, 0.0]])
    np.testing.assert_array_equal(rotate(x, cos, sin), [[[0.0, 1.0, 0.0, 1.0]]])


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="head_dim is 7"):
        rotary(jnp.arange(3), 7, 1e4)
