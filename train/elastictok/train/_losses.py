"""Reconstruction losses: callables on arrays, told which blocks count."""

import abc
import math
from collections.abc import Callable
from typing import TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

# A number, or one for each step: a schedule such as `Cosine`.
Weight: TypeAlias = float | int | Float[Array, ""] | Callable[..., Float[Array, ""]]
_Loss: TypeAlias = Callable[..., Float[Array, ""]]


class AbstractLoss(eqx.Module):
    """A reconstruction loss of a whole batch.

    `fit` takes any callable of this signature; a class is only needed for what has parameters.
    """

    @property
    def whole_frames(self) -> bool:
        """Whether it looks at frames as pictures, and so has no use for patches that a decoder was
        asked for here and there (`elastictok.models.PatchSample`); no by default."""
        return False

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

    def at(self, step: Int[ArrayLike, ""]) -> "AbstractLoss":
        """The loss of a step, for those that change during a run; itself by default."""
        return self


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


@final
class Sum(AbstractLoss):
    """Several losses, each with its weight: `Sum((1.0, MSE()), (0.1, Perceptual(lpips)))`.

    A weight may be a schedule: a function of the step, such as `Cosine(steps)`. A step evaluates it
    by `at` before it calls the loss.
    """

    terms: tuple[tuple[Weight, _Loss], ...]

    def __init__(self, *terms: tuple[Weight, _Loss]):
        """**Arguments:**

        - `terms`: `(weight, loss)` each; any callable like `AbstractLoss` is a loss.
        """
        if not terms:
            raise ValueError("a Sum of no losses trains nothing; give it (weight, loss) pairs")
        for weight, loss in terms:
            if not callable(loss):
                raise ValueError(f"{loss!r} is no loss; a term of Sum is (weight, loss)")
            if isinstance(weight, AbstractLoss):
                raise ValueError(f"{weight!r} is no weight; a term of Sum is (weight, loss)")
            if isinstance(weight, float | int) and not math.isfinite(weight):
                raise ValueError(f"the weight of {loss!r} is {weight}; give a finite number")
        self.terms = terms

    @property
    def whole_frames(self) -> bool:
        return any(loss.whole_frames for _, loss in self.terms if isinstance(loss, AbstractLoss))

    def at(self, step: Int[ArrayLike, ""]) -> "Sum":
        """The same losses with their weights of a step, those inside other sums included."""
        terms: list[tuple[Weight, _Loss]] = []
        for weight, loss in self.terms:
            now = weight(step) if callable(weight) else weight
            terms.append((now, loss.at(step) if isinstance(loss, AbstractLoss) else loss))
        return Sum(*terms)

    def __call__(
        self,
        prediction: Float[Array, "batch blocks frames height width 3"],
        target: Float[Array, "batch blocks frames height width 3"],
        valid: Bool[Array, "batch blocks"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """The weighted sum; each loss gets a key of its own, if there is one.

        **Raises:** `ValueError` if a weight is still a schedule.
        """
        count = len(self.terms)
        keys = [None] * count if key is None else jax.random.split(key, count)
        total = jnp.zeros(())
        for (weight, loss), own in zip(self.terms, keys, strict=True):
            if callable(weight):
                raise ValueError(
                    f"the weight of {loss!r} is a schedule, {weight!r}, and has no value without a "
                    "step; call loss.at(step)(...) instead of loss(...)"
                )
            total += weight * loss(prediction, target, valid, key=own)
        return total


def mean_over_valid(
    values: Float[Array, "batch blocks"], valid: Bool[Array, "batch blocks"]
) -> Float[Array, ""]:
    """Mean of one value per block over the valid blocks of a batch; 0 if there is none."""
    total = jnp.sum(jnp.where(valid, values, 0))
    return total / jnp.maximum(jnp.sum(valid), 1)
