"""Tail-drop policies: how many tokens of each block a training step keeps."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


class AbstractTailDrop(eqx.Module):
    """Draws kept lengths inside the jitted training step."""

    @abc.abstractmethod
    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        """Kept tokens of each block, independently drawn.

        **Arguments:**

        - `key`: of the step and example.
        - `blocks`: how many lengths.
        - `min_tokens`, `max_tokens`: bounds of a length, both allowed.
        """

    def told(
        self, key: Key[Array, ""], lengths: Int[Array, "blocks"], max_tokens: int
    ) -> Int[Array, "blocks"]:
        """The lengths that the encoder is told, where these tokens are kept: the same.

        **Arguments:**

        - `key`: the one that drew them.
        - `lengths`: as drawn.
        - `max_tokens`: of a block.
        """
        return lengths


class UniformDrop(AbstractTailDrop):
    """All lengths equally often: `l ~ U{min_tokens..max_tokens}` (2410.08368, algorithm 1)."""

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        return jax.random.randint(key, (blocks,), min_tokens, max_tokens + 1, dtype=jnp.int32)


class LogUniformDrop(AbstractTailDrop):
    """Every octave of lengths equally often: trains short lengths more than `UniformDrop` does."""

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        low, high = jnp.log(float(min_tokens)), jnp.log(max_tokens + 1.0)
        drawn = jnp.exp(jax.random.uniform(key, (blocks,), minval=low, maxval=high))
        return jnp.clip(jnp.floor(drawn).astype(jnp.int32), min_tokens, max_tokens)


class FixedDrop(AbstractTailDrop):
    """Always the same length (clipped to the bounds): trains a fixed-length baseline."""

    length: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; it must be at least 1")

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        return jnp.full((blocks,), min(max(self.length, min_tokens), max_tokens), jnp.int32)


class WithFull(AbstractTailDrop):
    """Another policy's lengths, but all tokens for a share of the blocks.

    A uniform length is hardly ever the full one, which is where most detail is to be learnt. Not in
    the paper.
    """

    inner: AbstractTailDrop
    share: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        choice, drawn = jax.random.split(key)
        full = jax.random.bernoulli(choice, self.share, (blocks,))
        return jnp.where(full, max_tokens, self.inner(drawn, blocks, min_tokens, max_tokens))

    def told(
        self, key: Key[Array, ""], lengths: Int[Array, "blocks"], max_tokens: int
    ) -> Int[Array, "blocks"]:
        return self.inner.told(jax.random.split(key)[1], lengths, max_tokens)


class ConditionDropout(AbstractTailDrop):
    """Another policy's lengths, but in a share of the blocks the encoder is not told them.

    It is told that all tokens are kept, as if nothing were dropped (the unconditioned encoder of
    2410.08368, section 4.3, is the one with a share of 1). A model trained so can be encoded once
    and cut at any length: `elastictok.inference.EncodeOnce`.
    """

    inner: AbstractTailDrop
    share: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        return self.inner(jax.random.split(key)[1], blocks, min_tokens, max_tokens)

    def told(
        self, key: Key[Array, ""], lengths: Int[Array, "blocks"], max_tokens: int
    ) -> Int[Array, "blocks"]:
        choice, drawn = jax.random.split(key)
        silent = jax.random.bernoulli(choice, self.share, lengths.shape)
        return jnp.where(silent, max_tokens, self.inner.told(drawn, lengths, max_tokens))
