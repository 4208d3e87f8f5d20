"""A budget of tokens for all blocks together, spent where it lowers the losses most."""

import heapq
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import NamedTuple, final

import equinox as eqx
import numpy as np

from ._criteria import MSE, AbstractCriterion
from ._scorer import AbstractScorer, in_parts
from ._strategies import AbstractStrategy, Block, Search


class _Point(NamedTuple):
    """A length that a block may have, and its loss."""

    length: int
    loss: float


Curve = list[_Point]  # by length, each length once


def split(
    losses: Iterable[np.ndarray],
    lengths: Iterable[np.ndarray],
    total: int,
    weights: Sequence[float | int] | None = None,
) -> list[int]:
    """Lengths of blocks, together at most `total`, with a small sum of losses.

    Lagrangian allocation (Shoham & Gersho 1988): each block goes down the lower convex hull of its
    (length, loss) points, the steepest segment of all blocks first, until one no longer fits; then
    single steps, on the hull or off it, spend what is left, the one that gains most first. The sum
    of the losses exceeds the least possible one by no more than the gain of the first segment that
    did not fit, and by nothing if there is none or nothing was left there. AdapTok
    (arXiv 2505.17011) poses the same problem as an integer program.

    **Arguments:**

    - `losses`: of each block at each of its candidate lengths. NaN and infinity are taken as worse
      than everything finite, minus infinity as better.
    - `lengths`: the candidates of each block, in any order; of a length given twice the lower loss
      counts. Losses may rise with the length: no block is given more tokens to be worse.
    - `total`: tokens for all blocks together.
    - `weights`: what a loss counts, per block; 1 each by default.

    **Returns:** a length for each block.

    **Raises:** `ValueError` if the shortest candidates alone exceed `total`, or the arguments do
    not belong together.
    """
    curves = _curves(losses, lengths, weights)
    least = sum(curve[0].length for curve in curves)
    if total < least:
        raise ValueError(
            f"a total of {total} tokens is less than the shortest lengths of {len(curves)} blocks "
            f"together: give at least {least}"
        )
    at, left = _down_the_hulls(curves, total - least)
    _spend(curves, at, left)
    return [curve[i].length for curve, i in zip(curves, at, strict=True)]


@final
class Budget(AbstractStrategy):
    """Shares a total of tokens among all blocks that are encoded together; see `split`.

    One pass: losses are predicted, not measured, and no block is searched. The lengths never add up
    to more than the total. For clips as a whole, not for streams.

    **Arguments:**

    - `total`: tokens of all blocks of the clips of one call (`Tokenizer.encode`: of the clip;
      `Tokenizer.encode_batch`: of all its clips).
    - `scorer`: predicts the losses whose sum is to be small.
    - `criterion`: measured and reported, but never acted on. By default the MSE without a
      threshold, which any finite loss meets.
    - `verify`: whether the loss at the length is measured. Without, nothing is decoded and the loss
      is unknown.
    """

    total: int = eqx.field(converter=operator.index)
    scorer: AbstractScorer
    criterion: AbstractCriterion = MSE(math.inf)
    verify: bool = True

    def __check_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total is {self.total} tokens; a block has at least 1")

    @property
    def history(self) -> int:
        return self.scorer.history

    def plan(self, clips: Sequence[Collection[Block]]) -> Sequence[Sequence[int]]:
        lengths: list[np.ndarray] = []
        losses: list[np.ndarray] = []
        for part in in_parts(block for clip in clips for block in clip):
            places, values = self.scorer.curves(part)
            lengths.extend(places)
            losses.extend(values)
        chosen = iter(split(losses, lengths, self.total))
        return [list(islice(chosen, len(clip))) for clip in clips]

    def search(self, block: Block) -> Search:
        if block.planned is None:
            raise ValueError(
                f"a budget of {self.total} tokens is shared among all blocks of a clip, and those "
                "of a stream are not known before they come: encode whole clips, or use Regressor"
            )
        if not self.verify:
            return block.planned
        yield (block.planned,)
        return None


def _curves(
    losses: Iterable[np.ndarray],
    lengths: Iterable[np.ndarray],
    weights: Sequence[float | int] | None,
) -> list[Curve]:
    """Checked, weighted, finite, by length."""
    values = [np.asarray(each, np.float64) for each in losses]
    places = [np.asarray(each) for each in lengths]
    factors = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
    if not len(values) == len(places) == len(factors):
        raise ValueError(
            f"losses of {len(values)} blocks, lengths of {len(places)} and {len(factors)} weights; "
            "give one of each per block"
        )
    for i, (value, place, factor) in enumerate(zip(values, places, factors, strict=True)):
        if value.ndim != 1 or value.shape != place.shape or not value.size:
            raise ValueError(
                f"block {i} has losses of shape {value.shape} and lengths of shape {place.shape}; "
                "give one loss for each of at least one length"
            )
        if not np.issubdtype(place.dtype, np.integer) or place.min() < 1:
            raise ValueError(f"block {i} has lengths {place}; they are whole numbers from 1")
        if not 0 <= factor < math.inf:
            raise ValueError(f"block {i} has a weight of {factor}; it must be finite, 0 or more")
    finite = _finite([factor * value for factor, value in zip(factors, values, strict=True)])
    return [_sorted(place, value) for place, value in zip(places, finite, strict=True)]


def _finite(losses: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The losses with numbers in place of NaN and infinities, beyond what all others add up to."""
    known = [loss[np.isfinite(loss)] for loss in losses]
    known = [loss for loss in known if loss.size]
    low = min((loss.min() for loss in known), default=0.0)
    high = max((loss.max() for loss in known), default=0.0)
    # More than all finite differences together, so that it goes before them.
    span = 2 * sum(float(np.ptp(loss)) for loss in known) + (high - low) + 1
    return [
        np.nan_to_num(x, nan=high + span, posinf=high + span, neginf=low - span) for x in losses
    ]


def _sorted(lengths: np.ndarray, losses: np.ndarray) -> Curve:
    best: dict[int, float] = {}
    for length, loss in zip(lengths.tolist(), losses.tolist(), strict=True):
        best[length] = min(loss, best.get(length, math.inf))
    return [_Point(*item) for item in sorted(best.items())]


def _hull(curve: Curve) -> list[int]:
    """Indices of the falling part of the lower convex hull, from the shortest length on."""
    hull: list[int] = []
    for i, point in enumerate(curve):
        if hull and point.loss >= curve[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) <= _slope(curve, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(curve: Curve, start: int, end: int) -> float:
    """What each token gains between two points."""
    return (curve[start].loss - curve[end].loss) / (curve[end].length - curve[start].length)


def _down_the_hulls(curves: Sequence[Curve], left: int) -> tuple[list[int], int]:
    """Where each block stands when the next segment no longer fits, and the tokens left."""
    at = [0] * len(curves)
    segments = [
        (-_slope(curve, start, end), block, end)
        for block, curve in enumerate(curves)
        for start, end in pairwise(_hull(curve))
    ]
    # A block's segments become ever flatter, so that in this order they come one after another.
    for _, block, end in sorted(segments):
        tokens = curves[block][end].length - curves[block][at[block]].length
        if tokens > left:
            break
        at[block], left = end, left - tokens
    return at, left


def _spend(curves: Sequence[Curve], at: list[int], left: int) -> None:
    """Moves blocks on, the move that gains most first, while one fits into what is left."""
    # What is left only shrinks, so that a move in the heap gains at least what it would now.
    moves = [move for block in range(len(curves)) for move in _best_move(curves, at, block, left)]
    heapq.heapify(moves)
    while moves:
        _, tokens, block, end = heapq.heappop(moves)
        if tokens <= left:
            at[block], left = end, left - tokens
        for move in _best_move(curves, at, block, left):
            heapq.heappush(moves, move)


def _best_move(
    curves: Sequence[Curve], at: Sequence[int], block: int, left: int
) -> Iterator[tuple[float, int, int, int]]:
    """The largest gain of one block that fits, if any: `(-gain, tokens, block, end)`."""
    curve, start = curves[block], curves[block][at[block]]
    reach = [i for i, point in enumerate(curve) if 0 < point.length - start.length <= left]
    end = min(reach, key=lambda i: curve[i].loss, default=None)
    if end is not None and curve[end].loss < start.loss:
        yield curve[end].loss - start.loss, curve[end].length - start.length, block, end
