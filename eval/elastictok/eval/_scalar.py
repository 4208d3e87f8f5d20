"""Scalar quantisers fitted to data, and how to share a budget of bits among several of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float

# Sizes of quantiser that the allocation may choose from: every one where a level more matters, then
# steps of about a tenth of a bit. 256 levels lose nothing that survives rounding to uint8.
COUNTS = (*range(1, 17), 18, 20, 22, 24, 27, 30, 32, 36, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256)

_LLOYD_STEPS = 50
_FRONT = 1024


@final
@dataclass(frozen=True, eq=False)
class Quantiser:
    """Reproduction values of a scalar quantiser, ascending, and its error on the fitted data.

    **Fields:**

    - `values`: what is reproduced; the nearest one is chosen.
    - `error`: mean squared error over the data that it was fitted to.
    """

    values: Float[np.ndarray, "levels"]
    error: float

    def __call__(self, numbers: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Each number's nearest reproduction value."""
        bounds = (self.values[1:] + self.values[:-1]) / 2
        return self.values[np.searchsorted(bounds, numbers)]


class _Cells:
    """Sums over cells of sorted numbers in O(log n) each, by differences of running sums."""

    def __init__(self, numbers: np.ndarray):
        self.numbers = np.sort(numbers)
        self._sum = np.concatenate([[0.0], np.cumsum(self.numbers)])
        self._square = np.concatenate([[0.0], np.cumsum(np.square(self.numbers))])

    def edges(self, values: np.ndarray) -> np.ndarray:
        """Where the cells of the nearest of `values` begin and end."""
        inner = np.searchsorted(self.numbers, (values[1:] + values[:-1]) / 2)
        return np.concatenate([[0], inner, [len(self.numbers)]])

    def means(self, edges: np.ndarray) -> np.ndarray:
        """Mean of every cell that is not empty."""
        counts = np.diff(edges)
        sums = np.diff(self._sum[edges])
        return np.unique(sums[counts > 0] / counts[counts > 0])

    def errors(self, values: np.ndarray) -> np.ndarray:
        """Sum of squared errors in the cell of each of `values`."""
        edges = self.edges(values)
        counts, sums = np.diff(edges), np.diff(self._sum[edges])
        squares = np.diff(self._square[edges])
        return np.maximum(squares - 2 * values * sums + counts * np.square(values), 0.0)


def _lloyd(cells: _Cells, values: np.ndarray) -> np.ndarray:
    """Lloyd's iteration (Lloyd 1982, method I): nearest value, then mean; the error never grows."""
    error = cells.errors(values).sum()
    for _ in range(_LLOYD_STEPS):
        better = cells.means(cells.edges(values))
        better_error = cells.errors(better).sum()
        if better_error >= error * (1 - 1e-4):
            break
        values, error = better, better_error
    return values


def _split(cells: _Cells, values: np.ndarray, count: int) -> np.ndarray:
    """`count` values: the cells with the largest errors are each cut in two at their value."""
    edges = cells.edges(values)
    worst = np.argsort(-cells.errors(values), kind="stable")[: count - len(values)]
    cuts = np.searchsorted(cells.numbers, values[worst])
    return cells.means(np.sort(np.concatenate([edges, cuts])))


def fit_quantisers(numbers: Float[np.ndarray, "numbers"], largest: int) -> list[Quantiser]:
    """Quantisers of growing size for the same numbers, each fitted by Lloyd's iteration.

    Each one starts from the one before with its worst cells cut in two, so that the error never
    grows with the number of levels.

    **Arguments:**

    - `numbers`: what to fit to.
    - `largest`: the most levels allowed.
    """
    cells = _Cells(numbers)
    values = np.array([numbers.mean()])
    fitted = [Quantiser(values, float(numbers.var()))]
    for count in COUNTS[1:]:
        if count > largest:
            break
        grown = _split(cells, values, min(count, 2 * len(values)))
        if len(grown) == len(values):
            # As many values as distinct numbers: nothing is left to split.
            break
        # Lloyd's iteration may leave a cell empty and drop it: the quantiser is then a little
        # smaller than asked for, and so are its bits.
        values = _lloyd(cells, grown)
        fitted.append(Quantiser(values, float(cells.errors(values).sum() / len(numbers))))
    return fitted


def _front(bits: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the states that no other beats in both bits and error, by ascending bits."""
    order = np.lexsort((errors, bits))
    lowest = np.minimum.accumulate(errors[order])
    kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
    if len(kept) <= _FRONT:
        return kept
    # Too many to carry on: the best (the last) of each of 1024 equal stretches of bits.
    stretch = np.floor(bits[kept] / (bits[kept[-1]] / _FRONT))
    return kept[np.concatenate([stretch[1:] != stretch[:-1], [True]])]


def allocate(choices: Sequence[Sequence[Quantiser]], bits: float | int) -> list[Quantiser]:
    """One quantiser for each number, so that their summed error is least within a budget.

    A fixed-rate code: the levels chosen together name one of `prod(levels) <= 2**bits` symbols.
    Solved by dynamic programming over the Pareto front of (bits, error): exact as long as the front
    has at most 1024 states (about 250 at the 16 bits of a token).

    **Arguments:**

    - `choices`: for each number, its quantisers, the first of one level.
    - `bits`: the budget.
    """
    used, errors = np.zeros(1), np.zeros(1)
    picks = np.zeros((1, 0), np.int64)
    for options in choices:
        option_bits = np.array([math.log2(len(option.values)) for option in options])
        option_errors = np.array([option.error for option in options])
        all_used = (used[:, None] + option_bits).ravel()
        all_errors = (errors[:, None] + option_errors).ravel()
        # A hair of slack: sums of logarithms of exact products are off by rounding.
        within = np.flatnonzero(all_used <= bits + 1e-9)
        kept = within[_front(all_used[within], all_errors[within])]
        state, option = np.divmod(kept, len(options))
        used, errors = all_used[kept], all_errors[kept]
        picks = np.concatenate([picks[state], option[:, None]], axis=1)
    best = picks[np.argmin(errors)]
    return [options[pick] for options, pick in zip(choices, best, strict=True)]
