"""Lookup-free quantization: every dimension is one bit."""

from typing import final

import equinox as eqx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput
from ._bits import check_bits, codes_of_signs, corners_of_codes, entropy_penalty, quantize_signs


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
        weights = ("entropy_weight", "diversity", "commitment")
        check_bits(
            self.dim,
            {name: getattr(self, name) for name in weights},
            {"temperature": self.temperature, "scale": self.scale},
        )

    @property
    def latent_dim(self) -> int:
        return self.dim

    @property
    def codebook_size(self) -> int:
        return 2**self.dim

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the signs."""
        return codes_of_signs(latents)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """`+scale` for the bits that are set and `-scale` for the others."""
        return corners_of_codes(codes, self.dim, self.scale)

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The signs, the commitment loss, and the sums for the entropy penalty."""
        del key
        return quantize_signs(bounded, keep, self.scale, self.temperature, self.commitment)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """The entropy penalty, in nats; 0 for a batch without kept tokens.

        **Arguments:**

        - `statistics`: an [`LFQStatistics`][] summed over the batch and all devices.
        """
        return entropy_penalty(statistics, self.entropy_weight, self.diversity)

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
