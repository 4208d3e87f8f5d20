"""Who decides how many tokens a block gets, as it is said on the command line."""

from elastictok.inference import (
    MSE,
    AbstractStrategy,
    Binary,
    EncodeOnce,
    FixedLength,
    Full,
    Regressor,
    Secant,
    WarmStart,
)
from elastictok.models import ElasticTok

from ._commands import Lengths


def check_lengths(lengths: Lengths) -> None:
    """What can be said before a model is loaded.

    **Raises:** `ValueError` for options that do not go together.
    """
    if (lengths.length is None) == (lengths.threshold is None):
        raise ValueError(
            "give either --threshold (fewest tokens that meet a mean squared error, such as 0.02) "
            "or --length (tokens of each block, such as 40)"
        )
    if lengths.regressor is not None and lengths.threshold is None:
        raise ValueError("--regressor predicts lengths for a --threshold; give one")
    if lengths.regressor is None and (lengths.alpha is not None or lengths.unverified):
        raise ValueError("--alpha and --unverified are for a --regressor; name its folder")


def make_strategy(lengths: Lengths, model: ElasticTok, window: int | None) -> AbstractStrategy:
    """The strategy; see `check_lengths`.

    **Arguments:**

    - `window`: blocks that a block will see; None for the model's context.

    **Raises:** `ScorerFileError` for a regressor that is damaged or of another model; `ValueError`
    if it was calibrated for another window or threshold.
    """
    strategy = _search(lengths, model, model.context if window is None else window)
    return EncodeOnce(strategy) if lengths.encode_once else strategy


def _search(lengths: Lengths, model: ElasticTok, window: int) -> AbstractStrategy:
    if lengths.length is not None:
        return FixedLength(length=lengths.length)
    assert lengths.threshold is not None  # checked
    criterion = MSE(lengths.threshold)
    if lengths.regressor is not None:
        verify = not lengths.unverified
        regressor = Regressor.load(
            lengths.regressor, model, criterion, alpha=lengths.alpha, verify=verify
        )
        known = regressor.calibration
        if known is not None and known.window != window:
            raise ValueError(
                f"{lengths.regressor} was calibrated with a window of {known.window} blocks, and "
                f"the window is {window}: what --alpha promises would not hold"
            )
        return regressor
    searches: dict[str, AbstractStrategy] = {
        "warm-start": WarmStart(Secant(criterion)),
        "binary": Binary(criterion),
        "exhaustive": Full(criterion),
    }
    return searches[lengths.search]
