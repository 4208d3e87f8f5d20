"""Reconstruction losses: callables on arrays, told which blocks count."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


class AbstractLoss(eqx.Module):
    """A reconstruction loss of a whole batch.

    `fit` takes any callable of this signature; a class is only needed for what has parameters.
    """

    @abc.abstractmethod
    def __call__(
        self,
        prediction: Float[Array, "batch blocks frames height width 3"],
        target: Float[Array, "batch blocks frames height width 3"],
        valid: Bool[Array, "batch blocks"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """**Arguments:**

        - `prediction`, `target`: pixels in [-1, 1]. `fit` sets both to zero in blocks that are not
            valid, so that nothing computed from those has a value or a gradient.
        - `valid`: the blocks to average over.
        - `key`: of this step, for losses that look at a random part.

        **Returns:** one number, small when the prediction is good.
        """


class MSE(AbstractLoss):
    """Mean squared error over the pixels of valid blocks (arXiv 2410.08368, section 3)."""

    def __call__(
        self,
        prediction: Float[Array, "batch blocks frames height width 3"],
        target: Float[Array, "batch blocks frames height width 3"],
        valid: Bool[Array, "batch blocks"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        square = jnp.square(prediction - target)
        return mean_over_valid(jnp.mean(square, axis=(2, 3, 4, 5)), valid)


class L1(AbstractLoss):
    """Mean absolute error over the pixels of valid blocks."""

    def __call__(
        self,
        prediction: Float[Array, "batch blocks frames height width 3"],
        target: Float[Array, "batch blocks frames height width 3"],
        valid: Bool[Array, "batch blocks"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        absolute = jnp.abs(prediction - target)
        return mean_over_valid(jnp.mean(absolute, axis=(2, 3, 4, 5)), valid)


def mean_over_valid(
    values: Float[Array, "batch blocks"], valid: Bool[Array, "batch blocks"]
) -> Float[Array, ""]:
    """Mean of one value per block over the valid blocks of a batch; 0 if there is none."""
    total = jnp.sum(jnp.where(valid, values, 0))
    return total / jnp.maximum(jnp.sum(valid), 1)
