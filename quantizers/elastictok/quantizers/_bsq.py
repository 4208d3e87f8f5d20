"""Binary spherical quantization: every dimension of a unit vector is one bit."""

import math
from typing import final

import equinox as eqx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput
from ._bits import check_bits, codes_of_signs, corners_of_codes, entropy_penalty, quantize_signs
from ._estimators import unit


@final
class BSQ(AbstractDiscreteQuantizer):
    """Binary spherical quantization (Zhao, Xiong and Krähenbühl, arXiv 2406.07548, section 4.1).

    A latent `z` is put on the unit sphere, `u = z / |z|`, and each of the `dim` dimensions goes to
    `-1 / sqrt(dim)` or `+1 / sqrt(dim)` by its sign (zero counts as positive), which is on the
    sphere too. So no error is larger than `|u - q| = sqrt(2 - 2 / sqrt(dim))`, the bound of the
    paper. The gradient is straight-through from the output to `u`, and that of the normalisation
    from there to `z`. A latent without an entry above 1e-12 in size counts as zero, and its
    gradient is zero. The code is the sum of `2^i` over the positive dimensions `i`.

    The loss is the commitment loss `commitment * |u - q|^2` summed over kept tokens. (The paper
    does without, because the error is bounded: `commitment=0`.)

    The entropy penalty is `batch_loss`: `entropy_weight * (mean entropy of a token's code -
    diversity * entropy of the mean code)`, where a token chooses code `c` with probability
    `softmax(-|u - c|^2 / temperature)`. On the sphere that is the paper's `exp(tau u . c)` over its
    sum, with `tau = 2 / temperature`, and a product over the bits, with
    `sigmoid(2 tau u_i / sqrt(dim))` for bit `i`. The first term is therefore a sum of `dim` binary
    entropies, exactly; for the second, as in the paper, the sum of the entropies of the `dim` mean
    bits is used, which is an upper bound. Statistics are [`LFQStatistics`][].

    It cannot be a stage of [`Residual`][]: what it leaves is not on the sphere.
    """

    dim: int = eqx.field(static=True)
    entropy_weight: float = eqx.field(static=True)
    diversity: float = eqx.field(static=True)
    commitment: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        entropy_weight: float | int = 0.1,
        diversity: float | int = 1.0,
        commitment: float | int = 0.25,
        temperature: float | int = 1.0,
    ):
        """**Arguments:**

        - `dim`: the number of bits, 1 to 30.
        - `entropy_weight`: the weight of the entropy penalty.
        - `diversity`: the weight, within it, of the entropy of the mean code (the paper's gamma).
        - `commitment`: the weight of the commitment loss.
        - `temperature`: of the distribution over codes, 2 over the paper's tau. At 1, as in the
            authors' code, a typical bit is set with probability `sigmoid(4 / dim)` or the opposite;
            with less the entropies are nearer to those of the codes.
        """
        self.dim = dim
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.commitment = commitment
        self.temperature = temperature

    def __check_init__(self):
        weights = ("entropy_weight", "diversity", "commitment")
        check_bits(
            self.dim,
            {name: getattr(self, name) for name in weights},
            {"temperature": self.temperature},
        )

    @property
    def latent_dim(self) -> int:
        return self.dim

    @property
    def codebook_size(self) -> int:
        return 2**self.dim

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.dim)

    def bound(self, latents: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
        """At unit length."""
        return unit(latents)

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the signs."""
        return codes_of_signs(latents)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """`+1 / sqrt(dim)` for the bits that are set and `-1 / sqrt(dim)` for the others."""
        return corners_of_codes(codes, self.dim, self._scale)

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The signs, the commitment loss, and the sums for the entropy penalty."""
        del key
        return quantize_signs(bounded, keep, self._scale, self.temperature, self.commitment)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """The entropy penalty, in nats; 0 for a batch without kept tokens.

        **Arguments:**

        - `statistics`: an [`LFQStatistics`][] summed over the batch and all devices.
        """
        return entropy_penalty(statistics, self.entropy_weight, self.diversity)
