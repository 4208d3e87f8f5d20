"""The continuous bottleneck: a diagonal Gaussian per token."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ._base import AbstractQuantizer, QuantizerOutput, check_width, keep_rows

_MIN_LOG_VARIANCE = -30.0
_MAX_LOG_VARIANCE = 20.0


@final
class GaussianVAE(AbstractQuantizer):
    """A diagonal Gaussian posterior against a standard normal prior (Kingma and Welling,
    arXiv 1312.6114).

    `2 * channels` go in: the means, then the log-variances, which are clipped to [-30, 20].
    `channels` come out: a sample if there is a `key`, else the mode. There are no codes.

    The loss is the KL divergence from the prior in nats, `(mean^2 + variance - 1 - log variance) /
    2` (appendix B there), summed over kept tokens and channels.
    """

    channels: int = eqx.field(static=True)

    def __check_init__(self):
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}: at least 1 is needed.")

    @property
    def input_dim(self) -> int:
        return 2 * self.channels

    @property
    def latent_dim(self) -> int:
        return self.channels

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
        """Sample, or take the mode of, one example.

        **Arguments:**

        - `latents`: means, then log-variances.
        - `keep`: true for kept tokens.
        - `key`: samples with it; takes the mode without.

        **Returns:** a [`QuantizerOutput`][].

        **Raises:** `ValueError` if the latents are not `2 * channels` wide.
        """
        check_width(self, latents)
        mean, log_variance = jnp.split(keep_rows(latents, keep), 2, axis=-1)
        log_variance = jnp.clip(log_variance, _MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)
        # A dropped row is zeros by now, so its divergence is 0 + 1 - 1 - 0, which is exactly 0.
        divergence = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        if key is None:
            out = mean
        else:
            noise = jax.random.normal(key, mean.shape, jnp.float32)
            out = keep_rows(mean + jnp.exp(log_variance / 2) * noise, keep)
        return QuantizerOutput(out, None, jnp.sum(divergence), ())
