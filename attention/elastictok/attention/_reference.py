"""The definition: dense float32 attention in a dozen lines, for tests and for reading."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elastictok.attention._backend import AbstractBackend, Shaped, unsupported_types
from elastictok.attention._masks import AbstractMask


class Reference(AbstractBackend):
    """Dense attention in float32. Memory grows with queries times keys."""

    name: str = eqx.field(static=True, default="reference")

    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        return unsupported_types(q, k, v)

    def __call__(
        self,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "keys kv_heads head_dim"],
        v: Float[Array, "keys kv_heads head_dim"],
        mask: AbstractMask,
        *,
        scale: float,
    ) -> Float[Array, "tokens heads head_dim"]:
        (tokens, heads, _), (keys, kv_heads, _) = q.shape, k.shape
        with jax.default_matmul_precision("highest"):
            query = q.astype(jnp.float32)
            key, value = (
                jnp.repeat(x.astype(jnp.float32), heads // kv_heads, axis=1) for x in (k, v)
            )
            visible = mask.dense(tokens, keys)
            scores = jnp.einsum("thd,shd->hts", query, key) * scale
            scores = jnp.where(visible, scores, -jnp.inf)
            # The largest score only keeps exp in range. Where there is none, 0 keeps -inf - peak
            # defined, so that a row that sees nothing has weights 0 and not NaN.
            peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
            total = weights.sum(axis=-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1.0)
            return jnp.einsum("hts,shd->thd", weights, value).astype(q.dtype)
