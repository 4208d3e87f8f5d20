"""Nearest neighbours in a code book, in bounded memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

# Distances held at once; a chunk of the book is never narrower than a TPU's lanes.
_MAX_DISTANCES = 2**22
_MIN_CHUNK = 128


def nearest(
    latents: Float[Array, "tokens dim"], codebook: Float[Array, "codes dim"]
) -> Int32[Array, " tokens"]:
    """The index of the nearest entry in Euclidean distance; the first of equals.

    Compares `|c|^2 - 2 z.c` in float32, so entries closer to each other than about 3e-4 of their
    norm may be mistaken for one another. Latents that are not finite get some index in range.

    The book is walked in chunks, and the tokens are left whole: where they are sharded over
    devices they stay where they are. At most `tokens * chunk` distances exist at once.

    **Arguments:**

    - `latents`: any floating point type.
    - `codebook`: any floating point type, at least one entry.
    """
    latents, codebook = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (latents, codebook))
    tokens, (size, _) = latents.shape[0], codebook.shape
    chunk = min(size, max(_MIN_CHUNK, _MAX_DISTANCES // max(tokens, 1)))
    padding = -size % chunk
    norms = jnp.pad(jnp.sum(codebook**2, axis=-1), (0, padding), constant_values=jnp.inf)
    books = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, chunk, codebook.shape[1])
    norms = norms.reshape(-1, chunk)
    starts = jnp.arange(0, size, chunk, dtype=jnp.int32)

    def best_of(book, norm, start):
        products = jnp.matmul(latents, book.T, precision=jax.lax.Precision.HIGHEST)
        distances = norm - 2 * products
        index = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        return jnp.min(distances, axis=-1), start + index

    def step(best, chunk_of_book):
        distance, index = best
        new_distance, new_index = best_of(*chunk_of_book)
        closer = new_distance < distance
        return (
            jnp.where(closer, new_distance, distance),
            jnp.where(closer, new_index, index),
        ), None

    first = best_of(books[0], norms[0], starts[0])
    (_, index), _ = jax.lax.scan(step, first, (books[1:], norms[1:], starts[1:]))
    return index
