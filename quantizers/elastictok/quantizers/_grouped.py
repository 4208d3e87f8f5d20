"""Several codes per token, each for a part of the latent's dimensions."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput


@final
class Grouped(AbstractDiscreteQuantizer):
    """Product quantization (Jégou, Douze and Schmid 2011, section II.B): the latent is cut into `n`
    equal parts, and each part has a quantizer of its own. With a [`Residual`][] inside it is the
    group-residual quantization of HiFi-Codec (arXiv 2305.02765).

    Codes are `[tokens n * inner.streams]`, all those of the first part first, also for `n = 1`. The
    loss is the sum of the parts' losses, statistics are the tuple of theirs.

    All parts start as copies of `inner`, code books included: each sees other dimensions of the
    latents and is updated with its own statistics, so equal books part with the first update.
    """

    parts: tuple[AbstractDiscreteQuantizer, ...]

    def __init__(self, inner: AbstractDiscreteQuantizer, n: int):
        """**Arguments:**

        - `inner`: the quantizer of each part; latents are `n` times as wide as its own.
        - `n`: the number of parts, 1 or more.
        """
        if n < 1:
            raise ValueError(f"n is {n}: at least 1 part is needed.")

        def copy(leaf):
            return jnp.array(leaf) if eqx.is_array(leaf) else leaf

        # Copies of the arrays too: a training step that donates its state donates each only once.
        self.parts = tuple(jax.tree.map(copy, inner) for _ in range(n))

    @property
    def input_dim(self) -> int:
        return len(self.parts) * self.parts[0].input_dim

    @property
    def latent_dim(self) -> int:
        return len(self.parts) * self.parts[0].latent_dim

    @property
    def codebook_size(self) -> int:
        return self.parts[0].codebook_size

    @property
    def streams(self) -> int:
        return len(self.parts) * self.parts[0].streams

    def bound(self, latents: Float32[Array, "tokens width"]) -> Float32[Array, "tokens bounded"]:
        """Each part as its quantizer does."""
        cut = self._cut(latents)
        return jnp.concatenate([q.bound(x) for q, x in zip(self.parts, cut, strict=True)], axis=-1)

    def quantize(
        self,
        bounded: Float32[Array, "tokens bounded"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """All parts."""
        n = len(self.parts)
        keys = [None] * n if key is None else jax.random.split(key, n)
        outs = [
            part.quantize(x, keep, key=part_key)
            for part, x, part_key in zip(self.parts, self._cut(bounded), keys, strict=True)
        ]
        return QuantizerOutput(
            jnp.concatenate([out.latents for out in outs], axis=-1),
            _side_by_side([out.codes for out in outs if out.codes is not None]),
            sum((out.loss for out in outs), jnp.zeros((), jnp.float32)),
            tuple(out.statistics for out in outs),
        )

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, "tokens streams"]:
        """The codes of each part, as exact as `inner` is."""
        cut = self._cut(latents)
        return _side_by_side([q.to_codes(x) for q, x in zip(self.parts, cut, strict=True)])

    def from_codes(self, codes: Int[Array, "tokens streams"]) -> Float32[Array, "tokens dim"]:
        """The points of each part, side by side.

        **Raises:** `ValueError` unless there is one column per stream.
        """
        if codes.shape[1] != self.streams:
            raise ValueError(
                f"There are {codes.shape[1]} codes per token: give {self.streams}, "
                f"{self.parts[0].streams} for each of {len(self.parts)} parts."
            )
        cut = self._cut(codes)
        if self._flat:
            cut = [columns[:, 0] for columns in cut]
        points = [q.from_codes(x) for q, x in zip(self.parts, cut, strict=True)]
        return jnp.concatenate(points, axis=-1)

    @property
    def _flat(self) -> bool:
        """Whether codes of a part are `[tokens]`: one code per token can also be `[tokens 1]`."""
        part = self.parts[0]
        one = jax.ShapeDtypeStruct((1, part.latent_dim), jnp.float32)
        return len(eqx.filter_eval_shape(part.to_codes, one).shape) == 1

    def _cut(self, array: Array) -> list[Array]:
        return jnp.split(array, len(self.parts), axis=-1)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """The sum over the parts."""
        losses = [q.batch_loss(x) for q, x in zip(self.parts, statistics, strict=True)]
        return sum(losses, jnp.zeros((), jnp.float32))

    def update(self, statistics: PyTree) -> "Grouped":
        """Each part with its own statistics."""
        parts = tuple(q.update(x) for q, x in zip(self.parts, statistics, strict=True))
        return eqx.tree_at(lambda q: q.parts, self, parts)

    def trainable(self) -> PyTree[bool]:
        """As each part says."""
        parts = tuple(part.trainable() for part in self.parts)
        return eqx.tree_at(lambda q: q.parts, self, parts)


def _side_by_side(codes: list[Array]) -> Int32[Array, "tokens streams"]:
    return jnp.concatenate([c if c.ndim == 2 else c[:, None] for c in codes], axis=-1)
