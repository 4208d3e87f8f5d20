"""Rotary position embedding (arXiv 2104.09864) over the flattened token index."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Positions are split into digits of this many bits. Four of them hold every int32 position.
_DIGIT_BITS = 8
_DIGITS = 4


def rotary(
    positions: Int[Array, "tokens"], head_dim: int, theta: float
) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
    """Cosine and sine of `positions * theta**(-2 i / head_dim)` for each pair i.

    A float32 product of a position near a million and a frequency is off by hundredths of a
    radian. Instead, the angle's cosine and sine are put together by the addition theorem from
    tables made in float64, one for each digit of the position: within 1e-6 of float64 everywhere.

    **Arguments:**

    - `positions`: non-negative, any order.
    - `head_dim`: even.
    - `theta`: base of the frequencies.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding needs an even one")
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    digits = np.arange(1 << _DIGIT_BITS, dtype=np.float64)
    cos, sin = jnp.float32(1.0), jnp.float32(0.0)
    for place in range(_DIGITS):
        angles = (digits[:, None] * float(1 << (_DIGIT_BITS * place))) * frequencies
        digit = (positions >> (_DIGIT_BITS * place)) & ((1 << _DIGIT_BITS) - 1)
        c = jnp.asarray(np.cos(angles), jnp.float32)[digit]
        s = jnp.asarray(np.sin(angles), jnp.float32)[digit]
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return jnp.asarray(cos), jnp.asarray(sin)


def rotate(
    x: Float[Array, "tokens heads head_dim"],
    cos: Float[Array, "tokens pairs"],
    sin: Float[Array, "tokens pairs"],
) -> Float[Array, "tokens heads head_dim"]:
    """Rotates the interleaved pairs (2i, 2i+1) of every head, in float32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    c, s = cos[:, None, :], sin[:, None, :]
    turned = jnp.stack([even * c - odd * s, even * s + odd * c], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
