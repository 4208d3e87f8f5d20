"""What `eval` does to compare allocation strategies."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from elastictok.eval import (
    Item,
    StrategyComparison,
    compare_strategies,
    evaluate,
    share_settings,
    spread_thresholds,
)
from elastictok.eval import Strategy as MakeStrategy
from elastictok.inference import (
    CALIBRATION_FILE,
    MSE,
    SCORER_FILE,
    Binary,
    Binned,
    Calibration,
    EncodeOnce,
    KAry,
    Regressor,
    Scorer,
    Secant,
    Tokenizer,
    WarmStart,
)

from ._commands import Eval
from ._report import progress_bar

_ITEMS = 4
# Seconds that the exhaustive optimum may take of itself, and from which on it is announced.
_MOST_SECONDS = 600
_LONG = 60
# A threshold between is of no use this near to one that was asked for.
_NEAR = 1.1
# Probes in a round of the k-ary search.
_K = 4

NOTE = (
    "Strategies are compared with the exhaustive optimum, which probes every length of every "
    "block, on a few of the files; thresholds that were not asked for lie between what the fewest "
    "and all tokens reach on them."
)
ENCODE_ONCE_NOTE = (
    "The strategy encode once is made for models that were trained with --condition-dropout; with "
    "others it may take more tokens."
)


def comparison(
    command: Eval, tokenizer: Tokenizer, name: str, items: Sequence[Item]
) -> StrategyComparison | None:
    """All that was asked for, on a few of the items; None where it is to be left out."""
    most = _ITEMS if command.strategy_items is None else command.strategy_items
    if most < 0:
        raise ValueError(f"--strategy-items is {most}; 0 leaves the comparison out")
    if command.strategy_frames < 1:
        raise ValueError(f"--strategy-frames is {command.strategy_frames}; at least 1 is compared")
    chosen = [_cut(item, command.strategy_frames) for item in evenly(items, most)]
    if not chosen:
        return None
    thresholds = _thresholds(command, spread_thresholds(tokenizer, chosen))
    seconds = len(thresholds) * _optimum_seconds(tokenizer, chosen)
    if command.strategy_items is None and seconds > _MOST_SECONDS:
        fitting = int(len(chosen) * _MOST_SECONDS / seconds)
        _say_too_long(name, seconds, len(chosen), fitting)
        seconds *= fitting / len(chosen)
        chosen = evenly(chosen, fitting)
        if not chosen:
            return None
    if seconds > _LONG:
        say(
            f"strategies on {len(chosen)} {name}: the exhaustive optimum takes about "
            f"{_duration(seconds)}; --strategy-items 0 leaves it out"
        )
    with progress_bar(f"comparing strategies on {name}") as advance:
        return compare_strategies(
            tokenizer,
            chosen,
            [MSE(threshold) for threshold in thresholds],
            _strategies(command, tokenizer),
            name=name,
            progress=advance,
        )


def _strategies(command: Eval, tokenizer: Tokenizer) -> dict[str, MakeStrategy]:
    """Those that were asked for, under the names that the table has for them."""
    tokens = tokenizer.codec.tokens_per_block(*tokenizer.codec.size)
    # The paper's hundred would be every length of a small model: the optimum itself.
    bins = min(100, max(2, tokens // 4))
    known: dict[str, tuple[str, MakeStrategy]] = {
        "binary": ("binary", Binary),
        "secant": ("secant", Secant),
        "k-ary": (f"{_K}-ary", lambda criterion: KAry(criterion, _K)),
        "binned": (f"{bins} bins", lambda criterion: Binned(criterion, bins)),
        "warm-start": ("warm start", lambda criterion: WarmStart(Secant(criterion))),
        "encode-once": ("encode once", lambda criterion: EncodeOnce(Binary(criterion))),
    }
    chosen = dict(known[name] for name in dict.fromkeys(command.strategies))
    return chosen | _regressors(command, tokenizer)


def _regressors(command: Eval, tokenizer: Tokenizer) -> dict[str, MakeStrategy]:
    if command.regressor is None:
        if command.alpha is not None:
            raise ValueError("--alpha is for a --regressor; name its folder")
        return {}
    scorer = Scorer.load(command.regressor / SCORER_FILE, tokenizer.codec)
    made: dict[str, MakeStrategy] = {"regressor": lambda criterion: Regressor(scorer, criterion)}
    if command.alpha is not None:
        calibration = Calibration.load(command.regressor / CALIBRATION_FILE)
        margin = calibration.margin(command.alpha)
        # The same margin everywhere; what is promised holds at the calibration's threshold alone.
        made[f"regressor, alpha {command.alpha:g}"] = lambda criterion: Regressor(
            scorer, criterion, margin=margin
        )
    return made


def _thresholds(command: Eval, between: Sequence[float]) -> list[float]:
    """Those asked for and those between, from rough to fine."""
    asked = set(command.threshold)
    apart = [x for x in between if not any(x <= _NEAR * y and y <= _NEAR * x for y in asked)]
    return sorted(asked.union(apart), reverse=True)


def _optimum_seconds(tokenizer: Tokenizer, items: Sequence[Item]) -> float:
    """What probing every length of every block may take, by one probe of each block."""
    (row,) = evaluate(tokenizer, items, settings=share_settings([1])).rows
    return sum(
        spent.encode_seconds
        * (spent.tokens_per_block - min(tokenizer.codec.min_tokens, spent.tokens_per_block) + 1)
        for spent in row.spent
    )


def _say_too_long(name: str, seconds: float, count: int, fitting: int) -> None:
    kept = f"on {fitting} only" if fitting else "not at all"
    say(
        f"strategies are compared on {name} {kept}: the exhaustive optimum of {count} would take "
        f"about {_duration(seconds)}; --strategy-items {count} asks for it"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _cut(item: Item, frames: int) -> Item:
    return replace(item, frames=item.frames[:frames])


def evenly(values: Sequence, most: int) -> list:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)
