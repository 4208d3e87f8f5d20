"""Nearest neighbours in a code book, in bounded memory."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

# Distances held at once; a chunk of the book is never narrower than a TPU's lanes.
_MAX_DISTANCES = 2**22
_MIN_CHUNK = 128
# On a CPU those of a chunk are read several times and should not leave its caches.
_MAX_DISTANCES_CPU = 2**17
_MIN_CHUNK_CPU = 32


def nearest(
    latents: Float[Array, "tokens dim"],
    codebook: Float[Array, "codes dim"],
    *,
    unit: bool = False,
) -> Int32[Array, " tokens"]:
    """The index of the nearest entry in Euclidean distance; the first of equals.

    Compares `|c|^2 - 2 z.c` in float32, so entries closer to each other than about 3e-4 of their
    norm may be mistaken for one another. Latents that are not finite get some index in range.

    The book is walked in chunks, and the tokens are left whole: where they are sharded over
    devices they stay where they are. At most `tokens * chunk` distances exist at once.

    **Arguments:**

    - `latents`: any floating point type.
    - `codebook`: any floating point type, at least one entry.
    - `unit`: whether all entries are of length 1. Then only products are compared, and a latent of
        zeros gets the first entry, whatever the rounding of lengths.
    """
    latents, codebook = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (latents, codebook))
    norms = jnp.zeros(codebook.shape[0], jnp.float32) if unit else jnp.sum(codebook**2, axis=-1)
    tokens, size = max(latents.shape[0], 1), codebook.shape[0]
    chunk = min(size, max(_MIN_CHUNK, _MAX_DISTANCES // tokens))
    cpu_chunk = min(chunk, max(_MIN_CHUNK_CPU, _MAX_DISTANCES_CPU // tokens))
    if cpu_chunk == chunk:
        return _walk(latents, codebook, norms, chunk)
    return jax.lax.platform_dependent(
        latents,
        codebook,
        norms,
        cpu=functools.partial(_walk, chunk=cpu_chunk),
        default=functools.partial(_walk, chunk=chunk),
    )


def _walk(
    latents: Float32[Array, "tokens dim"],
    codebook: Float32[Array, "codes dim"],
    norms: Float32[Array, " codes"],
    chunk: int,
) -> Int32[Array, " tokens"]:
    """The nearest entries, `chunk` entries at a time."""
    size, dim = codebook.shape
    padding = -size % chunk
    norms = jnp.pad(norms, (0, padding), constant_values=jnp.inf).reshape(-1, chunk, 1)
    books = jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, chunk, dim)
    starts = jnp.arange(0, size, chunk, dtype=jnp.int32)
    places = jnp.arange(chunk, dtype=jnp.int32)[:, None]

    def best_of(book, norm, start):
        # Tokens along the rows and two plain minima: compilers vectorize that, and not an argmin.
        distances = norm - 2 * jnp.matmul(book, latents.T, precision=jax.lax.Precision.HIGHEST)
        closest = jnp.min(distances, axis=0)
        # No distance is equal to a NaN, so the last place is what a NaN gets.
        index = jnp.min(jnp.where(distances == closest, places, chunk - 1), axis=0)
        return closest, start + index

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
