"""How the gradient gets past the nearest entry of a code book, and lengths that are safe to divide
by."""

import abc
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from ._base import straight_through

# Vectors whose largest element is no larger than this have no direction.
_SHORTEST = 1e-12
# Beyond this a reciprocal is too small for a normal float32.
_LONGEST = 2.0**125
# The rotation trick would multiply gradients by more than a million times the entry's length below
# this length of a latent.
_SHORTEST_ROTATED = 1e-6
# Below this square of |z/|z| + q/|q||, rounding decides where the sum points.
_OPPOSITE = 1e-10


def unit(rows: Float32[Array, "rows dim"]) -> Float32[Array, "rows dim"]:
    """Rows at length 1. A row without an element above 1e-12 becomes zero, with gradient zero; a
    NaN makes its row NaN, and an inf itself.
    """
    size = jax.lax.stop_gradient(_size(rows))
    # A NaN is not smaller than anything, and so is seen.
    nothing = size <= _SHORTEST
    # The direction does not depend on the size, so that may be a constant to the gradient. With it
    # no square over- or underflows.
    scaled = jnp.where(nothing, 1.0, rows) / jnp.where(nothing, 1.0, size)
    length = jnp.sqrt(jnp.sum(scaled**2, axis=-1, keepdims=True))
    return jnp.where(nothing, 0.0, scaled / length)


def magnitude(rows: Float32[Array, "rows dim"]) -> Float32[Array, "rows 1"]:
    """The length of each row; not for differentiation."""
    size = _size(rows)
    scaled = rows / jnp.where(size > 0, size, 1.0)
    return size * jnp.sqrt(jnp.sum(scaled**2, axis=-1, keepdims=True))


def _size(rows: Float32[Array, "rows dim"]) -> Float32[Array, "rows 1"]:
    return jnp.minimum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), _LONGEST)


class AbstractEstimator(eqx.Module):
    """The gradient of quantized latents with respect to the latents, which has to be made up: the
    nearest entry does not change with small changes of the latents.

    Its value is exactly `quantized` (NaN for latents that are not finite), and no gradient reaches
    `quantized`.
    """

    @abc.abstractmethod
    def __call__(
        self, quantized: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, "tokens dim"]:
        """**Arguments:**

        - `quantized`: the entries.
        - `latents`: what they stand for, bounded.
        """


@final
class StraightThrough(AbstractEstimator):
    """The gradient of the latents, unchanged (Bengio et al. 2013, arXiv 1308.3432)."""

    def __call__(
        self, quantized: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, "tokens dim"]:
        return straight_through(quantized, latents)


@final
class RotationTrick(AbstractEstimator):
    """The gradient of `|q| / |z| R z` with `R` the rotation, in the plane of both, that takes the
    direction of the latent `z` to that of the entry `q`; `R` and the factor are constants (Fifty et
    al., arXiv 2410.06424, section 4.2). So the angle between gradient and entry becomes that
    between gradient and latent.

    `R = 1 - 2 r r' + 2 q z'` for unit `z` and `q` and `r = (z + q) / |z + q|`, two reflections.
    Where `z` and `q` point opposite ways the plane is not determined, and `R = 1 - 2 z z'`. Where
    `|z|` is below 1e-6 the gradient is straight-through.
    """

    def __call__(
        self, quantized: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, "tokens dim"]:
        return _rotated(jax.lax.stop_gradient(quantized), latents)


@jax.custom_jvp
def _rotated(quantized, latents):
    # The rule below is for derivatives alone: at inference the rotation costs nothing.
    return straight_through(quantized, latents)


@_rotated.defjvp
def _rotated_jvp(primals, tangents):
    quantized, latents = primals
    _, change = tangents
    q, z, long = unit(quantized), unit(latents), magnitude(latents)
    both = z + q
    square = jnp.sum(both**2, axis=-1, keepdims=True)
    r = both * jnp.where(square > _OPPOSITE, jax.lax.rsqrt(jnp.maximum(square, _OPPOSITE)), 0.0)
    along_r = jnp.sum(r * change, axis=-1, keepdims=True)
    along_z = jnp.sum(z * change, axis=-1, keepdims=True)
    turned = change - 2 * r * along_r + 2 * q * along_z
    short = long < _SHORTEST_ROTATED
    factor = magnitude(quantized) / jnp.where(short, 1.0, long)
    out = jnp.where(short, change, factor * turned)
    return straight_through(quantized, latents), out


def check_residual(estimator: AbstractEstimator, name: str) -> None:
    """**Raises:** `NotImplementedError` if a stage of Residual would ignore the estimator."""
    if not isinstance(estimator, StraightThrough):
        raise NotImplementedError(
            f"{name} has the estimator {type(estimator).__name__}: Residual passes the gradient of "
            "the sum of its stages straight through. Use StraightThrough() there."
        )
