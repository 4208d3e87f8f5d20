"""Vector quantization with a frozen code book and one learned map of all of it."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput
from ._estimators import AbstractEstimator, StraightThrough, check_residual
from ._nearest import nearest


@final
class SimVQ(AbstractDiscreteQuantizer):
    """Vector quantization with the code book `C W` (SimVQ, Zhu et al., arXiv 2411.02038, section 4
    and algorithm 1): `C`, drawn once, is never trained; the square matrix `W` is. A step for one
    entry so moves all of them, and none is left behind unused.

    Each latent goes to the nearest row of `C W`. The loss, summed over kept tokens, is that of VQ
    (van den Oord et al., arXiv 1711.00937, equation 3) with these rows as entries:
    `|sg(z) - c W|^2 + commitment * |z - sg(c W)|^2`. The first term is the only one that trains
    `W`. Statistics are empty. (The authors' code adds a bias to the map, which their formula does
    not have, nor has this.)

    All entries are computed once per call, `codes * dim * dim` multiplications; under `jax.vmap`
    once for the batch. `trainable()` is true for `W` alone.
    """

    base: Float[Array, "codes dim"]
    weight: Float[Array, "dim dim"]
    commitment: float = eqx.field(static=True)
    estimator: AbstractEstimator = StraightThrough()

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        key: PRNGKeyArray,
        commitment: float = 0.25,
        estimator: AbstractEstimator | None = None,
    ):
        """**Arguments:**

        - `codebook_size`: the number of entries, 2 or more, below 2**31.
        - `dim`: the width of the latents.
        - `key`: for `C`, drawn from a normal distribution of variance `1 / dim`, as the authors do.
            `W` starts as the identity.
        - `commitment`: the weight of the commitment loss.
        - `estimator`: how the gradient gets past the entries; [`StraightThrough`][] if `None`.
        """
        if not 2 <= codebook_size < 2**31:
            raise ValueError(f"codebook_size is {codebook_size}: it must be in 2 .. {2**31 - 1}.")
        if dim < 1:
            raise ValueError(f"dim is {dim}: at least 1 is needed.")
        self.base = jax.random.normal(key, (codebook_size, dim), jnp.float32) * dim**-0.5
        self.weight = jnp.eye(dim, dtype=jnp.float32)
        self.commitment = commitment
        self.estimator = StraightThrough() if estimator is None else estimator

    def __check_init__(self):
        if not self.commitment >= 0:
            raise ValueError(f"commitment is {self.commitment}: it must not be negative.")

    @property
    def latent_dim(self) -> int:
        return self.base.shape[-1]

    @property
    def codebook_size(self) -> int:
        return self.base.shape[-2]

    def entries(self) -> Float32[Array, "codes dim"]:
        """All entries, with gradient to `W`."""
        base = jax.lax.stop_gradient(self.base.astype(jnp.float32))
        # So that every program gives the same bits: the barrier, so that the product is taken of
        # all entries even where fewer are asked for or the arrays are constants; and the last bit
        # is rounded away, so that it cannot be fused with a sum that follows.
        base, weight = jax.lax.optimization_barrier((base, self.weight.astype(jnp.float32)))
        rows = jnp.matmul(base, weight, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=22)

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the nearest entries."""
        return nearest(latents, self.entries())

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """The entries of these codes, without gradient to `W`."""
        return jax.lax.stop_gradient(self.entries())[codes]

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The nearest entries, and both terms of the loss."""
        del key
        entries = self.entries()
        codes = nearest(bounded, entries)
        chosen = entries[codes]
        constant = jax.lax.stop_gradient
        distances = jnp.sum(
            (constant(bounded) - chosen) ** 2 + self.commitment * (bounded - constant(chosen)) ** 2,
            axis=-1,
        )
        loss = jnp.sum(jnp.where(keep, distances, 0.0))
        return QuantizerOutput(self.estimator(constant(chosen), bounded), codes, loss, ())

    def trainable(self) -> PyTree[bool]:
        """True for the learned map."""
        return eqx.tree_at(lambda q: q.weight, jax.tree.map(lambda _: False, self), True)

    def refined(self) -> "SimVQ":
        """The same with `C` at half its size, and a map of its own.

        **Raises:** `NotImplementedError` if the estimator is not [`StraightThrough`][].
        """
        check_residual(self.estimator, type(self).__name__)
        return eqx.tree_at(lambda q: q.base, self, self.base / 2)
