"""Running a strategy's search: what it asks for is measured, and the best of it is taken."""

import math
import operator
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar, final

from ._strategies import AbstractStrategy, Block

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Allocation(Generic[T]):
    """What a search came to.

    - `length`: the length chosen.
    - `loss`: measured at that length; NaN if it was not measured.
    - `met`: whether that loss meets the criterion.
    - `monotone`: whether, over the lengths that were probed, the loss never rose with the length
      (and never was NaN). Lengths that were not probed are not spoken of. False if none was probed.
    - `measured`: whether the length chosen was probed.
    - `probed`: number of lengths measured, each once.
    - `result`: whatever the probe at that length gave besides the loss.
    """

    length: int
    loss: float
    met: bool
    monotone: bool
    measured: bool
    probed: int
    result: T


class Round(NamedTuple):
    """What a search wants next.

    - `lengths`: distinct, none of them seen before.
    - `measure`: false for the one length that is taken without a look at its loss: any will do.
    """

    lengths: tuple[int, ...]
    measure: bool = True


Rounds = Generator[Round, Sequence[tuple[float, T]], Allocation[T]]


def rounds(strategy: AbstractStrategy, block: Block) -> Rounds[T]:
    """A search as rounds of probes: each is to be sent `(loss, result)` for each of its lengths.

    Many of them can be run side by side. Returns the smallest probed length that meets the
    criterion, else the longest one probed; or the length that the strategy's search returned. Holds
    the result of one probe between rounds.

    **Raises:** `ValueError` if the strategy asks for a length outside the block's bounds, or ends
    without having probed or chosen any.
    """
    losses: dict[int, float] = {}
    best: tuple[int, float, bool, T] | None = None
    search = strategy.search(block)
    taken: int | None = None
    try:
        wanted = next(search)
        while True:
            new = tuple(dict.fromkeys(operator.index(n) for n in wanted if n not in losses))
            for length in new:
                _check_length(strategy, block, length)
            if new:
                answers = list((yield Round(new)))
                # A result may hold megabytes of cache: none is kept but the best one.
                for length in new:
                    loss, result = answers.pop(0)
                    losses[length] = loss
                    met = strategy.criterion.meets(loss)
                    if best is None or _rank(length, met) > _rank(best[0], best[2]):
                        best = length, loss, met, result
                    del result
            wanted = search.send(tuple(losses[length] for length in wanted))
    except StopIteration as stop:
        taken = stop.value
    monotone = bool(losses) and _never_rises(losses)
    if taken is not None and (best is None or best[0] != taken):
        _check_length(strategy, block, taken)
        # Once more if it was probed but was not the best by the rule: its result is gone.
        ((loss, result),) = yield Round((taken,), measure=taken in losses)
        measured = taken in losses
        met = measured and strategy.criterion.meets(loss)
        return Allocation(
            taken,
            loss if measured else math.nan,
            met,
            monotone and measured,
            measured,
            len(losses),
            result,
        )
    if best is None:
        raise ValueError(f"{type(strategy).__name__} probed no length; it must probe at least one")
    length, loss, met, result = best
    return Allocation(length, loss, met, monotone, True, len(losses), result)


def allocate(
    strategy: AbstractStrategy, block: Block, probe: Callable[[int], tuple[float, T]]
) -> Allocation[T]:
    """Runs a strategy's search on one block.

    **Arguments:**

    - `strategy`: what to probe.
    - `block`: the lengths allowed.
    - `probe`: measures one length: gives the loss and anything that goes with it. Called once per
      length, however often the strategy asks; and for a length that the strategy takes unmeasured,
      whose loss is not looked at.

    **Returns:** the smallest probed length that meets the criterion, else the longest one probed;
    or the length that the strategy chose.

    **Raises:** `ValueError` if the strategy asks for a length outside the block's bounds, or ends
    without having probed any.
    """
    search: Rounds[T] = rounds(strategy, block)
    try:
        wanted = next(search)
        while True:
            wanted = search.send([probe(length) for length in wanted.lengths])
    except StopIteration as stop:
        return stop.value


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
