"""No bottleneck but the width."""

from typing import final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._base import AbstractQuantizer, QuantizerOutput, check_width, keep_rows


@final
class Identity(AbstractQuantizer):
    """Continuous latents as they are: in float32, with dropped rows zero. No loss, no statistics,
    no codes: the plain autoencoder, to compare the others with.
    """

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}: at least 1 is needed.")

    @property
    def input_dim(self) -> int:
        return self.dim

    @property
    def latent_dim(self) -> int:
        return self.dim

    @property
    def bits_per_token(self) -> float | None:
        return None

    def __call__(
        self,
        latents: Float[Array, "tokens input_dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """Keep the kept rows.

        **Arguments:**

        - `latents`: the encoder's output.
        - `keep`: true for kept tokens.
        - `key`: not used.

        **Returns:** a [`QuantizerOutput`][].

        **Raises:** `ValueError` if the latents are not `dim` wide.
        """
        del key
        check_width(self, latents)
        return QuantizerOutput(keep_rows(latents, keep), None, jnp.zeros((), jnp.float32), ())
