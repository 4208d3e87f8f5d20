"""Vector quantization with a code book that follows the latents."""

import abc
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray, PyTree

from ._base import AbstractDiscreteQuantizer, QuantizerOutput
from ._estimators import AbstractEstimator, StraightThrough, check_residual, unit
from ._nearest import nearest

# How far a revived entry starts from the one that it shares tokens with, as a part of the way to
# its old place. Any small number above float32's resolution of distances will do.
_SPLIT = 0.01


# While a book is placed, entries with less than this part of the mean count are moved.
_LIGHT = 0.25


class VQStatistics(eqx.Module):
    """What [`VQ`][] counts over kept tokens.

    **Fields:**

    - `counts`: how many tokens chose each entry.
    - `sums`: the sum of the latents that did.
    - `squares`: the sum of the squares of all latents, for [`KMeansStart`][]; else `None`.
    """

    counts: Float32[Array, " codes"]
    sums: Float32[Array, "codes dim"]
    squares: Float32[Array, " dim"] | None = None


class AbstractBook(eqx.Module):
    """How the entries of a [`VQ`][] come to follow the latents."""

    @property
    @abc.abstractmethod
    def trained(self) -> bool:
        """Whether the entries are trained by gradient."""

    @abc.abstractmethod
    def loss(
        self, entries: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, " tokens"]:
        """What draws the chosen entries to the latents, per token.

        **Arguments:**

        - `entries`: with gradient to the book.
        - `latents`: constants.
        """

    @abc.abstractmethod
    def sums(
        self,
        averaged: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """Where the entries stand after a step, times their counts.

        **Arguments:**

        - `averaged`: the moving average of the sums of latents.
        - `codebook`: the entries before.
        - `counts`: the moving average of the counts.
        """

    @abc.abstractmethod
    def entries(
        self,
        sums: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
        smoothed: Float32[Array, " codes"],
        revived: Bool[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """The entries after a step.

        **Arguments:**

        - `sums`: what `sums` returned, revived entries moved.
        - `codebook`: the entries before.
        - `counts`: likewise the counts.
        - `smoothed`: the counts, smoothed.
        - `revived`: which entries were moved next to others.
        """


@final
class MovingAverage(AbstractBook):
    """Entries are moving averages of the latents that chose them (van den Oord et al., arXiv
    1711.00937, appendix A.1): not trained by gradient.
    """

    @property
    def trained(self) -> bool:
        return False

    def loss(
        self, entries: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, " tokens"]:
        """None."""
        del latents
        return jnp.zeros(entries.shape[0], jnp.float32)

    def sums(
        self,
        averaged: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """The averages."""
        del codebook, counts
        return averaged

    def entries(
        self,
        sums: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
        smoothed: Float32[Array, " codes"],
        revived: Bool[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """Sums by smoothed counts."""
        del codebook, counts, revived
        return sums / smoothed[:, None]


@final
class Gradient(AbstractBook):
    """Entries are trained by the second term of the loss (van den Oord et al., arXiv 1711.00937,
    equation 3): `weight * |sg(z) - entry|^2`, summed over kept tokens.

    Only revived entries are moved by `update`. What the optimizer knows of their past is not reset.
    """

    weight: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if not self.weight > 0:
            raise ValueError(
                f"weight is {self.weight}: it must be positive, or no entry would ever move."
            )

    @property
    def trained(self) -> bool:
        return True

    def loss(
        self, entries: Float32[Array, "tokens dim"], latents: Float32[Array, "tokens dim"]
    ) -> Float32[Array, " tokens"]:
        """The second term."""
        return self.weight * jnp.sum((latents - entries) ** 2, axis=-1)

    def sums(
        self,
        averaged: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """Entries stay where the optimizer put them."""
        del averaged
        return counts[:, None] * codebook

    def entries(
        self,
        sums: Float32[Array, "codes dim"],
        codebook: Float32[Array, "codes dim"],
        counts: Float32[Array, " codes"],
        smoothed: Float32[Array, " codes"],
        revived: Bool[Array, " codes"],
    ) -> Float32[Array, "codes dim"]:
        """The same entries, to the bit, except those that were revived."""
        del smoothed
        return jnp.where(revived[:, None], sums / counts[:, None], codebook)


@final
class KMeansStart(eqx.Module):
    """The first `steps` updates of a [`VQ`][] place its book on the data.

    The first one lays out the entries, as they were drawn, with the mean and the standard deviation
    of the batch, dimension by dimension. Each later one is a step of Lloyd's algorithm on its
    batch: entries move to the mean of the latents that chose them, and entries with less than a
    quarter of the mean count move next to the heaviest ones (see [`VQ`][]). All of that takes sums
    over the batch only, so all devices agree. A batch with nothing kept is no step.

    **Fields:**

    - `steps`: how many updates, 1 or more; about 10 are enough.
    """

    steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if not self.steps >= 1:
            raise ValueError(f"steps is {self.steps}: it must be at least 1; pass no start at all.")


@final
class VQ(AbstractDiscreteQuantizer):
    """Vector quantization (van den Oord et al., arXiv 1711.00937).

    Each latent goes to the nearest entry; `estimator` says how the gradient gets past it. The loss
    is the commitment loss `commitment * |z - entry|^2` summed over kept tokens (the third term of
    their equation 3), and what `book` adds to it.

    By default the book follows exponential moving averages (appendix A.1 there): `update` moves the
    averages `N` of counts and `m` of sums, and the book to `m / N` with `N` smoothed by
    `(N + epsilon) / (sum N + codes * epsilon) * sum N`. With [`Gradient`][] it is trained by
    gradient, and only `N` is averaged.

    Entries that hardly any token chooses are revived by splitting the most used ones (Linde, Buzo
    and Gray 1980): the lightest entry, if its `N` is below `revival` times the mean, takes over
    half of the heaviest, if that is above the mean, and moves next to it; the second lightest and
    the second heaviest likewise, and so on. That needs no randomness and no batch of latents, so
    all devices agree. (With revival off, an entry of moving averages that is never chosen drifts to
    the origin once its `N` is below `epsilon`; that is what smoothing does.)

    With `cosine`, latents and entries are compared, and entries returned, at length 1 (ViT-VQGAN,
    Yu et al., arXiv 2110.04627, section 3.2). Latents shorter than about 1e-12 become zero.

    `trainable()` is true for the code book of [`Gradient`][], false for everything else.
    """

    codebook: Float[Array, "codes dim"]
    counts: Float[Array, " codes"]
    sums: Float[Array, "codes dim"]
    decay: float = eqx.field(static=True)
    commitment: float = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    revival: float = eqx.field(static=True)
    book: AbstractBook = MovingAverage()
    cosine: bool = eqx.field(static=True, default=False)
    start: KMeansStart | None = None
    estimator: AbstractEstimator = StraightThrough()
    started: Int32[Array, ""] | None = None

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        key: PRNGKeyArray,
        decay: float = 0.99,
        commitment: float = 0.25,
        epsilon: float = 1e-5,
        revival: float = 0.01,
        book: AbstractBook | None = None,
        cosine: bool = False,
        start: KMeansStart | None = None,
        estimator: AbstractEstimator | None = None,
    ):
        """**Arguments:**

        - `codebook_size`: the number of entries, 2 or more, below 2**31.
        - `dim`: the width of the latents.
        - `key`: for the entries, drawn from a standard normal distribution.
        - `decay`: how much of the averages each step keeps, in [0, 1).
        - `commitment`: the weight of the commitment loss.
        - `epsilon`: the smoothing of counts.
        - `revival`: the part of the mean count below which an entry is revived, in [0, 0.5); 0
            turns that off.
        - `book`: how the entries follow the latents; [`MovingAverage`][] if `None`.
        - `cosine`: whether only directions count.
        - `start`: how the first updates place the book on the data; not at all if `None`.
        - `estimator`: how the gradient gets past the entries; [`StraightThrough`][] if `None`.
        """
        if not 2 <= codebook_size < 2**31:
            raise ValueError(f"codebook_size is {codebook_size}: it must be in 2 .. {2**31 - 1}.")
        if dim < 1:
            raise ValueError(f"dim is {dim}: at least 1 is needed.")
        drawn = jax.random.normal(key, (codebook_size, dim), jnp.float32)
        self.codebook = unit(drawn) if cosine else drawn
        self.counts = jnp.ones(codebook_size, jnp.float32)
        self.sums = self.codebook
        self.decay = decay
        self.commitment = commitment
        self.epsilon = epsilon
        self.revival = revival
        self.book = MovingAverage() if book is None else book
        self.cosine = cosine
        self.start = start
        self.estimator = StraightThrough() if estimator is None else estimator
        self.started = None if start is None else jnp.zeros((), jnp.int32)

    def __check_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}: it must be in [0, 1), for example 0.99.")
        if not self.commitment >= 0:
            raise ValueError(f"commitment is {self.commitment}: it must not be negative.")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}: it must be positive, for example 1e-5.")
        if not 0 <= self.revival < 0.5:
            raise ValueError(f"revival is {self.revival}: it must be in [0, 0.5); 0 is off.")

    @property
    def latent_dim(self) -> int:
        return self.codebook.shape[-1]

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[-2]

    def entries(self) -> Float32[Array, "codes dim"]:
        """All entries as they are compared and returned, with gradient to the book if that is
        trained by gradient.
        """
        book = self.codebook.astype(jnp.float32)
        if not self.book.trained:
            book = jax.lax.stop_gradient(book)
        return _unit_entries(book) if self.cosine else book

    def bound(self, latents: Float32[Array, "tokens dim"]) -> Float32[Array, "tokens dim"]:
        """At length 1 with `cosine`, else unchanged."""
        return unit(latents) if self.cosine else latents

    def to_codes(self, latents: Float[Array, "tokens dim"]) -> Int32[Array, " tokens"]:
        """The codes of the nearest entries."""
        return nearest(latents, self.entries(), unit=self.cosine)

    def from_codes(self, codes: Int[Array, " tokens"]) -> Float32[Array, "tokens dim"]:
        """The entries of these codes, without gradient to the book."""
        return jax.lax.stop_gradient(self.entries())[codes]

    def quantize(
        self,
        bounded: Float32[Array, "tokens dim"],
        keep: Bool[Array, " tokens"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> QuantizerOutput:
        """The nearest entries, the loss, and counts and sums per entry."""
        del key
        entries = self.entries()
        codes = nearest(bounded, entries, unit=self.cosine)
        chosen = entries[codes]
        points = jax.lax.stop_gradient(chosen)
        constant = jax.lax.stop_gradient(bounded)
        distances = jnp.where(keep, jnp.sum((bounded - points) ** 2, axis=-1), 0.0)
        drawn = jnp.where(keep, self.book.loss(chosen, constant), 0.0)
        seen = jnp.where(keep[:, None], constant, 0.0)
        statistics = VQStatistics(
            counts=jax.ops.segment_sum(keep.astype(jnp.float32), codes, self.codebook_size),
            sums=jax.ops.segment_sum(seen, codes, self.codebook_size),
            squares=None if self.start is None else jnp.sum(seen**2, axis=0),
        )
        loss = self.commitment * jnp.sum(distances) + jnp.sum(drawn)
        return QuantizerOutput(self.estimator(points, bounded), codes, loss, statistics)

    def update(self, statistics: PyTree) -> "VQ":
        """Move the averages and the book; a batch without kept tokens changes nothing.

        **Arguments:**

        - `statistics`: a [`VQStatistics`][] summed over the batch and all devices.

        **Raises:** `ValueError` if there is a `start` and the statistics are of a [`VQ`][] without.
        """
        new = self._step(statistics)
        old = (self.codebook, self.counts, self.sums)
        seen = jnp.sum(statistics.counts) > 0
        done = self.started
        if self.start is not None and done is not None:
            placed = jax.tree.map(
                lambda laid, lloyd: jnp.where(done == 0, laid, lloyd),
                self._lay_out(statistics),
                self._lloyd(statistics),
            )
            placing = done < self.start.steps
            new = jax.tree.map(lambda p, n: jnp.where(placing, p, n), placed, new)
            done = done + (seen & placing)
        chosen = jax.tree.map(lambda n, o: jnp.where(seen, n, o), new, old)
        return eqx.tree_at(
            lambda q: (q.codebook, q.counts, q.sums, q.started),
            self,
            (*chosen, done),
            is_leaf=lambda x: x is None,
        )

    def _step(self, statistics: VQStatistics) -> "_State":
        """Book, counts and sums after an ordinary step."""
        counts = self.decay * self.counts + (1 - self.decay) * statistics.counts
        averaged = self.decay * self.sums + (1 - self.decay) * statistics.sums
        sums = self.book.sums(averaged, self.codebook, counts)
        revived = jnp.zeros(self.codebook_size, bool)
        if self.revival > 0:
            counts, sums, revived = _split(self.codebook, counts, sums, self.revival)
        total = jnp.sum(counts)
        smoothed = (counts + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        return self.book.entries(sums, self.codebook, counts, smoothed, revived), counts, sums

    def _lay_out(self, statistics: VQStatistics) -> "_State":
        """The book spread over the batch, all entries as heavy as each other."""
        if statistics.squares is None:
            raise ValueError(
                "The statistics have no squares, which the start of the book needs: take those of "
                "this quantizer's own output."
            )
        total = jnp.maximum(jnp.sum(statistics.counts), 1.0)
        mean = jnp.sum(statistics.sums, axis=0) / total
        deviation = jnp.sqrt(jnp.maximum(statistics.squares / total - mean**2, 0.0))
        centred = self.codebook - jnp.mean(self.codebook, axis=0)
        spread = jnp.sqrt(jnp.mean(centred**2, axis=0))
        book = mean + deviation * centred / jnp.where(spread > 0, spread, 1.0)
        counts = jnp.full(self.codebook_size, total / self.codebook_size)
        return book, counts, counts[:, None] * book

    def _lloyd(self, statistics: VQStatistics) -> "_State":
        """The book at the means of the batch, the lightest entries beside the heaviest."""
        # An entry that nothing chose stays, with the weight of one token, as at the beginning.
        counts = jnp.maximum(statistics.counts, 1.0)
        chosen = statistics.counts[:, None] > 0
        sums = jnp.where(chosen, statistics.sums, self.codebook)
        counts, sums, _ = _split(self.codebook, counts, sums, _LIGHT)
        return sums / counts[:, None], counts, sums

    def trainable(self) -> PyTree[bool]:
        """True for the code book if it is trained by gradient."""
        nothing = jax.tree.map(lambda _: False, self)
        return eqx.tree_at(lambda q: q.codebook, nothing, self.book.trained)

    def refined(self) -> "VQ":
        """This book at half its size. Different from this one, so that different pairs of codes
        have different sums; from there each stage follows its own latents.

        **Raises:** `NotImplementedError` with `cosine`, or if the estimator is not
        [`StraightThrough`][].
        """
        if self.cosine:
            raise NotImplementedError(
                "VQ with cosine cannot be a stage of Residual: what a stage leaves is not of "
                "length 1, and its length would be lost. Use VQ without cosine."
            )
        check_residual(self.estimator, type(self).__name__)
        return eqx.tree_at(lambda q: (q.codebook, q.sums), self, (self.codebook / 2, self.sums / 2))


@jax.jit
def _unit_entries(codebook: Float32[Array, "codes dim"]) -> Float32[Array, "codes dim"]:
    """Entries at length 1, of the same bits in every program."""
    # jit, so that a call outside of a program gives what programs give; the barrier, so that a
    # book which is a constant is not computed by other means; the last bit is rounded away, so that
    # the last product cannot be fused with a sum that follows.
    rows = unit(jax.lax.optimization_barrier(codebook))
    return jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=22)


_State = tuple[Float32[Array, "codes dim"], Float32[Array, " codes"], Float32[Array, "codes dim"]]


def _split(
    codebook: Float32[Array, "codes dim"],
    counts: Float32[Array, " codes"],
    sums: Float32[Array, "codes dim"],
    threshold: float,
) -> tuple[Float32[Array, " codes"], Float32[Array, "codes dim"], Bool[Array, " codes"]]:
    """Let the lightest entries share the tokens of the heaviest: counts, sums, and which entries
    were moved.
    """
    order = jnp.argsort(counts, stable=True)
    pairs = counts.shape[0] // 2
    light, heavy = order[:pairs], order[::-1][:pairs]
    mean = jnp.mean(counts)
    dead = (counts[light] < threshold * mean) & (counts[heavy] > mean)
    half = counts[heavy] / 2
    centre = sums[heavy] / counts[heavy][:, None]
    beside = centre + _SPLIT * (codebook[light] - centre)
    new_light = jnp.where(dead, half, counts[light])
    new_heavy = jnp.where(dead, half, counts[heavy])
    light_sums = jnp.where(dead[:, None], half[:, None] * beside, sums[light])
    heavy_sums = jnp.where(dead[:, None], half[:, None] * centre, sums[heavy])
    return (
        counts.at[light].set(new_light).at[heavy].set(new_heavy),
        sums.at[light].set(light_sums).at[heavy].set(heavy_sums),
        jnp.zeros(counts.shape, bool).at[light].set(dead),
    )
