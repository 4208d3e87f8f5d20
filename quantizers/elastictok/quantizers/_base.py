"""What every quantizer is: the output, the abstract classes, and the two rules they all share.

The rules: a dropped token contributes exactly nothing (`keep_rows`), and rounding passes the
gradient through unchanged (`straight_through`).
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree


class QuantizerOutput(eqx.Module):
    """What a quantizer returns for one example.

    **Fields:**

    - `latents`: what the decoder sees; dropped rows are exactly zero.
    - `codes`: the integer code of each token (`[tokens streams]` for a quantizer that writes
        several codes per token), or `None` where latents are continuous. At dropped positions a
        code is in range and otherwise unspecified.
    - `loss`: an unweighted sum over the kept tokens of this example, in float32. Whoever trains
        divides and weights it.
    - `statistics`: sums over the kept tokens that only make sense for the whole batch. Add them
        over examples and devices, then hand them to `batch_loss` and `update`. `()` if there are
        none.
    """

    latents: Float32[Array, "tokens dim"]
    codes: Int[Array, " tokens"] | Int[Array, "tokens streams"] | None
    loss: Float32[Array, ""]
    statistics: PyTree


def keep_rows(
    latents: Float[Array, "tokens dim"], keep: Bool[Array, " tokens"]
) -> Float32[Array, "tokens dim"]:
    """The latents in float32 with dropped rows set to zero.

    It selects and never multiplies, so that an inf or NaN in a dropped row leaves no trace in the
    values or in the gradient.

    **Arguments:**

    - `latents`: any floating point type.
    - `keep`: true for kept tokens.
    """
    return jnp.where(keep[:, None], latents.astype(jnp.float32), 0.0)


def straight_through(
    quantized: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
) -> Float32[Array, "tokens dim"]:
    """Exactly the value of `quantized` with the gradient of `latents` (Bengio et al. 2013,
    arXiv 1308.3432).

    A NaN or inf among the latents comes out as NaN, so that a diverged encoder is seen and not
    hidden behind a valid code.
    """
    # The usual `latents + stop_gradient(quantized - latents)` is off by a rounding error, and then
    # `from_codes(codes)` would differ from the latents that the decoder was trained on.
    return jax.lax.stop_gradient(quantized) + (latents - jax.lax.stop_gradient(latents))


class AbstractQuantizer(eqx.Module):
    """The bottleneck between an encoder and a decoder, for one example; batch with `jax.vmap`.

    A subclass is final, works in float32 whatever comes in, and lets dropped tokens contribute
    exactly nothing to latents, loss, statistics and gradients. Subclass
    [`AbstractDiscreteQuantizer`][] where there are codes: it takes care of all of that.
    """

    @property
    @abc.abstractmethod
    def input_dim(self) -> int:
        """The width of the latents that go in."""

    @property
    @abc.abstractmethod
    def latent_dim(self) -> int:
        """The width of the latents that come out."""

    @property
    @abc.abstractmethod
    def bits_per_token(self) -> float | None:
        """Bits needed for the codes of one token with a flat code, `None` if continuous."""

    @abc.abstractmethod
    def __call__(
        self,
        latents: Float[Array, "tokens input_dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """Quantize one example.

        **Arguments:**

        - `latents`: the encoder's output.
        - `keep`: true for kept tokens.
        - `key`: randomness, for the quantizers that use any. Without it the result is
            deterministic, as at inference.

        **Returns:** a [`QuantizerOutput`][].
        """

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """A loss of the whole batch, added once per optimizer step. Default: 0.

        **Arguments:**

        - `statistics`: those of [`QuantizerOutput`][], summed over the batch and all devices.
            Gradients flow through them.
        """
        del statistics
        return jnp.zeros((), jnp.float32)

    def update(self, statistics: PyTree) -> "AbstractQuantizer":
        """The quantizer for the next step, called after the optimizer step. Default: itself.

        **Arguments:**

        - `statistics`: those of [`QuantizerOutput`][], summed over the batch and all devices.
        """
        del statistics
        return self

    def trainable(self) -> PyTree[bool]:
        """A tree of bools of the quantizer's own structure: true where an array is trained by
        gradient. Default: every floating point array.
        """
        return jax.tree.map(eqx.is_inexact_array, self)


class AbstractDiscreteQuantizer(AbstractQuantizer):
    """A quantizer with integer codes.

    A subclass says what its code book is: `latent_dim`, `codebook_size`, `to_codes`, `from_codes`,
    and if need be `bound`. It overrides `quantize` where there is a loss or there are statistics.
    The steps of a call are: zero the dropped rows, `bound`, `quantize`, zero the dropped rows.
    """

    @property
    @abc.abstractmethod
    def codebook_size(self) -> int:
        """The number of codes of one stream: every code is in `0 .. codebook_size - 1`."""

    @abc.abstractmethod
    def to_codes(
        self, latents: Float[Array, "tokens dim"]
    ) -> Int32[Array, " tokens"] | Int32[Array, "tokens streams"]:
        """The codes of the nearest points of the code book.

        **Arguments:**

        - `latents`: quantized latents, perhaps rounded to a narrower type since; or bounded ones.
            They are not bounded again.
        """

    @abc.abstractmethod
    def from_codes(
        self, codes: Int[Array, " tokens"] | Int[Array, "tokens streams"]
    ) -> Float32[Array, "tokens dim"]:
        """The points of the code book that these codes name. Codes out of range are unspecified."""

    @property
    def input_dim(self) -> int:
        return self.latent_dim

    @property
    def streams(self) -> int:
        """How many codes a token has."""
        return 1

    @property
    def bits_per_token(self) -> float | None:
        return self.streams * math.log2(self.codebook_size)

    def bound(self, latents: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
        """Squash any latents into the region that the code book covers. Default: no change."""
        return latents

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """Quantize latents that `bound` has already seen. Default: the nearest point, with a
        straight-through gradient, no loss and no statistics.

        **Arguments:**

        - `bounded`: bounded latents. Dropped rows hold finite values, of no meaning.
        - `keep`: true for kept tokens; for the loss and the statistics. Dropped rows of the
            returned latents are zeroed by the caller.
        - `key`: as in `__call__`.
        """
        del keep, key
        codes = self.to_codes(jax.lax.stop_gradient(bounded))
        latents = straight_through(self.from_codes(codes), bounded)
        return QuantizerOutput(latents, codes, jnp.zeros((), jnp.float32), ())

    def refined(self) -> "AbstractDiscreteQuantizer":
        """A quantizer, with as many codes, for what this one leaves: the next stage of a
        [`Residual`][elastictok.quantizers.Residual].

        **Raises:** `NotImplementedError` unless the subclass defines it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be a stage of Residual: define refined(), which returns "
            "the quantizer of the next, finer stage."
        )

    @property
    def nests(self) -> bool:
        """Whether a sum of stages (`self`, `self.refined()`, ...) stays nearest, among the points
        of `self`, to the point that it started from. Then stages can be read back off their sum.
        """
        return False

    def __call__(
        self,
        latents: Float[Array, "tokens input_dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """Quantize one example.

        **Arguments:**

        - `latents`: the encoder's output.
        - `keep`: true for kept tokens.
        - `key`: randomness, for the quantizers that use any.

        **Returns:** a [`QuantizerOutput`][].

        **Raises:** `ValueError` if the latents are not `input_dim` wide.
        """
        check_width(self, latents)
        out = self.quantize(self.bound(keep_rows(latents, keep)), keep, key=key)
        return QuantizerOutput(
            keep_rows(out.latents, keep), out.codes, out.loss, statistics=out.statistics
        )


def check_width(quantizer: AbstractQuantizer, latents: Float[Array, "tokens dim"]) -> None:
    """**Raises:** `ValueError` if the latents are not as wide as the quantizer needs."""
    if latents.shape[-1] != quantizer.input_dim:
        raise ValueError(
            f"{type(quantizer).__name__} takes latents of width {quantizer.input_dim}, not "
            f"{latents.shape[-1]}: project the encoder's output to {quantizer.input_dim}."
        )
