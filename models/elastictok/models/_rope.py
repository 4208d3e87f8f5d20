"""Rotary position embedding (arXiv 2104.09864): over the token index, or over the token's cell."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._cells import Cells

# Positions are split into digits of this many bits. Four of them hold every int32 position.
_DIGIT_BITS = 8
_DIGITS = 4


def rotary(
    positions: Int[Array, "tokens"], frequencies: np.ndarray
) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
    """Cosine and sine of `positions * frequencies`.

    A float32 product of a position near a million and a frequency is off by hundredths of a
    radian. Instead, the angle's cosine and sine are put together by the addition theorem from
    tables made in float64, one for each digit of the position: within 1e-6 of float64 everywhere.

    **Arguments:**

    - `positions`: non-negative, any order.
    - `frequencies`: `f64[pairs]`, in radians per position.
    """
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


def frequencies(pairs: int, theta: float) -> np.ndarray:
    """`theta ** (-i / pairs)` for each pair i, in float64."""
    return theta ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))


class AbstractRotary(eqx.Module):
    """What the angles of queries and keys are made of."""

    @abc.abstractmethod
    def __call__(
        self, positions: Int[Array, "tokens"], cells: Cells, head_dim: int
    ) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
        """Cosine and sine for each token and pair of a head's channels.

        **Arguments:**

        - `positions`: index of each token in its sequence or stream.
        - `cells`: where the tokens of a block lie.
        - `head_dim`: even.
        """


class RankRotary(AbstractRotary):
    """The token's index in the sequence, as in the paper and the released models."""

    theta: float = eqx.field(static=True)

    def __call__(
        self, positions: Int[Array, "tokens"], cells: Cells, head_dim: int
    ) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
        return rotary(positions, frequencies(head_dim // 2, self.theta))


class CellRotary(AbstractRotary):
    """The time, height and width of the token's cell, each with a part of a head's pairs.

    Attention then knows how far apart two cells are in the picture, whatever the token order. By
    rank it would know their distance in the order only, which in coarse-to-fine order says little.
    A quarter of the pairs goes to time (which runs on from block to block), the rest to height
    and width. Not in the paper; axial rotary embeddings as in arXiv 2403.13298.
    """

    theta_space: float = eqx.field(static=True)
    theta_time: float = eqx.field(static=True)

    def __call__(
        self, positions: Int[Array, "tokens"], cells: Cells, head_dim: int
    ) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
        pairs = head_dim // 2
        time = pairs // 4
        height = (pairs - time) // 2
        where = cells.indices(positions)
        parts = [
            rotary(where[:, axis], frequencies(count, theta))
            for axis, count, theta in (
                (0, time, self.theta_time),
                (1, height, self.theta_space),
                (2, pairs - time - height, self.theta_space),
            )
        ]
        cos, sin = zip(*parts, strict=True)
        return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)
