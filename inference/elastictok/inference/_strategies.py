"""Who decides how many tokens a block gets."""

import abc
import math
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar, final

import equinox as eqx

from ._criteria import MSE, AbstractCriterion

T = TypeVar("T")

# A search yields rounds of lengths to probe and is sent their losses, in the same order. One round
# may be run as one batch, and many searches side by side: that is the driver's business.
Search = Generator[Sequence[int], Sequence[float], None]


@final
@dataclass(frozen=True)
class Block:
    """What a strategy knows of the block at hand.

    - `shortest`, `longest`: the lengths allowed, both included.
    """

    shortest: int
    longest: int

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"lengths from {self.shortest} to {self.longest} leave no choice; a block needs "
                "1 <= shortest <= longest"
            )


class AbstractStrategy(eqx.Module):
    """Finds a length for each block by probing.

    A strategy only chooses which lengths to measure; `allocate` measures them and picks: the
    smallest probed length that meets the criterion, else the longest one probed. A strategy that
    promises "the threshold, or all tokens" therefore probes `block.longest` before it gives up.
    """

    criterion: eqx.AbstractVar[AbstractCriterion]

    @abc.abstractmethod
    def search(self, block: Block) -> Search:
        """A generator: yields rounds of lengths to probe, is sent their losses, then returns."""


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
        (loss,) = yield (block.longest,)
        if not self.criterion.meets(loss):
            return
        low, high = block.shortest, block.longest  # `high` always meets the criterion
        while low < high:
            middle = (low + high) // 2
            (loss,) = yield (middle,)
            if self.criterion.meets(loss):
                high = middle
            else:
                low = middle + 1


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
        yield (min(max(self.length, block.shortest), block.longest),)


@final
@dataclass(frozen=True)
class Allocation(Generic[T]):
    """What a search came to.

    - `length`: the length chosen; it was measured.
    - `loss`: measured at that length.
    - `met`: whether that loss meets the criterion.
    - `monotone`: whether, over the lengths that were probed, the loss never rose with the length
      (and never was NaN). Lengths that were not probed are not spoken of.
    - `probed`: number of lengths measured, each once.
    - `result`: whatever the probe at that length gave besides the loss.
    """

    length: int
    loss: float
    met: bool
    monotone: bool
    probed: int
    result: T


def allocate(
    strategy: AbstractStrategy, block: Block, probe: Callable[[int], tuple[float, T]]
) -> Allocation[T]:
    """Runs a strategy's search on one block.

    **Arguments:**

    - `strategy`: what to probe.
    - `block`: the lengths allowed.
    - `probe`: measures one length: gives the loss and anything that goes with it. Called once per
      length, however often the strategy asks.

    **Returns:** the smallest probed length that meets the criterion, else the longest one probed.
    Only one probe's result is held at any time.

    **Raises:** `ValueError` if the strategy asks for a length outside the block's bounds, or ends
    without having probed any.
    """
    losses: dict[int, float] = {}
    best: Allocation[T] | None = None
    search = strategy.search(block)
    try:
        wanted = next(search)
        while True:
            for length in map(operator.index, wanted):
                if length in losses:
                    continue
                _check_length(strategy, block, length)
                loss, result = probe(length)
                losses[length] = loss
                met = strategy.criterion.meets(loss)
                # A result may hold megabytes of cache: keep it only while it is the best one.
                if best is None or _rank(length, met) > _rank(best.length, best.met):
                    best = Allocation(length, loss, met, True, 1, result)
                del result
            wanted = search.send(tuple(losses[length] for length in wanted))
    except StopIteration:
        pass
    if best is None:
        raise ValueError(f"{type(strategy).__name__} probed no length; it must probe at least one")
    return replace(best, monotone=_never_rises(losses), probed=len(losses))


def _rank(length: int, met: bool) -> tuple[bool, int]:
    """Any success before any failure; the shortest success, the longest failure."""
    return met, -length if met else length


def _check_length(strategy: AbstractStrategy, block: Block, length: int) -> None:
    if not block.shortest <= length <= block.longest:
        raise ValueError(
            f"{type(strategy).__name__} asked for a length of {length}; this block allows "
            f"{block.shortest} to {block.longest}"
        )


def _never_rises(losses: dict[int, float]) -> bool:
    curve = [losses[length] for length in sorted(losses)]
    return not any(map(math.isnan, curve)) and all(a >= b for a, b in pairwise(curve))
