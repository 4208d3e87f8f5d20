"""A quantizer of few dimensions between two linear maps."""

import math
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import (
    AbstractDiscreteQuantizer,
    AbstractQuantizer,
    QuantizerOutput,
    straight_through,
)

# The first 12 of float32's 24 significant bits, with sign and exponent.
_UPPER_BITS = 0xFFFFF000
_UNROLL = 16


@final
class Projected(AbstractDiscreteQuantizer):
    """Factorised codes (ViT-VQGAN, Yu et al., arXiv 2110.04627, section 3.2): latents are mapped
    to the few dimensions of another quantizer, quantized there, and mapped to the width that the
    decoder takes. Neither map has a bias.

    Codes, loss and statistics are those of the quantizer inside. Both maps are trained by
    gradient, which is the true one; inside it is what the quantizer says, and its own arrays are
    trained if it says so. (Normalised latents and entries, as in that paper, are a matter of the
    quantizer inside.)

    The map out is computed such that its result has the same bits in every compiled program, for
    any number of tokens and on any device: `from_codes(codes)` is what the decoder was given.
    """

    w_in: Float32[Array, "in_dim inner"]
    quantizer: AbstractDiscreteQuantizer
    w_out: Float32[Array, "inner out_dim"]

    def __init__(
        self, in_dim: int, quantizer: AbstractQuantizer, out_dim: int, *, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `in_dim`: the width of the latents that go in.
        - `quantizer`: the quantizer inside, a discrete one.
        - `out_dim`: the width of the latents that come out; not below that of the quantizer's, or
            codes could not be read back off them.
        - `key`: for the maps. The one in is drawn from a normal distribution with variance
            `1 / in_dim`; the one out has orthogonal rows of length
            `sqrt(out_dim / quantizer.latent_dim)`. Both keep the mean square of what they map.

        **Raises:** `ValueError` for a continuous quantizer or a width out of range.
        """
        if not isinstance(quantizer, AbstractDiscreteQuantizer):
            raise ValueError(
                f"{type(quantizer).__name__} is continuous: give a discrete quantizer. The "
                "encoder's own last projection and the decoder's first one do the same for "
                "continuous latents."
            )
        if in_dim < 1:
            raise ValueError(f"in_dim is {in_dim}: at least 1 is needed.")
        if out_dim < quantizer.latent_dim:
            raise ValueError(
                f"out_dim is {out_dim} and the latents of {type(quantizer).__name__} are "
                f"{quantizer.latent_dim} wide: codes could not be read back off fewer dimensions. "
                f"Take an out_dim of {quantizer.latent_dim} or more, or a narrower quantizer."
            )
        key_in, key_out = jax.random.split(key)
        shape_in, shape_out = (in_dim, quantizer.input_dim), (quantizer.latent_dim, out_dim)
        self.w_in = jax.random.normal(key_in, shape_in, jnp.float32) / math.sqrt(in_dim)
        orthogonal = jax.nn.initializers.orthogonal(math.sqrt(out_dim / quantizer.latent_dim))
        self.w_out = orthogonal(key_out, shape_out, jnp.float32)
        self.quantizer = quantizer

    @property
    def input_dim(self) -> int:
        return self.w_in.shape[-2]

    @property
    def latent_dim(self) -> int:
        return self.w_out.shape[-1]

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def streams(self) -> int:
        return self.quantizer.streams

    def bound(self, latents: Float32[Array, "tokens in_dim"]) -> Float32[Array, "tokens bounded"]:
        """Map to the quantizer's dimensions and bound there."""
        mapped = jnp.matmul(latents, self.w_in, precision=jax.lax.Precision.HIGHEST)
        return self.quantizer.bound(mapped)

    def quantize(
        self,
        bounded: Float32[Array, "tokens bounded"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """Quantize what `bound` made and map it out."""
        out = self.quantizer.quantize(bounded, keep, key=key)
        latents = _product(out.latents, self.w_out)
        return QuantizerOutput(latents, out.codes, out.loss, out.statistics)

    def to_codes(
        self, latents: Float[Array, "tokens dim"]
    ) -> Int32[Array, " tokens"] | Int32[Array, "tokens streams"]:
        """The codes of quantized latents: the map out is undone by least squares, then the
        quantizer inside reads its codes. As exact as that is, as long as the map out has full row
        rank.
        """
        # W_out = R^T Q^T, so x W_out = y has the least squares solution x = y Q R^-T.
        q, r = jnp.linalg.qr(self.w_out.T)
        along = jnp.matmul(latents.astype(jnp.float32), q, precision=jax.lax.Precision.HIGHEST)
        return self.quantizer.to_codes(jax.scipy.linalg.solve_triangular(r, along.T).T)

    def from_codes(
        self, codes: Int[Array, " tokens"] | Int[Array, "tokens streams"]
    ) -> Float32[Array, "tokens dim"]:
        """The quantizer's points, mapped out."""
        return _product(self.quantizer.from_codes(codes), self.w_out)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """That of the quantizer inside."""
        return self.quantizer.batch_loss(statistics)

    def update(self, statistics: PyTree) -> "Projected":
        """Updates the quantizer inside."""
        return eqx.tree_at(lambda q: q.quantizer, self, self.quantizer.update(statistics))

    def trainable(self) -> PyTree[bool]:
        """True for both maps; the rest as the quantizer inside says."""
        inner = self.quantizer.trainable()
        return eqx.tree_at(lambda q: (q.w_in, q.quantizer, q.w_out), self, (True, inner, True))


def _product(
    points: Float32[Array, "tokens inner"], weight: Float32[Array, "inner out_dim"]
) -> Float32[Array, "tokens out_dim"]:
    """The matrix product, the same bits in every program, with the ordinary gradient."""
    value = _exact_steps(jax.lax.stop_gradient(points), jax.lax.stop_gradient(weight))
    return straight_through(value, jnp.matmul(points, weight, precision=jax.lax.Precision.HIGHEST))


def _exact_steps(
    points: Float32[Array, "tokens inner"], weight: Float32[Array, "inner out_dim"]
) -> Float32[Array, "tokens out_dim"]:
    # A matrix product sums in an order that depends on the shapes, and a loop over products may or
    # may not be compiled to fused multiply-adds. Here the order is fixed, and the products of
    # halves of 12 bits are exact, so that fusing them changes nothing.
    def step(total, row):
        point, weights = row
        high, low = _halves(point[:, None])
        weight_high, weight_low = _halves(weights)
        total = total + low * weight_low
        total = total + low * weight_high
        total = total + high * weight_low
        return total + high * weight_high, None

    start = jnp.zeros((points.shape[0], weight.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, (points.T, weight), unroll=_UNROLL)[0]


def _halves(x: Array) -> tuple[Array, Array]:
    """Two numbers of at most 12 significant bits each with exactly this sum."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER_BITS)
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
