"""Calibrating a regressor: whole clips are encoded at margin after margin."""

import math
from collections.abc import Sequence

import numpy as np

from ._conformal import MARGINS, Calibration, checked_margins
from ._regressor import Regressor
from ._scorer import criterion_name
from ._strategies import AbstractStrategy, FixedLength
from ._tokenizer import Tokenizer


def calibrate(
    regressor: Regressor,
    tokenizer: Tokenizer,
    clips: Sequence[np.ndarray],
    *,
    alpha: float,
    margins: Sequence[float | int] = MARGINS,
) -> Regressor:
    """The same regressor, with the margin that keeps the promise of `Calibration` for `alpha`.

    Really encodes: what a block needs depends on the lengths of those before it, so that only runs
    of whole clips at each margin tell what the margin does. The largest margin is tried first, and
    a clip is done when it misses.

    **Arguments:**

    - `regressor`: its margin, alpha and calibration are ignored.
    - `tokenizer`: its codec, window, `native` and `limit` are those to be used later; its strategy
      is ignored.
    - `clips`: pictures and clips, neither among those that the scorer was trained on nor chosen by
      looking at it: `1 / alpha - 1` at least, and the more, the nearer the share comes to `alpha`.
    - `alpha`: share of clips that may miss the threshold although all tokens would meet it.
    - `margins`: those to try, 0 or more.

    **Raises:** `ValueError` for such arguments.
    """
    grid = checked_margins(margins)

    def meeting(indices: Sequence[int], strategy: AbstractStrategy) -> list[int]:
        own = tokenizer.with_strategy(strategy)
        tokens = own.encode_batch([clips[i] for i in indices])
        return [i for i, each in zip(indices, tokens, strict=True) if np.all(each.met)]

    able = meeting(
        range(len(clips)), FixedLength(length=tokenizer.limit, criterion=regressor.criterion)
    )
    # What no length helps never misses, and needs no more than the least margin.
    needed = [math.inf if i in set(able) else grid[0] for i in range(len(clips))]
    for margin in reversed(grid):
        able = meeting(able, Regressor(regressor.scorer, regressor.criterion, margin=margin))
        for i in able:
            needed[i] = margin
    calibration = Calibration(
        tuple(needed),
        grid,
        criterion_name(regressor.criterion),
        regressor.criterion.threshold,
        tokenizer.codec.fingerprint,
        regressor.scorer.fingerprint,
        tokenizer.window,
    )
    return Regressor(
        regressor.scorer,
        regressor.criterion,
        alpha=alpha,
        calibration=calibration,
        verify=regressor.verify,
    )
