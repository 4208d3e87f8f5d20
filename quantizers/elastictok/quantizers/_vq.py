"""Vector quantization with a code book that follows moving averages of the latents."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput, straight_through
from ._nearest import nearest

# How far a revived entry starts from the one that it shares tokens with, as a part of the way to
# its old place. Any small number above float32's resolution of distances will do.
_SPLIT = 0.01


class VQStatistics(eqx.Module):
    """What [`VQ`][] counts over kept tokens.

    **Fields:**

    - `counts`: how many tokens chose each entry.
    - `sums`: the sum of the latents that did.
    """

    counts: Float32[Array, " codes"]
    sums: Float32[Array, "codes dim"]


@final
class VQ(AbstractDiscreteQuantizer):
    """Vector quantization (van den Oord et al., arXiv 1711.00937) with the code book updated by
    exponential moving averages (appendix A.1 there), not by gradient.

    Each latent goes to the nearest entry, with a straight-through gradient. The loss is the
    commitment loss `commitment * |z - entry|^2` summed over kept tokens (the third term of their
    equation 3). `update` moves the averages `N` of counts and `m` of sums, and the book to `m / N`
    with `N` smoothed by `(N + epsilon) / (sum N + codes * epsilon) * sum N`.

    Entries that hardly any token chooses are revived by splitting the most used ones (Linde, Buzo
    and Gray 1980): the lightest entry, if its `N` is below `revival` times the mean, takes over
    half of the heaviest, if that is above the mean, and moves next to it; the second lightest and
    the second heaviest likewise, and so on. That needs no randomness and no batch of latents, so
    all devices agree. (With revival off, an entry that is never chosen drifts to the origin once
    its `N` is below `epsilon`; that is what smoothing does.)

    `trainable()` is false for all arrays.
    """

    codebook: Float[Array, "codes dim"]
    counts: Float[Array, " codes"]
    sums: Float[Array, "codes dim"]
    decay: float = eqx.field(static=True)
    commitment: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    revival: float = eqx.field(static=True)

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        key: PRNGKeyArray,
        decay: float = 0.99,
        commitment: float = 0.25,
        epsilon: float = 1e-5,
        revival: float = 0.01,
    ):
        """**Arguments:**

        - `codebook_size`: the number of entries, 2 or more, below 2**31.
        - `dim`: the width of the latents.
        - `key`: for the entries, drawn from a standard normal distribution.
        - `decay`: how much of the averages each step keeps, in [0, 1).
        - `commitment`: the weight of the commitment loss.
        - `epsilon`: the smoothing of counts.
        - `revival`: the part of the mean count below which an entry is revived, in [0, 0.5); 0
            turns that off.
        """
        if not 2 <= codebook_size < 2**31:
            raise ValueError(f"codebook_size is {codebook_size}: it must be in 2 .. {2**31 - 1}.")
        if dim < 1:
            raise ValueError(f"dim is {dim}: at least 1 is needed.")
        self.codebook = jax.random.normal(key, (codebook_size, dim), jnp.float32)
        self.counts = jnp.ones(codebook_size, jnp.float32)
        self.sums = self.codebook
        self.decay = decay
        self.commitment = commitment
        self.epsilon = epsilon
        self.revival = revival

    def __check_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}: it must be in [0, 1), for example 0.99.")
        if not self.commitment >= 0:
            raise ValueError(f"commitment is {self.commitment}: it must not be negative.")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}: it must be positive, for example 1e-5.")
        if not 0 <= self.revival < 0.5:
            raise ValueError(f"revival is {self.revival}: it must be in [0, 0.5); 0 is off.")

    @property
    def latent_dim(self) -> int:
        return self.codebook.shape[-1]

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[-2]

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the nearest entries."""
        return nearest(latents, self.codebook)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """The entries of these codes, without gradient to the book."""
        return jax.lax.stop_gradient(self.codebook[codes].astype(jnp.float32))

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The nearest entries, the commitment loss, and counts and sums per entry."""
        del key
        codes = self.to_codes(bounded)
        entries = self.from_codes(codes)
        distances = jnp.where(keep, jnp.sum((bounded - entries) ** 2, axis=-1), 0.0)
        seen = jnp.where(keep[:, None], jax.lax.stop_gradient(bounded), 0.0)
        statistics = VQStatistics(
            counts=jax.ops.segment_sum(keep.astype(jnp.float32), codes, self.codebook_size),
            sums=jax.ops.segment_sum(seen, codes, self.codebook_size),
        )
        latents = straight_through(entries, bounded)
        return QuantizerOutput(latents, codes, self.commitment * jnp.sum(distances), statistics)

    def update(self, statistics: PyTree) -> "VQ":
        """Move the averages and the book; a batch without kept tokens changes nothing.

        **Arguments:**

        - `statistics`: a [`VQStatistics`][] summed over the batch and all devices.
        """
        counts = self.decay * self.counts + (1 - self.decay) * statistics.counts
        sums = self.decay * self.sums + (1 - self.decay) * statistics.sums
        if self.revival > 0:
            counts, sums = self._revive(counts, sums)
        total = jnp.sum(counts)
        smoothed = (counts + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        new = (sums / smoothed[:, None], counts, sums)
        old = (self.codebook, self.counts, self.sums)
        seen = jnp.sum(statistics.counts) > 0
        chosen = jax.tree.map(lambda n, o: jnp.where(seen, n, o), new, old)
        return eqx.tree_at(lambda q: (q.codebook, q.counts, q.sums), self, chosen)

    def _revive(
        self, counts: Float32[Array, " codes"], sums: Float32[Array, "codes dim"]
    ) -> tuple[Float32[Array, " codes"], Float32[Array, "codes dim"]]:
        """Let the lightest entries share the tokens of the heaviest."""
        order = jnp.argsort(counts, stable=True)
        pairs = self.codebook_size // 2
        light, heavy = order[:pairs], order[::-1][:pairs]
        mean = jnp.mean(counts)
        dead = (counts[light] < self.revival * mean) & (counts[heavy] > mean)
        half = counts[heavy] / 2
        centre = sums[heavy] / counts[heavy][:, None]
        beside = centre + _SPLIT * (self.codebook[light] - centre)
        new_light = jnp.where(dead, half, counts[light])
        new_heavy = jnp.where(dead, half, counts[heavy])
        light_sums = jnp.where(dead[:, None], half[:, None] * beside, sums[light])
        heavy_sums = jnp.where(dead[:, None], half[:, None] * centre, sums[heavy])
        return (
            counts.at[light].set(new_light).at[heavy].set(new_heavy),
            sums.at[light].set(light_sums).at[heavy].set(heavy_sums),
        )

    def trainable(self) -> PyTree[bool]:
        """False everywhere: the book follows `update`."""
        return jax.tree.map(lambda _: False, self)

    def refined(self) -> "VQ":
        """This book at half its size. Different from this one, so that different pairs of codes
        have different sums; from there each stage follows its own averages.
        """
        return eqx.tree_at(lambda q: (q.codebook, q.sums), self, (self.codebook / 2, self.sums / 2))
