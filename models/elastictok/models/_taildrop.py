"""Tail-drop policies: how many tokens of each block a training step keeps."""

import abc
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# The share of its tokens that InformationDrop expects a block to keep, at least and at most. As it
# is, one in 512 of the hardest blocks keeps fewer than half; further out, as good as none would.
_LEAST, _MOST = 0.1, 0.9


class AbstractTailDrop(eqx.Module):
    """Draws kept lengths inside the jitted training step.

    A policy that has to know how hard the blocks are says so by its `probe`: before it draws, the
    step then measures their errors and asks for the policy `informed` of them.
    """

    @property
    def probe(self) -> float | None:
        """At which share of the tokens the errors are measured, by one more pass of the model; None
        for a policy that needs none: there is no such pass then."""
        return None

    def informed(self, errors: Float[Array, "blocks"]) -> "AbstractTailDrop":
        """The policy that knows these errors: by default the same.

        **Arguments:**

        - `errors`: of the blocks of an example, divided by the mean of the batch: 1 is a block of
            ordinary difficulty. Finite, and at least 0.
        """
        return self

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


class PowerOfTwoDrop(AbstractTailDrop):
    """The powers of two within the bounds, and both bounds, equally often.

    From 4 to 64 tokens these are 4, 8, 16, 32 and 64; from 5 to 50, 5, 8, 16, 32 and 50. Every
    octave of lengths is trained alike, at one length each: nested dropout (arXiv 1402.0915) with
    the lengths of FlexTok (arXiv 2502.13967), which counts from 1.
    """

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        powers = (2**n for n in range(max_tokens.bit_length()))
        lengths = {min_tokens, max_tokens, *(n for n in powers if min_tokens < n < max_tokens)}
        return jax.random.choice(key, jnp.array(sorted(lengths), jnp.int32), (blocks,))


class InformationDrop(AbstractTailDrop):
    """Hard blocks keep more tokens and easy ones fewer; every length stays possible.

    The error of a block is the mean squared one of its pixels, as the model reconstructs it from a
    share `probe` of its tokens: the average of the weights where the run keeps one, else the
    weights before the step, without a gradient. Divided by its mean over the batch's valid blocks,
    on all devices, it says which share of its tokens the block is expected to keep,

        s = clip(share * error / mean, 0.1, 0.9),

    and with u uniform in [0, 1) the length is

        min_tokens + floor((max_tokens - min_tokens + 1) * u^(1/s - 1)),

    where the power has the mean s. For s = 1/2 that is `UniformDrop`.

    After InfoTok (arXiv 2512.16975), which gives a sample a number of tokens in proportion to its
    negative ELBO, and differs from it in this: a length is drawn around that number, where InfoTok
    takes it; the squared error stands for the ELBO, and is measured in the step and not by a
    tokenizer that was trained before; the batch's mean stands for the average over the data; tails
    are dropped and not the least informative positions; and the budget is that of a block. At
    inference, an allocation strategy decides as ever. A step takes one more forward pass.

    **Arguments:**

    - `share`: of the tokens that a block of ordinary difficulty keeps in the mean.
    - `probe`: share of the tokens that the error is measured at, in (0, 1].
    - `errors`: see `informed`; None for a policy that is to be told, as the step does.
    """

    share: float = eqx.field(default=0.5, static=True)
    probe: float = eqx.field(default=0.5, static=True)  # pyright: ignore[reportIncompatibleMethodOverride]
    errors: Float[Array, "blocks"] | None = eqx.field(default=None, repr=False)

    def __check_init__(self) -> None:
        if not _LEAST <= self.share <= _MOST:
            raise ValueError(f"share is {self.share}; it must be between {_LEAST} and {_MOST}")
        if not 0 < self.probe <= 1:
            raise ValueError(f"probe is {self.probe}; it must be more than 0 and at most 1")

    def informed(self, errors: Float[Array, "blocks"]) -> "InformationDrop":
        return dataclasses.replace(self, errors=errors)

    def __call__(
        self, key: Key[Array, ""], blocks: int, min_tokens: int, max_tokens: int
    ) -> Int[Array, "blocks"]:
        """**Raises:** `ValueError` if the policy does not know the errors of so many blocks."""
        if self.errors is None or self.errors.shape != (blocks,):
            known = "none" if self.errors is None else f"those of {self.errors.shape[0]}"
            raise ValueError(
                f"InformationDrop draws by the errors of {blocks} blocks and knows {known}; ask "
                "policy.informed(errors), as train_step does"
            )
        expected = jnp.clip(self.share * self.errors, _LEAST, _MOST)
        drawn = jax.random.uniform(key, (blocks,)) ** (1 / expected - 1)
        more = jnp.floor((max_tokens - min_tokens + 1) * drawn).astype(jnp.int32)
        return jnp.minimum(min_tokens + more, max_tokens)  # the power may be rounded to 1


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

    @property
    def probe(self) -> float | None:
        return self.inner.probe

    def informed(self, errors: Float[Array, "blocks"]) -> "WithFull":
        return dataclasses.replace(self, inner=self.inner.informed(errors))

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

    @property
    def probe(self) -> float | None:
        return self.inner.probe

    def informed(self, errors: Float[Array, "blocks"]) -> "ConditionDropout":
        return dataclasses.replace(self, inner=self.inner.informed(errors))

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
