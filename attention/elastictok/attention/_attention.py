"""The one function."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from elastictok.attention._backend import AbstractBackend
from elastictok.attention._masks import AbstractMask
from elastictok.attention._registry import choose


def attention(
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    mask: AbstractMask,
    *,
    implementation: str | AbstractBackend | None = None,
    scale: float | None = None,
) -> Float[Array, "tokens heads head_dim"]:
    """Masked scaled dot-product attention of one example; batch with `jax.vmap`.

    Scores, softmax and sums are float32 for bfloat16, float16 and float32 inputs. A query that sees
    no key gives 0, with gradient 0. Every backend has a reverse-mode gradient; forward mode and
    second derivatives are `"reference"`'s alone.

    **Arguments:**

    - `q`: queries.
    - `k`, `v`: keys and values. `kv_heads` divides `heads`; each key head serves as many
      neighbouring query heads (grouped-query attention, arXiv 2305.13245).
    - `mask`: which keys each query sees, such as `BlockCausal(512) & Segments(ids)`.
    - `implementation`: the name of a backend (see `backends`), or a backend. Default: the first
      that can run this call.
    - `scale`: what the scores are multiplied by. Default: `head_dim ** -0.5`.

    **Returns:**

    One vector per query and head, in the type of `q`.

    **Raises:**

    `ValueError` if the shapes do not fit each other or the mask; `RuntimeError` with all reasons if
    the named backend cannot run this call.
    """
    _check_shapes(q.shape, k.shape, v.shape)
    (tokens, _, head_dim), keys = q.shape, k.shape[0]
    backend = choose(implementation, q, k, v, mask)
    mask.check(*backend.lengths(q, k))
    if tokens == 0 or keys == 0 or head_dim == 0:
        return jnp.zeros_like(q)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    return backend(q, k, v, mask, scale=scale)


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    if not len(q) == len(k) == 3:
        raise ValueError(
            f"q has shape {q} and k {k}; both must be (length, heads, head_dim): use jax.vmap for "
            "a batch"
        )
    if k != v:
        raise ValueError(f"k has shape {k} and v {v}; they must be the same")
    if q[2] != k[2]:
        raise ValueError(f"q has head_dim {q[2]} and k {k[2]}; they must be the same")
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(
            f"q has {q[1]} heads and k {k[1]}; the number of key heads must divide the number of "
            "query heads"
        )
