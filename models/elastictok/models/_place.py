"""Where in its block a token's cell lies: an embedding that works for any grid."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class PlaceEmbedding(eqx.Module):
    """A learned smooth function of a cell's place in its block, added to its token.

    Rotary embeddings tell distances alone; this one tells places, so that the first steps of
    training are not spent finding out where each token lies: a linear map of the cosine basis
    `cos(pi i u) cos(pi j v)` over height and width and `cos(pi k w)` over time, with coordinates
    from 0 to 1, so that one set of weights serves every frame size. Not in the paper.
    """

    weight: Float[Array, "features dim"]
    frequencies: int = eqx.field(static=True)

    def __init__(self, dim: int, *, frequencies: int, std: float, key: Key[Array, ""]):
        """**Arguments:**

        - `dim`: width of the stream.
        - `frequencies`: per axis; as many as the block has cells on an axis tell all cells apart.
        - `std`: of the normal initialisation.
        """
        if frequencies < 1:
            raise ValueError(f"frequencies is {frequencies}; it must be at least 1")
        features = frequencies * frequencies + frequencies - 1
        self.weight = std * jax.random.normal(key, (features, dim))
        self.frequencies = frequencies

    def __call__(self, coordinates: Float[Array, "tokens 3"]) -> Float[Array, "tokens dim"]:
        """**Arguments:**

        - `coordinates`: time, height and width of each token's cell, from 0 to 1.
        """
        orders = jnp.arange(self.frequencies)
        time, height, width = jnp.moveaxis(jnp.cos(jnp.pi * coordinates[..., None] * orders), 1, 0)
        space = (height[:, :, None] * width[:, None, :]).reshape(len(coordinates), -1)
        return jnp.concatenate([space, time[:, 1:]], axis=-1) @ self.weight
