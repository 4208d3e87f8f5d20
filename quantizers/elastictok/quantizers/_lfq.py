"""Lookup-free quantization: every dimension is one bit."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput, straight_through

_MAX_DIM = 30
# Probabilities are kept this far from 0 and 1, where the slope of the entropy is infinite.
_MARGIN = float(np.finfo(np.float32).eps)


class LFQStatistics(eqx.Module):
    """What [`LFQ`][] sums over kept tokens; gradients flow through it.

    **Fields:**

    - `count`: the number of tokens.
    - `entropy`: the entropies of the tokens' code distributions, in nats.
    - `probabilities`: the probability of each bit being set.
    """

    count: Float32[Array, ""]
    entropy: Float32[Array, ""]
    probabilities: Float32[Array, " dim"]


@final
class LFQ(AbstractDiscreteQuantizer):
    """Lookup-free quantization (MAGVIT-v2, Yu et al., arXiv 2310.05737).

    Each dimension goes to `-scale` or `+scale` by its sign (zero counts as positive), with a
    straight-through gradient; the code is the sum of `2^i` over the positive dimensions `i`. The
    loss is the commitment loss `commitment * |z - q|^2` summed over kept tokens.

    The entropy penalty is `batch_loss`: `entropy_weight * (mean entropy of a token's code -
    diversity * entropy of the mean code)`, where a token chooses code `c` with probability
    `softmax(-|z - c|^2 / temperature)`. Those probabilities are a product over the bits, with
    `sigmoid(4 scale z_i / temperature)` for bit `i`, so the first term is a sum of `dim` binary
    entropies, exactly. For the second term the sum of the entropies of the `dim` mean bits is
    used. It is the entropy of the mean code where bits are independent over the batch and an
    upper bound otherwise (the same step as in binary spherical quantization, arXiv 2406.07548): it
    balances each bit, and does not see correlations between bits. In exchange nothing of size
    `2^dim` ever exists.
    """

    dim: int = eqx.field(static=True)
    entropy_weight: float = eqx.field(static=True)
    diversity: float = eqx.field(static=True)
    commitment: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment: float = 0.25,
        temperature: float = 1.0,
        scale: float = 1.0,
    ):
        """**Arguments:**

        - `dim`: the number of bits, 1 to 30.
        - `entropy_weight`: the weight of the entropy penalty.
        - `diversity`: the weight, within it, of the entropy of the mean code.
        - `commitment`: the weight of the commitment loss.
        - `temperature`: of the distribution over codes, in squared units of the latents. Common
            PyTorch implementations have 0.01, at which only latents very near zero feel the
            penalty.
        - `scale`: the distance of the code book from zero.
        """
        self.dim = dim
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.commitment = commitment
        self.temperature = temperature
        self.scale = scale

    def __check_init__(self):
        if not 1 <= self.dim <= _MAX_DIM:
            raise ValueError(
                f"dim is {self.dim}: it must be in 1 .. {_MAX_DIM}, so that 2**dim codes fit in "
                "int32; use Residual for more bits."
            )
        for name in ("entropy_weight", "diversity", "commitment"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative.")
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive.")

    @property
    def latent_dim(self) -> int:
        return self.dim

    @property
    def codebook_size(self) -> int:
        return 2**self.dim

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the signs."""
        bits = (latents >= 0).astype(jnp.int32)
        return jnp.sum(bits << np.arange(self.dim, dtype=np.int32), axis=-1, dtype=jnp.int32)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """`+scale` for the bits that are set and `-scale` for the others."""
        bits = codes.astype(jnp.int32)[:, None] >> np.arange(self.dim, dtype=np.int32) & 1
        return jnp.where(bits == 1, jnp.float32(self.scale), jnp.float32(-self.scale))

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The signs, the commitment loss, and the sums for the entropy penalty."""
        del key
        codes = self.to_codes(bounded)
        corners = self.from_codes(codes)
        distances = jnp.where(keep, jnp.sum((bounded - corners) ** 2, axis=-1), 0.0)
        logits = bounded * (4 * self.scale / self.temperature)
        entropies = jnp.sum(_entropy_of_logits(logits), axis=-1)
        probabilities = jnp.where(keep[:, None], jax.nn.sigmoid(logits), 0.0)
        statistics = LFQStatistics(
            count=jnp.sum(keep, dtype=jnp.float32),
            entropy=jnp.sum(jnp.where(keep, entropies, 0.0)),
            probabilities=jnp.sum(probabilities, axis=0),
        )
        latents = straight_through(corners, bounded)
        return QuantizerOutput(latents, codes, self.commitment * jnp.sum(distances), statistics)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """The entropy penalty, in nats; 0 for a batch without kept tokens.

        **Arguments:**

        - `statistics`: an [`LFQStatistics`][] summed over the batch and all devices.
        """
        count = jnp.maximum(statistics.count, 1.0)
        mean_entropy = statistics.entropy / count
        mean_bits = jnp.clip(statistics.probabilities / count, _MARGIN, 1 - _MARGIN)
        entropy_of_mean = jnp.sum(
            -mean_bits * jnp.log(mean_bits) - (1 - mean_bits) * jnp.log1p(-mean_bits)
        )
        penalty = self.entropy_weight * (mean_entropy - self.diversity * entropy_of_mean)
        return jnp.where(statistics.count > 0, penalty, 0.0)

    def refined(self) -> "LFQ":
        """The same at half the scale, and so a quarter of the temperature."""
        return LFQ(
            self.dim,
            entropy_weight=self.entropy_weight,
            diversity=self.diversity,
            commitment=self.commitment,
            temperature=self.temperature / 4,
            scale=self.scale / 2,
        )

    @property
    def nests(self) -> bool:
        return True


def _entropy_of_logits(logits: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
    """The entropy in nats of a bit that is set with probability `sigmoid(logit)`."""
    # In terms of |logit| both terms are small for large logits, so nothing cancels.
    size = jnp.abs(logits)
    return jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
