"""What quantizers with one bit per dimension share: codes and the entropy penalty."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PyTree

from ._base import QuantizerOutput, straight_through

_MAX_DIM = 30
# Probabilities are kept this far from 0 and 1, where the slope of the entropy is infinite.
_MARGIN = float(np.finfo(np.float32).eps)


class LFQStatistics(eqx.Module):
    """What [`LFQ`][] and [`BSQ`][] sum over kept tokens; gradients flow through it.

    **Fields:**

    - `count`: the number of tokens.
    - `entropy`: the entropies of the tokens' code distributions, in nats.
    - `probabilities`: the probability of each bit being set.
    """

    count: Float32[Array, ""]
    entropy: Float32[Array, ""]
    probabilities: Float32[Array, " dim"]


def check_bits(
    dim: int, not_negative: dict[str, float | int], positive: dict[str, float | int]
) -> None:
    """**Raises:** `ValueError` unless `2**dim` codes fit in int32 and the named values are what
    their group is called.
    """
    if not 1 <= dim <= _MAX_DIM:
        raise ValueError(
            f"dim is {dim}: it must be in 1 .. {_MAX_DIM}, so that 2**dim codes fit in "
            "int32; use Residual or Grouped for more bits."
        )
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}: it must not be negative.")
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: it must be positive.")


def codes_of_signs(latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
    """The sum of `2^i` over the dimensions `i` that are not negative."""
    bits = (latents >= 0).astype(jnp.int32)
    return jnp.sum(bits << np.arange(latents.shape[-1], dtype=np.int32), axis=-1, dtype=jnp.int32)


def corners_of_codes(
    codes: Int[Array, " tokens"], dim: int, scale: float | int
) -> Float32[Array, "tokens dim"]:
    """`+scale` for the bits that are set and `-scale` for the others."""
    bits = codes.astype(jnp.int32)[:, None] >> np.arange(dim, dtype=np.int32) & 1
    return jnp.where(bits == 1, jnp.float32(scale), jnp.float32(-scale))


def quantize_signs(
    bounded: Float32[Array, "tokens dim"],
    keep: Bool[Array, " tokens"],
    scale: float | int,
    temperature: float | int,
    commitment: float | int,
) -> QuantizerOutput:
    """The corners `-scale` or `+scale` by the signs, with a straight-through gradient; the loss
    `commitment * |z - q|^2`; and the sums for the entropy penalty, where a token chooses code `c`
    with probability `softmax(-|z - c|^2 / temperature)`.
    """
    codes = codes_of_signs(bounded)
    corners = corners_of_codes(codes, bounded.shape[-1], scale)
    distances = jnp.where(keep, jnp.sum((bounded - corners) ** 2, axis=-1), 0.0)
    logits = bounded * (4 * scale / temperature)
    entropies = jnp.sum(_entropy_of_logits(logits), axis=-1)
    probabilities = jnp.where(keep[:, None], jax.nn.sigmoid(logits), 0.0)
    statistics = LFQStatistics(
        count=jnp.sum(keep, dtype=jnp.float32),
        entropy=jnp.sum(jnp.where(keep, entropies, 0.0)),
        probabilities=jnp.sum(probabilities, axis=0),
    )
    latents = straight_through(corners, bounded)
    return QuantizerOutput(latents, codes, commitment * jnp.sum(distances), statistics)


def entropy_penalty(
    statistics: PyTree, weight: float | int, diversity: float | int
) -> Float32[Array, ""]:
    """`weight * (mean entropy of a token - diversity * entropy of the mean bits)`, in nats; 0
    without tokens.
    """
    count = jnp.maximum(statistics.count, 1.0)
    mean_entropy = statistics.entropy / count
    mean_bits = jnp.clip(statistics.probabilities / count, _MARGIN, 1 - _MARGIN)
    entropy_of_mean = jnp.sum(
        -mean_bits * jnp.log(mean_bits) - (1 - mean_bits) * jnp.log1p(-mean_bits)
    )
    penalty = weight * (mean_entropy - diversity * entropy_of_mean)
    return jnp.where(statistics.count > 0, penalty, 0.0)


def _entropy_of_logits(logits: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
    """The entropy in nats of a bit that is set with probability `sigmoid(logit)`."""
    # In terms of |logit| both terms are small for large logits, so nothing cancels.
    size = jnp.abs(logits)
    return jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
