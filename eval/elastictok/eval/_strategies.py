"""Measuring allocation strategies side by side, against the exhaustive optimum."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from elastictok.inference import (
    AbstractCriterion,
    AbstractStrategy,
    Criterion,
    Full,
    Tokenizer,
)

from ._comparison import StrategyComparison, StrategyResult
from ._criteria import loss_name, requirement
from ._evaluate import Item, Setting, Share, evaluate, share_settings
from ._results import Evaluation, Row

Strategy: TypeAlias = Callable[[AbstractCriterion], AbstractStrategy]

EQUAL = "equal lengths"
# Of the tokens, where all blocks have equal lengths: enough of them for a curve.
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
# A grey level off everywhere: nobody asks 8-bit pixels for less.
_FINEST = (1 / 127.5) ** 2


def compare_strategies(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    criteria: Sequence[AbstractCriterion],
    strategies: Mapping[str, Strategy],
    *,
    optimum: Strategy = Full,
    shares: Sequence[float | int] = SHARES,
    name: str = "strategies",
    progress: Callable[[float], None] | None = None,
) -> StrategyComparison:
    """Measures strategies, at several thresholds, beside the exhaustive optimum.

    The optimum probes every length of every block, once for each threshold: few items and few
    frames will do. It is the least a block can be given as the tokenizer is; two kinds of strategy
    can be below it: those that tell the encoder something else (`EncodeOnce`), and, in clips, any,
    since blocks follow blocks of other lengths there.

    Whether a block meets the threshold is judged on the frames that come back, measured by the
    strategy or not. Equal lengths for all blocks need no search and are measured beside them; at
    each threshold, those are shown that do with the fewest tokens of the shares tried and let as
    many blocks meet it as the optimum does (all tokens if none do). Choosing them would take a
    search of its own, which is not counted.

    !!! Example

        ```python
        compare_strategies(
            tokenizer,
            items,
            [MSE(0.02), MSE(0.005)],
            {"binary": Binary, "100 bins": Binned, "4-ary": lambda c: KAry(c, 4)},
        )
        ```

    **Arguments:**

    - `tokenizer`: gives the model, window and size rule; its strategy is not used.
    - `items`: pictures or clips.
    - `criteria`: one loss at several thresholds, which make a curve.
    - `strategies`: by name, what makes them of a criterion.
    - `optimum`: what the others are measured against; another one where probing every length takes
        too long, such as `lambda c: Binned(c, 256)`.
    - `shares`: of the tokens, for equal lengths.
    - `name`: of the set of items, for titles.
    - `progress`: called now and then with the share that is done, at last 1.

    **Raises:** `ValueError` if there is no item or criterion, if criteria measure different losses,
    if names are used twice or are taken, or a strategy goes by another criterion than the one that
    it was made of.
    """
    best = "exhaustive optimum" if optimum is Full else "reference"
    makers = {best: optimum, **strategies}
    _check(criteria, strategies, best)
    fixed = _equal_settings(shares, criteria[0])
    settings = [
        _setting(name, make, criterion) for criterion in criteria for name, make in makers.items()
    ]
    found = evaluate(
        tokenizer,
        items,
        settings=(*fixed, *settings),
        name=name,
        progress=_counted(progress, len(items) * (len(fixed) + len(settings))),
    )
    return StrategyComparison(
        name=name,
        device=found.device,
        fingerprint=found.fingerprint,
        optimum=best,
        equal=EQUAL,
        results=tuple(
            result
            for criterion in criteria
            for result in _results(found, criterion, tuple(makers), best)
        ),
        fixed=found.fixed,
    )


def _check(
    criteria: Sequence[AbstractCriterion], strategies: Mapping[str, Strategy], best: str
) -> None:
    if not criteria:
        raise ValueError("nothing to ask for: give at least one criterion, such as MSE(0.01)")
    losses = sorted({loss_name(criterion) for criterion in criteria})
    if len(losses) > 1:
        raise ValueError(
            f"criteria measure {', '.join(losses)}; one comparison has one loss, at several "
            "thresholds: make a comparison for each"
        )
    taken = [name for name in strategies if name in (best, EQUAL)]
    if taken:
        raise ValueError(f"a strategy is named {taken[0]!r}, which has a meaning: rename it")


def _equal_settings(
    shares: Sequence[float | int], criterion: AbstractCriterion
) -> tuple[Setting, ...]:
    """The same loss without a threshold: it is judged by all of them afterwards."""
    loss = Criterion(function=criterion, threshold=math.inf)
    return tuple(
        replace(setting, strategy=Share(share, loss))
        for share, setting in zip(shares, share_settings(shares), strict=True)
    )


def _name(strategy: str, criterion: AbstractCriterion) -> str:
    return f"{strategy}, {requirement(criterion)}"


def _setting(name: str, make: Strategy, criterion: AbstractCriterion) -> Setting:
    strategy = make(criterion)
    asked, used = requirement(criterion), requirement(strategy.criterion)
    if asked != used:
        raise ValueError(
            f"the strategy {name!r} made for {asked} goes by {used}; its function has to pass on "
            "the criterion that it is given"
        )
    return Setting(_name(name, criterion), strategy, searched=True)


def _counted(progress: Callable[[float], None] | None, total: int) -> Callable[[], None] | None:
    if progress is None:
        return None
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done / total)

    return step


def _results(
    found: Evaluation, criterion: AbstractCriterion, names: Sequence[str], best: str
) -> list[StrategyResult]:
    """All strategies at one threshold, equal lengths last."""
    asked = requirement(criterion)
    optimum = found.row(_name(best, criterion))
    results = [
        StrategyResult(name, asked, found.row(_name(name, criterion)), optimum) for name in names
    ]
    return [*results, StrategyResult(EQUAL, asked, _equal(found, criterion, optimum), optimum)]


def _equal(found: Evaluation, criterion: AbstractCriterion, optimum: Row) -> Row:
    """The shortest of the equal lengths that let as many blocks meet the threshold."""
    rows = [_judged(row, criterion) for row in found.fixed]
    goal = optimum.blocks_met
    if not goal:
        return rows[-1]
    # A block may meet the threshold with fewer tokens and miss it with more: none may reach it.
    reached = [row for row in rows if (row.blocks_met or 0) >= goal]
    return (reached or [max(rows, key=lambda row: row.blocks_met or 0)])[0]


def _judged(row: Row, criterion: AbstractCriterion) -> Row:
    """A row as it would be had its losses been held against this threshold."""
    measurements = tuple(
        replace(
            measured,
            spent=replace(spent, met=tuple(criterion.meets(loss) for loss in spent.losses)),
        )
        for measured, spent in zip(row.measurements, row.spent, strict=True)
    )
    return replace(row, threshold=criterion.threshold, measurements=measurements)


def spread_thresholds(
    tokenizer: Tokenizer, items: Sequence[Item], count: int = 3
) -> tuple[float, ...]:
    """Mean squared errors that make a curve: between what the fewest and all tokens reach.

    Both are measured (the median block of these items), and what is between them is cut into
    equal ratios. Rounded to two digits.

    **Arguments:**

    - `count`: how many, at most: fewer if more tokens gain little.

    **Returns:** falling thresholds, at least one.

    **Raises:** `ValueError` if `count` is below 1, or there is no item.
    """
    if count < 1:
        raise ValueError(f"{count} thresholds; give at least 1")
    fewest = Setting("fewest tokens", Share(1e-9), searched=False)
    found = evaluate(tokenizer, items, settings=(fewest, *share_settings([1])))
    high, low = (
        max(_FINEST, float(np.median([loss for spent in row.spent for loss in spent.losses])))
        for row in found.rows
    )
    between = np.geomspace(high, low, count + 2)[1:-1] if low < high else [high]
    return tuple(dict.fromkeys(float(f"{value:.2g}") for value in between))
