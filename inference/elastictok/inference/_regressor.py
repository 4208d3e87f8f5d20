"""Lengths as a scorer predicts them, in one pass, with a promise about how often they are short."""

import itertools
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import final

import numpy as np

from elastictok.models import ElasticTok

from ._codec import ElasticCodec
from ._conformal import Calibration
from ._criteria import AbstractCriterion
from ._scorer import AbstractScorer, Scorer, criterion_name, in_parts
from ._scorer_file import ScorerFileError
from ._strategies import AbstractStrategy, Block, Search

SCORER_FILE = "scorer.safetensors"
CALIBRATION_FILE = "calibration.json"


@final
class Regressor(AbstractStrategy):
    """The shortest length whose predicted loss meets the threshold: "neural regression" (arXiv
    2410.08368, section 3.3), one probe for each block.

    Predictions err. The threshold is therefore tightened by a margin before predictions are
    compared with it: a threshold above 0 becomes `threshold * exp(-margin)`, any other `threshold -
    margin`, so that a margin is a distance in the logarithm of an error and in decibels of PSNR.
    With a `Calibration`, which `calibrate` makes, the margin is such that at most a share `alpha`
    of clips misses the threshold in some block although all tokens would meet it; see `Calibration`
    for what exactly is promised.

    - `margin`: the one in use; infinity keeps all tokens.
    """

    scorer: AbstractScorer
    criterion: AbstractCriterion
    margin: float
    verify: bool
    alpha: float | None
    calibration: Calibration | None

    def __init__(
        self,
        scorer: AbstractScorer,
        criterion: AbstractCriterion,
        *,
        margin: float | int = 0.0,
        alpha: float | None = None,
        calibration: Calibration | None = None,
        verify: bool = True,
    ):
        """**Arguments:**

        - `scorer`: predicts the losses.
        - `criterion`: what a block has to meet; its losses are those that the scorer was trained
          for, at any threshold.
        - `margin`: 0 takes predictions as they are.
        - `alpha`: share of clips that may miss the threshold, instead of a margin. Infinite margins
          come out if `calibration.enough(alpha)` is false.
        - `calibration`: to take the margin for `alpha` from; of this scorer, criterion and
          threshold.
        - `verify`: whether the loss at the predicted length is measured. Without, nothing is
          decoded, the loss is unknown and `met` false.

        **Raises:** `ValueError` if the parts do not belong together.
        """
        _check_parts(scorer, criterion, calibration)
        if (alpha is None) != (calibration is None):
            raise ValueError(
                "alpha and calibration belong together: calibrate(regressor, tokenizer, clips, "
                "alpha=0.1) makes both"
            )
        if calibration is not None and alpha is not None:
            if margin:
                raise ValueError(f"margin is {margin}; with alpha it comes from the calibration")
            margin = calibration.margin(alpha)
        if not margin >= 0:
            raise ValueError(f"margin is {margin}; it must be 0 or more")
        self.scorer, self.criterion = scorer, criterion
        self.margin, self.verify = float(margin), verify
        self.alpha, self.calibration = alpha, calibration

    @property
    def history(self) -> int:
        return self.scorer.history

    def plan(self, clips: Sequence[Collection[Block]]) -> Sequence[Sequence[int]]:
        # Many blocks at once, for the scorer's sake; on streams each is predicted when it comes.
        parts = in_parts(block for clip in clips for block in clip)
        lengths = itertools.chain.from_iterable(map(self.predict, parts))
        return [list(itertools.islice(lengths, len(clip))) for clip in clips]

    def search(self, block: Block) -> Search:
        if block.planned is None:
            (length,) = self.predict((block,))
        else:
            length = block.clip(block.planned)
        if not self.verify:
            return length
        yield (length,)
        return None

    def predict(self, blocks: Sequence[Block]) -> list[int]:
        """The lengths that blocks are predicted to need, the margin included."""
        if self.margin == math.inf:
            return [block.longest for block in blocks]
        goal = tightened(self.criterion.threshold, self.margin)
        curves = zip(blocks, *self.scorer.curves(blocks), strict=True)
        return [
            block.clip(shortest_meeting(lengths, losses, goal)) for block, lengths, losses in curves
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `scorer.safetensors`, and `calibration.json` if there is a calibration.

        **Raises:** `ValueError` if the scorer is not a `Scorer`.
        """
        if not isinstance(self.scorer, Scorer):
            raise ValueError(f"the scorer is a {type(self.scorer).__name__}; only Scorer has files")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # In between, no calibration: never one of another scorer.
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
        self.scorer.save(folder / SCORER_FILE)
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION_FILE)

    @staticmethod
    def load(
        folder: str | os.PathLike[str],
        model: ElasticTok | ElasticCodec,
        criterion: AbstractCriterion,
        *,
        alpha: float | None = None,
        margin: float | int = 0.0,
        verify: bool = True,
    ) -> "Regressor":
        """Reads what `save` wrote (`elastictok train-regressor` leaves such a folder).

        **Arguments:**

        - `folder`: with `scorer.safetensors` and, for an `alpha`, `calibration.json`.
        - `model`: the tokenizer that it is to be used with.
        - `criterion`, `alpha`, `margin`, `verify`: as of the constructor.

        **Raises:** `ScorerFileError` if a file is damaged, foreign, of a newer version or made for
        another model; `OSError` if it cannot be opened; `ValueError` if the criterion is another
        one than that of the files.
        """
        folder = Path(folder)
        scorer = Scorer.load(folder / SCORER_FILE, model)
        calibration = None
        if alpha is not None:
            calibration = Calibration.load(folder / CALIBRATION_FILE)
            if calibration.codec != scorer.codec:
                raise ScorerFileError(
                    f"{folder / CALIBRATION_FILE} is of the model with fingerprint "
                    f"{calibration.codec}, and the scorer beside it of {scorer.codec}"
                )
        return Regressor(
            scorer, criterion, margin=margin, alpha=alpha, calibration=calibration, verify=verify
        )


def tightened(threshold: float, margin: float) -> float:
    """What predictions have to meet: below the threshold by a margin, lower the larger it is."""
    if threshold > 0:
        return threshold * math.exp(-margin)
    return threshold - margin


def shortest_meeting(lengths: np.ndarray, losses: np.ndarray, goal: float) -> int:
    """The shortest length whose loss is at most `goal`, between candidates by interpolation.

    The logarithm of the loss is interpolated where losses and goal are positive, else the loss. The
    longest candidate if none meets the goal. Never shorter for a lower goal.

    **Arguments:**

    - `lengths`: ascending.
    - `losses`: any; NaN and infinity meet nothing.
    """
    (meeting,) = np.nonzero((losses <= goal) & (losses < math.inf))
    if not len(meeting):
        return int(lengths[-1])
    i = int(meeting[0])
    if i == 0:
        return int(lengths[0])
    before, after = float(losses[i - 1]), float(losses[i])
    if not (math.isfinite(before) and math.isfinite(after)):
        return int(lengths[i])
    if min(before, after, goal) > 0:
        before, after, goal = math.log(before), math.log(after), math.log(goal)
    part = (before - goal) / (before - after)
    low, high = int(lengths[i - 1]), int(lengths[i])
    # The candidate before does not meet it, however near.
    return min(max(low + math.ceil(part * (high - low)), low + 1), high)


def _check_parts(
    scorer: AbstractScorer, criterion: AbstractCriterion, calibration: Calibration | None
) -> None:
    name = criterion_name(criterion)
    if scorer.criterion_name not in (None, name):
        raise ValueError(
            f"the scorer predicts losses of {scorer.criterion_name}, and the criterion is {name}; "
            "use that criterion, or train a scorer for this one"
        )
    if calibration is None:
        return
    for what, wanted, given in (
        ("criterion", calibration.criterion, name),
        ("threshold", calibration.threshold, criterion.threshold),
        ("scorer", calibration.scorer, scorer.fingerprint),
    ):
        if wanted != given:
            raise ValueError(
                f"the calibration is of the {what} {wanted}, and this one is {given}; what it "
                "promises holds for that one alone: calibrate again"
            )
