"""The bottleneck that is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.quantizers import Identity


def test_kept_rows_come_out_as_they_are():
    latents = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    keep = np.array([True, False, True, True, False])
    for dtype in (jnp.float32, jnp.bfloat16):
        z = jnp.asarray(latents, dtype)
        out = Identity(3)(z, jnp.asarray(keep))
        assert out.latents.dtype == jnp.float32
        np.testing.assert_array_equal(out.latents[keep], z[keep].astype(jnp.float32))
        assert not out.latents[~keep].any()
        assert out.codes is None
        assert out.loss == 0
        assert out.statistics == ()


def test_sizes():
    assert (Identity(3).input_dim, Identity(3).latent_dim) == (3, 3)
    assert Identity(3).bits_per_token is None
    with pytest.raises(ValueError, match="dim is 0: at least 1"):
        Identity(0)
