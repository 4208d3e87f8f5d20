"""Several codes per token, each for what the ones before it left."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput, straight_through
from ._estimators import check_residual
from ._nearest import nearest
from ._simvq import SimVQ
from ._vq import VQ

# Each nested stage takes a factor of two or more out of float32's 24 bits.
_MAX_STAGES = 16
_MAX_ENUMERATED = 2**16


@final
class Residual(AbstractDiscreteQuantizer):
    """Residual quantization (SoundStream, Zeghidour et al., arXiv 2107.03312): stage `i` quantizes
    what stages `0 .. i - 1` left, and the latents are the sum of all stages.

    The first stage is `inner`, the next is `inner.refined()`, and so on. Latents are bounded once,
    by the first stage, and the remainder is taken against the *bounded* latents, so later stages
    refine what the first one rounded away rather than what it squashed. The codes of the first
    stage are those of `inner` alone. How stages get finer is the inner quantizer's business:

    - [`FSQ`][]: the later stages are grids of as many levels as the first, each laid out over one
      step of the stage before, centred. `n` stages of `L` levels are a grid of `L**n` points, and
      no error is larger than half its spacing. (Dividing by `L - 1`, as other libraries do, makes
      points of different codes coincide.)
    - [`LFQ`][]: each stage has half the scale of the one before. `n` stages are a grid of `2**n`
      points per dimension, from `-2` to `2` times the scale.
    - [`VQ`][]: each stage starts from the book of the one before at half its size, and follows its
      own averages.

    Codes are `[tokens n]`, also for `n = 1`. The gradient is straight-through from the sum to the
    bounded latents; a stage's loss and statistics see the latents through its remainder. The loss
    is the sum of the stages' losses, statistics are the tuple of theirs.
    """

    stages: tuple[AbstractDiscreteQuantizer, ...]

    def __init__(self, inner: AbstractDiscreteQuantizer, n: int):
        """**Arguments:**

        - `inner`: the first stage, with one code per token and a `refined` method.
        - `n`: the number of stages, 1 to 16.

        **Raises:** `ValueError` for another `n` or several codes per token; what `refined` raises,
        for a single stage too if the class does not define it.
        """
        if not 1 <= n <= _MAX_STAGES:
            raise ValueError(
                f"n is {n}: there can be 1 .. {_MAX_STAGES} stages; more than that float32 cannot "
                "tell apart."
            )
        if inner.streams != 1:
            raise ValueError(
                f"{type(inner).__name__} writes {inner.streams} codes per token: a stage of "
                "Residual must write one. Ask for more stages instead."
            )
        if type(inner).refined is AbstractDiscreteQuantizer.refined:
            inner.refined()  # the error, for a single stage too
        if isinstance(inner, VQ | SimVQ):
            check_residual(inner.estimator, type(inner).__name__)
        stages = [inner]
        for _ in range(n - 1):
            stages.append(stages[-1].refined())
        self.stages = tuple(stages)

    @property
    def latent_dim(self) -> int:
        return self.stages[0].latent_dim

    @property
    def codebook_size(self) -> int:
        return self.stages[0].codebook_size

    @property
    def streams(self) -> int:
        return len(self.stages)

    def bound(self, latents: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
        """As the first stage does."""
        return self.stages[0].bound(latents)

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """All stages in turn."""
        outs, rest = [], bounded
        keys = [None] * self.streams if key is None else jax.random.split(key, self.streams)
        for stage, stage_key in zip(self.stages, keys, strict=True):
            out = stage.quantize(rest, keep, key=stage_key)
            # Without stop_gradient the straight-through gradient of this stage would cancel the
            # gradient of every later loss.
            rest = rest - jax.lax.stop_gradient(out.latents)
            outs.append(out)
        codes = jnp.stack([out.codes for out in outs], axis=-1)
        latents = straight_through(self.from_codes(codes), bounded)
        loss = sum((out.loss for out in outs), jnp.zeros((), jnp.float32))
        return QuantizerOutput(latents, codes, loss, tuple(out.statistics for out in outs))

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, "tokens streams"]:
        """The codes of quantized latents.

        Exact for books that nest ([`FSQ`][], [`LFQ`][]), stage by stage. For other books with at
        most 2**16 sums in all, exact as long as float32 can tell the sums apart: all are compared.
        For still larger ones it is a greedy guess, stage by stage, whose sum is near the latents
        but need not be equal to them: keep the codes of the output instead.
        """
        latents = latents.astype(jnp.float32)
        nested = all(stage.nests for stage in self.stages)
        if nested or self.codebook_size**self.streams > _MAX_ENUMERATED:
            return self._peel(latents)
        table = self._all_codes()
        return table[nearest(latents, self.from_codes(table))]

    def from_codes(self, codes: Int[Array, "tokens streams"]) -> Float32[Array, "tokens dim"]:
        """The sums of the stages' points.

        **Arguments:**

        - `codes`: one column per stage. The first few columns alone are allowed too, and give the
            coarser result of as many stages.

        **Raises:** `ValueError` if there are no columns, or more than stages.
        """
        columns = codes.shape[1]
        if not 1 <= columns <= self.streams:
            raise ValueError(
                f"There are {columns} codes per token for {self.streams} stages: give 1 .. "
                f"{self.streams}."
            )
        total = self.stages[0].from_codes(codes[:, 0])
        for i, stage in enumerate(self.stages[1:columns], start=1):
            total = total + stage.from_codes(codes[:, i])
        return total

    def _peel(self, latents: Float32[Array, "tokens dim"]) -> Int32[Array, "tokens streams"]:
        """Codes stage by stage, each of what is left."""
        columns, rest = [], latents
        for stage in self.stages:
            codes = stage.to_codes(rest)
            rest = rest - stage.from_codes(codes)
            columns.append(codes)
        return jnp.stack(columns, axis=-1)

    def _all_codes(self) -> Int32[Array, "sums streams"]:
        """Every combination of codes."""
        size = self.codebook_size
        index = jnp.arange(size**self.streams, dtype=jnp.int32)
        return jnp.stack([index // size**i % size for i in range(self.streams)], axis=-1)

    def batch_loss(self, statistics: PyTree) -> Float32[Array, ""]:
        """The sum over the stages."""
        losses = [s.batch_loss(x) for s, x in zip(self.stages, statistics, strict=True)]
        return sum(losses, jnp.zeros((), jnp.float32))

    def update(self, statistics: PyTree) -> "Residual":
        """Each stage with its own statistics."""
        stages = tuple(s.update(x) for s, x in zip(self.stages, statistics, strict=True))
        return eqx.tree_at(lambda q: q.stages, self, stages)

    def trainable(self) -> PyTree[bool]:
        """As each stage says."""
        stages = tuple(stage.trainable() for stage in self.stages)
        return eqx.tree_at(lambda q: q.stages, self, stages)
