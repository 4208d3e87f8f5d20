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


def make_strategy(lengths: Lengths, model: ElasticTok) -> AbstractStrategy:
    """The strategy; see `check_lengths`.

    **Raises:** `ScorerFileError` for a regressor that is damaged or of another model.
    """
    strategy = _search(lengths, model)
    return EncodeOnce(strategy) if lengths.encode_once else strategy


def _search(lengths: Lengths, model: ElasticTok) -> AbstractStrategy:
    if lengths.length is not None:
        return FixedLength(length=lengths.length)
    assert lengths.threshold is not None  # checked
    criterion = MSE(lengths.threshold)
    if lengths.regressor is not None:
        verify = not lengths.unverified
        return Regressor.load(
            lengths.regressor, model, criterion, alpha=lengths.alpha, verify=verify
        )
    searches: dict[str, AbstractStrategy] = {
        "warm-start": WarmStart(Secant(criterion)),
        "binary": Binary(criterion),
        "exhaustive": Full(criterion),
    }
    return searches[lengths.search]
