"""How far a predicted length has to be padded so that few clips miss the threshold: a calibration
by conformal risk control."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, final

from ._scorer_file import ScorerFileError, check_sum, parsed, read_bytes
from ._sealed import write_bytes

FORMAT = "elastictok-calibration"

MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Margins on the logarithm of a loss: a margin of 0.1 asks for a tenth less than the threshold."""


@final
@dataclass(frozen=True)
class Calibration:
    """What margin each of a number of clips needed.

    With all tokens, each clip either meets the threshold in every block, or it does not and no
    length helps it. A clip *misses* at a margin if some block misses the threshold there, although
    the clip meets it with all tokens. The margin that a clip *needs* is the smallest one at which,
    and at all larger ones, it does not miss; at an infinite margin all tokens are kept, and no clip
    misses.

    If the clips to come and those of the calibration are exchangeable (drawn in the same way,
    independently of the scorer), then at `margin(alpha)`

        P(a new clip misses) <= alpha,

    the probability being over the draw of the calibration clips and the new one: split conformal
    prediction (arXiv 2107.07511) with the margin needed as the score, which is conformal risk
    control (Angelopoulos et al. 2022, arXiv 2208.02814) of the miss made monotone. It holds for any
    scorer, good or bad, and for any number of clips; a bad scorer costs tokens. It speaks of clips,
    and not of each block, nor of clips of another kind; and of the one threshold, codec, scorer and
    window that the clips were measured with.

    - `needed`: per clip, one of `margins`, or infinity if it misses at the largest.
    - `margins`: those that were tried, ascending.
    - `criterion`, `threshold`: of the losses, the name as `criterion_name` gives it.
    - `codec`: its fingerprint.
    - `scorer`: its fingerprint; None if it has none.
    - `window`: blocks that a block saw, at most.
    """

    needed: tuple[float, ...]
    margins: tuple[float, ...]
    criterion: str
    threshold: float
    codec: str
    scorer: str | None
    window: int

    def __post_init__(self) -> None:
        margins = self.margins
        rising = all(a < b for a, b in pairwise(margins))
        if not margins or not rising or not 0 <= margins[0] <= margins[-1] < math.inf:
            raise ValueError(
                f"margins are {margins}; they must rise, from 0 or more, and be finite"
            )
        strange = set(self.needed) - {*margins, math.inf}
        if strange:
            raise ValueError(f"the margins needed, {sorted(strange)}, are none of those tried")
        if self.window < 1:
            raise ValueError(f"window is {self.window} blocks; a block sees at least itself: 1")

    @property
    def clips(self) -> int:
        """How many were measured."""
        return len(self.needed)

    def margin(self, alpha: float) -> float:
        """The margin at which a new clip misses with a probability of at most `alpha`.

        The `ceil((clips + 1) (1 - alpha))`-th smallest that was needed; infinity, for all tokens,
        if there are not so many clips (see `enough`) or that clip missed at the largest margin.

        **Raises:** `ValueError` unless `0 < alpha < 1`.
        """
        rank = _rank(self.clips, alpha)
        return sorted(self.needed)[rank - 1] if rank <= self.clips else math.inf

    def enough(self, alpha: float) -> bool:
        """Whether there are enough clips to say anything about `alpha`: at least `1 / alpha - 1`.

        With fewer, `margin` is infinite and all tokens are kept: that alone keeps the promise.
        """
        return _rank(self.clips, alpha) <= self.clips

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file."""
        facts = _facts(self)
        about = {"format": FORMAT, "version": 1, "sha256": _checksum(facts), "facts": facts}
        write_bytes(Path(path), (json.dumps(about, indent=1) + "\n").encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Calibration":
        """Reads what `save` wrote.

        **Raises:** `ScorerFileError` if the file is damaged, foreign or of a newer version;
        `OSError` if it cannot be opened.
        """
        path = Path(path)
        about = parsed(path, read_bytes(path))
        if about.get("format") != FORMAT:
            raise ScorerFileError(f"{path} is no {FORMAT}")
        check_sum(path, about, _checksum)
        return _from_facts(path, about["facts"])


def least_clips(alpha: float) -> int:
    """How many clips a calibration needs, to say anything about `alpha`."""
    share = _share(alpha)
    return math.ceil((1 - share) / share)


def _rank(clips: int, alpha: float) -> int:
    # In fractions: (9 + 1) * (1 - 0.1) must be 9 and not a little more, whatever the floats say.
    return math.ceil((clips + 1) * (1 - _share(alpha)))


def _share(alpha: float) -> Fraction:
    alpha = float(alpha)
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha is {alpha}; the share of clips that may miss the threshold is more than 0 and "
            "less than 1, such as 0.1"
        )
    return Fraction(repr(alpha))


def _facts(calibration: Calibration) -> dict[str, Any]:
    # JSON knows no infinity.
    needed = [None if x == math.inf else x for x in calibration.needed]
    threshold = calibration.threshold if math.isfinite(calibration.threshold) else None
    return {
        "needed": needed,
        "margins": list(calibration.margins),
        "criterion": calibration.criterion,
        "threshold": threshold,
        "codec": calibration.codec,
        "scorer": calibration.scorer,
        "window": calibration.window,
    }


def _from_facts(path: Path, facts: Mapping[str, Any]) -> Calibration:
    kinds = {
        "needed": list,
        "margins": list,
        "criterion": str,
        "threshold": float | None,
        "codec": str,
        "scorer": str | None,
        "window": int,
    }
    if set(facts) != set(kinds):
        raise ScorerFileError(f"{path}: its facts differ in {sorted(set(facts) ^ set(kinds))}")
    for name, kind in kinds.items():
        if not isinstance(facts[name], kind) or isinstance(facts[name], bool):
            raise ScorerFileError(f"{path}: {name} is {facts[name]!r}, which no calibration has")
    for name in ("needed", "margins"):
        if not all(type(x) is float or (name == "needed" and x is None) for x in facts[name]):
            raise ScorerFileError(f"{path}: {name} are {facts[name]!r}, which are no margins")
    threshold = math.inf if facts["threshold"] is None else facts["threshold"]
    needed = tuple(math.inf if x is None else x for x in facts["needed"])
    try:
        return Calibration(
            needed,
            tuple(facts["margins"]),
            facts["criterion"],
            threshold,
            facts["codec"],
            facts["scorer"],
            facts["window"],
        )
    except ValueError as error:
        raise ScorerFileError(f"{path} is damaged or foreign: {error}") from error


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checked_margins(margins: Sequence[float | int]) -> tuple[float, ...]:
    """Ascending floats. **Raises:** `ValueError` for what is no grid of margins."""
    values = tuple(sorted({float(margin) for margin in margins}))
    if not values or not 0 <= values[0] <= values[-1] < math.inf:
        raise ValueError(f"margins are {margins}; give some, finite and 0 or more")
    return values
