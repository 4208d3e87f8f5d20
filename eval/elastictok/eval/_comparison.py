"""Strategies side by side, as plain data: each at each threshold, against the best there is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from ._results import Row


@final
@dataclass(frozen=True, eq=False)
class StrategyResult:
    """A strategy at a threshold, beside the exhaustive optimum at the same one.

    **Fields:**

    - `strategy`: its name.
    - `requirement`: what it was asked for, in words, such as `MSE ≤ 0.02`.
    - `row`: what it gave.
    - `optimum`: what the exhaustive optimum gave, for the same items in the same run.
    """

    strategy: str
    requirement: str
    row: Row
    optimum: Row

    def __post_init__(self):
        blocks, others = len(self.row.lengths), len(self.optimum.lengths)
        if blocks != others:
            raise ValueError(
                f"{self.row.name!r} has {blocks} blocks and {self.optimum.name!r} {others}; "
                "compare rows of the same items"
            )

    @property
    def token_overhead(self) -> float | None:
        """Tokens it spends more, as a share of the optimum's; None where there is nothing to say.

        Over the blocks at which both meet the threshold, all their tokens together: a block that
        it misses would flatter it, and one that the optimum misses has all its tokens in both.
        What is missed shows in `met_difference`. It can be negative where the two do not search
        among the same: an encoder that is told other lengths, or, in clips, blocks that follow
        blocks of other lengths.
        """
        both = _met(self.row) & _met(self.optimum)
        best = int(np.array(self.optimum.lengths)[both].sum())
        return int(np.array(self.row.lengths)[both].sum()) / best - 1 if best else None

    @property
    def met_difference(self) -> float:
        """Share of blocks that meet the threshold, minus the optimum's."""
        return float(_met(self.row).mean() - _met(self.optimum).mean())

    @property
    def evaluations(self) -> float:
        """Mean passes through encoder and decoder for a block, while encoding."""
        return _evaluations(self.row)

    @property
    def fewer_evaluations(self) -> float | None:
        """How many times as many passes the optimum takes; None if it takes none itself."""
        return _evaluations(self.optimum) / self.evaluations if self.evaluations else None

    @property
    def faster(self) -> float | None:
        """How many times as many seconds the optimum takes to encode."""
        seconds, most = self.row.encode_seconds, self.optimum.encode_seconds
        return most / seconds if seconds and most is not None else None


def _met(row: Row) -> np.ndarray:
    return np.array([met for spent in row.spent for met in spent.met], np.bool_)


def _evaluations(row: Row) -> float:
    passes = sum(spent.encoder_evaluations + spent.decoder_evaluations for spent in row.spent)
    return passes / len(row.lengths)


@final
@dataclass(frozen=True, eq=False)
class StrategyComparison:
    """What `compare_strategies` found.

    **Fields:**

    - `name`: of the set of items.
    - `device`: what the seconds were measured on.
    - `fingerprint`: of the model.
    - `optimum`: name of the strategy that the others are measured against.
    - `equal`: name of the results with equal lengths for all blocks, see `compare_strategies`.
    - `results`: for each threshold: the optimum, the strategies in the order in which they were
      given, equal lengths.
    - `fixed`: rows with equal lengths for all blocks, by rising tokens: they take no search.
    """

    name: str
    device: str
    fingerprint: str
    optimum: str
    equal: str
    results: tuple[StrategyResult, ...]
    fixed: tuple[Row, ...]

    @cached_property
    def strategies(self) -> tuple[str, ...]:
        """Names: the optimum, those compared with it, and not the equal lengths."""
        names = dict.fromkeys(result.strategy for result in self.results)
        return tuple(name for name in names if name != self.equal)

    @cached_property
    def requirements(self) -> tuple[str, ...]:
        """What was asked for, in words: one for each threshold."""
        return tuple(dict.fromkeys(result.requirement for result in self.results))

    def of(self, strategy: str) -> tuple[StrategyResult, ...]:
        """The results of one strategy, by rising tokens.

        **Raises:** `KeyError` naming those that there are.
        """
        found = [result for result in self.results if result.strategy == strategy]
        if not found:
            names = [*self.strategies, self.equal]
            raise KeyError(f"no strategy {strategy!r}; there are {names}")
        return tuple(sorted(found, key=lambda result: sum(result.row.lengths)))

    def groups(self) -> Iterator[tuple[str, tuple[StrategyResult, ...]]]:
        """What was asked for, and the results of all strategies: one for each threshold."""
        for requirement in self.requirements:
            yield (
                requirement,
                tuple(each for each in self.results if each.requirement == requirement),
            )
