"""Who decides how many tokens a block gets."""

import abc
import math
import operator
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import final

import equinox as eqx
import numpy as np

from ._criteria import MSE, AbstractCriterion

# A search yields rounds of lengths to probe and is sent their losses, in the same order. One round
# may be run as one batch, and many searches side by side: that is the driver's business. What it
# returns is None, to be given the best of what it probed; or a length, which then is taken as it
# is, measured or not.
Search = Generator[Sequence[int], Sequence[float], int | None]


@final
@dataclass(frozen=True, eq=False)
class Block:
    """What a strategy knows of the block at hand.

    - `shortest`, `longest`: the lengths allowed, both included.
    - `previous`: the length that the block before it was given; None for the first of a clip.
    - `planned`: what the strategy's own `plan` gave this block; None if it makes no plans.
    - `pixels`: `u8[frames height width 3]` as the codec is given them: the block's own at the end,
      and before them those of the earlier blocks of its clip that there are, at most
      `strategy.history` of them. None where pixels are not known.
    - `frames_per_block`: of `pixels`.
    """

    shortest: int
    longest: int
    previous: int | None = None
    planned: int | None = None
    pixels: np.ndarray | None = None
    frames_per_block: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"lengths from {self.shortest} to {self.longest} leave no choice; a block needs "
                "1 <= shortest <= longest"
            )

    def clip(self, length: int) -> int:
        """The allowed length that is nearest."""
        return min(max(length, self.shortest), self.longest)


class AbstractStrategy(eqx.Module):
    """Finds a length for each block, usually by probing.

    A strategy only chooses which lengths to measure; `allocate` measures them and picks: the
    smallest probed length that meets the criterion, else the longest one probed. A strategy that
    promises "the threshold, or all tokens" therefore probes `block.longest` before it gives up.
    """

    criterion: eqx.AbstractVar[AbstractCriterion]

    @abc.abstractmethod
    def search(self, block: Block) -> Search:
        """A generator: yields rounds of lengths to probe, is sent their losses, then returns.

        It returns None, or the length to take whatever was measured. One that was not probed is
        taken unmeasured.
        """

    def encoded_length(self, block: Block, length: int) -> int:
        """The length that the encoder is told, where `length` tokens are to be kept: that length.

        Probes of a block that give the encoder the same length share one pass through it.
        """
        return length

    @property
    def history(self) -> int:
        """Earlier blocks whose pixels it wants to see beside the block's own: none."""
        return 0

    def plan(self, clips: Sequence[Collection[Block]]) -> Sequence[Sequence[int]] | None:
        """What to remember for each block, before any is encoded: nothing.

        Called once for the clips that are encoded together. A strategy that needs it cannot be used
        on streams, whose blocks are not known before.

        **Arguments:**

        - `clips`: the blocks of each, `previous` and `planned` unknown.
        """
        return None


@final
class Full(AbstractStrategy):
    """Every length: the exhaustive optimum, and what the other strategies are measured against.

    **Arguments:**

    - `criterion`: what a block has to meet.
    """

    criterion: AbstractCriterion

    def search(self, block: Block) -> Search:
        for length in range(block.shortest, block.longest + 1):
            yield (length,)
        return None


@final
class Binary(AbstractStrategy):
    """Bisection (arXiv 2410.08368, algorithm 2): at most `1 + ceil(log2(lengths))` probes.

    All tokens are probed first: a block that misses the threshold with all of them is given all of
    them after that one probe. On losses that never rise with the length, the result is that of
    `Full`; on others it still meets the threshold, but need not be the shortest length that does.

    **Arguments:**

    - `criterion`: what a block has to meet.
    """

    criterion: AbstractCriterion

    def search(self, block: Block) -> Search:
        return (yield from KAry(self.criterion, 1).search(block))


@final
class KAry(AbstractStrategy):
    """Bisection into `k + 1` parts: `k` lengths in each round, which devices may probe at once.

    As `Binary`, which is the search with `k = 1`, in `log2(k + 1)` times fewer rounds of `k` times
    as many probes: for accelerators that take `k` probes in the time of one. The first round is all
    tokens alone.

    **Arguments:**

    - `criterion`: what a block has to meet.
    - `k`: lengths in a round.
    """

    criterion: AbstractCriterion
    k: int = eqx.field(converter=operator.index)

    def __check_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; a round probes at least 1 length")

    def search(self, block: Block) -> Search:
        # The length sought is in `low..high`, and `high` meets the criterion.
        low, high = block.shortest, block.longest
        (loss,) = yield (high,)
        if not self.criterion.meets(loss):
            return None
        while low < high:
            lengths = _between(low, high, self.k)
            losses = yield lengths
            for length, loss in zip(lengths, losses, strict=True):
                if self.criterion.meets(loss):
                    high = length
                    break
                low = length + 1
        return None


def _between(low: int, high: int, k: int) -> tuple[int, ...]:
    """At most `k` lengths from `low` to `high - 1`, which cut what is left into equal parts."""
    count = high - low
    if count <= k:
        return tuple(range(low, high))
    return tuple(low + (part * (count + 1)) // (k + 1) - 1 for part in range(1, k + 1))


@final
class Secant(AbstractStrategy):
    """Regula falsi: the next length is where a line through what was measured meets the threshold.

    The line is one of the loss over the length, both as logarithms (where the loss is positive),
    in which the curves of tokenizers are nearly straight. Where that does not halve what is left,
    twice in a row, the next probe does; at most about `3 log2` of the lengths are probed, and a few
    on smooth curves. On losses that never rise with the length, the result is that of `Full`.

    **Arguments:**

    - `criterion`: what a block has to meet.
    """

    criterion: AbstractCriterion

    def search(self, block: Block) -> Search:
        low, high = block.shortest, block.longest
        (loss_high,) = yield (high,)
        if not self.criterion.meets(loss_high):
            return None
        (loss_low,) = yield (low,)
        if self.criterion.meets(loss_low):
            return None
        slow = 0  # times that less than half of it went away
        while high - low > 1:  # `low` misses the threshold, `high` meets it
            left = high - low
            if slow < 2:
                middle = _crossing(low, loss_low, high, loss_high, self.criterion.threshold)
            else:
                middle = (low + high) // 2
            (loss,) = yield (middle,)
            if self.criterion.meets(loss):
                high, loss_high = middle, loss
            else:
                low, loss_low = middle, loss
            slow = slow + 1 if 2 * (high - low) > left else 0
        return None


def _crossing(low: int, loss_low: float, high: int, loss_high: float, threshold: float) -> int:
    """Where the line reaches the threshold, rounded up and strictly between; else the middle."""
    losses = loss_low, loss_high, threshold
    if all(0 < loss < math.inf for loss in losses):
        losses = tuple(map(math.log, losses))
    above, below, wanted = losses
    if not math.isfinite(above) or not math.isfinite(below) or above <= below:
        return (low + high) // 2
    share = (above - wanted) / (above - below)
    guess = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return min(max(math.ceil(guess), low + 1), high - 1)


Spacing = Callable[[int, int, int], Sequence[int]]


def linear_spaced(shortest: int, longest: int, count: int) -> list[int]:
    """At most `count` lengths, the shortest and the longest among them, evenly spaced."""
    return _distinct(np.linspace(shortest, longest, count))


def log_spaced(shortest: int, longest: int, count: int) -> list[int]:
    """At most `count` lengths, the shortest and the longest among them, in equal ratios.

    Fewer than `count` where ratios are smaller than a token.
    """
    return _distinct(np.geomspace(shortest, longest, count))


def _distinct(lengths: np.ndarray) -> list[int]:
    return sorted(set(np.rint(lengths).astype(int).tolist()))


@final
class Binned(AbstractStrategy):
    """Every one of a few lengths (arXiv 2410.08368, section 3.3, with 100), in one round.

    The longest one is among them. The result is that of `Full` rounded up to the next of those
    lengths, on losses that never rise with the length.

    **Arguments:**

    - `criterion`: what a block has to meet.
    - `bins`: how many lengths, at least 2.
    - `spacing`: which: `linear_spaced` or `log_spaced`, or any function of the shortest and longest
      length and of `bins`.
    """

    criterion: AbstractCriterion
    bins: int = eqx.field(converter=operator.index, default=100)
    spacing: Spacing = eqx.field(static=True, default=linear_spaced)

    def __check_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}; the shortest and the longest length make 2")

    def search(self, block: Block) -> Search:
        yield self.spacing(block.shortest, block.longest, self.bins)
        return None


@final
class WarmStart(AbstractStrategy):
    """Starts from the length of the block before: neighbours in a clip need about as many tokens.

    Probes that length; then gallops, with steps of twice the size each time, down while the
    criterion is met or up while it is missed; what is left between a miss and a success is given to
    `inner`. Near blocks take a few probes, `2 log2` of the distance. On losses that never rise with
    the length, the result is that of `inner` on the whole block. The first block of a clip is
    `inner`'s alone.

    **Arguments:**

    - `inner`: searches the first block, and between the bounds: `Secant`, `Binary` or `KAry`.
    """

    inner: AbstractStrategy
    criterion: AbstractCriterion

    def __init__(self, inner: AbstractStrategy):
        self.inner = inner
        self.criterion = inner.criterion

    @property
    def history(self) -> int:
        return self.inner.history

    def encoded_length(self, block: Block, length: int) -> int:
        return self.inner.encoded_length(block, length)

    def plan(self, clips: Sequence[Collection[Block]]) -> Sequence[Sequence[int]] | None:
        return self.inner.plan(clips)

    def search(self, block: Block) -> Search:
        if block.previous is None:
            return (yield from self.inner.search(block))
        # A sixteenth of the range to begin with: single steps would rarely leave the neighbourhood.
        step = max(1, (block.longest - block.shortest) // 16)
        at = block.clip(block.previous)
        (loss,) = yield (at,)
        if self.criterion.meets(loss):
            low, high = block.shortest, at
            while low < high:
                below = max(block.shortest, high - step)
                (loss,) = yield (below,)
                if not self.criterion.meets(loss):
                    low = below + 1
                    break
                high, step = below, 2 * step
        else:
            low, high = at + 1, block.longest
            while low <= block.longest:
                above = min(block.longest, low - 1 + step)
                (loss,) = yield (above,)
                if self.criterion.meets(loss):
                    high = above
                    break
                low, step = above + 1, 2 * step
        if low >= high:
            return None
        # The miss that was found is among the bounds: what is known of it may be of use to `inner`.
        low = max(low - 1, block.shortest)
        return (yield from self.inner.search(replace(block, shortest=low, longest=high)))


@final
class EncodeOnce(AbstractStrategy):
    """Lets the encoder run once for each block, told that all tokens are kept; the decoder probes.

    Half the work of a search, or less. For models whose encoder was trained with condition dropout
    (`elastictok train --condition-dropout`): others put what matters into the first tokens only if
    they are told how many there are, and lose quality.

    **Arguments:**

    - `inner`: decides which lengths are probed.
    """

    inner: AbstractStrategy
    criterion: AbstractCriterion

    def __init__(self, inner: AbstractStrategy):
        self.inner = inner
        self.criterion = inner.criterion

    @property
    def history(self) -> int:
        return self.inner.history

    def plan(self, clips: Sequence[Collection[Block]]) -> Sequence[Sequence[int]] | None:
        return self.inner.plan(clips)

    def encoded_length(self, block: Block, length: int) -> int:
        return block.longest

    def search(self, block: Block) -> Search:
        return (yield from self.inner.search(block))


@final
class FixedLength(AbstractStrategy):
    """The same length for every block, one probe each.

    **Arguments:**

    - `length`: tokens of each block, clipped to what the block allows.
    - `criterion`: measured and reported, but never acted on. By default the MSE without a
      threshold, which any finite loss meets.
    """

    length: int = eqx.field(converter=operator.index)
    criterion: AbstractCriterion = MSE(math.inf)

    def __check_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; a block has at least 1 token")

    def search(self, block: Block) -> Search:
        yield (block.clip(self.length),)
        return None
