"""What a backend is."""

import abc

import equinox as eqx
import jax
from jaxtyping import Array, Float

from elastictok.attention._masks import AbstractMask

# What a question of capability is asked of: a real array, or only its shape and type.
Shaped = Array | jax.ShapeDtypeStruct


class AbstractBackend(eqx.Module):
    """One way to compute attention.

    A small final object without arrays. `register` makes it known by its name; `attention` also
    takes the object itself.
    """

    name: eqx.AbstractVar[str]

    @abc.abstractmethod
    def reasons_against(self, q: Shaped, k: Shaped, v: Shaped, mask: AbstractMask) -> list[str]:
        """Why this call cannot run on this machine, one sentence each; empty if it can.

        Looks at shapes, types and the kind of mask only: the arguments may be traced, or
        `jax.ShapeDtypeStruct`s.
        """

    def lengths(self, q: Shaped, k: Shaped) -> tuple[int, int]:
        """How many queries and keys the mask speaks of: those that there are, unless the arrays are
        one device's part of a sequence."""
        return q.shape[0], k.shape[0]

    def is_specialist(self) -> bool:
        """Whether it is for some calls only, such as a few kinds of masks: then the default passes
        it over silently where it refuses, and does not warn that it falls back."""
        return False

    @abc.abstractmethod
    def __call__(
        self,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "keys kv_heads head_dim"],
        v: Float[Array, "keys kv_heads head_dim"],
        mask: AbstractMask,
        *,
        scale: float,
    ) -> Float[Array, "tokens heads head_dim"]:
        """Attention, as `attention` defines it. The shapes are checked and no length is 0."""


def unsupported_types(q: Shaped, k: Shaped, v: Shaped) -> list[str]:
    """The reason that every backend with float32 arithmetic has against wider types."""
    known = ("bfloat16", "float16", "float32")
    return [
        f"{name} is {x.dtype}, and it computes in float32: cast to one of {', '.join(known)}"
        for name, x in (("q", q), ("k", k), ("v", v))
        if x.dtype.name not in known
    ]
