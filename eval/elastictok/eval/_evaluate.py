"""Running a tokenizer and its rivals over pictures and clips."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import jax
import numpy as np
from jaxtyping import UInt8

from elastictok.inference import (
    MSE,
    AbstractCriterion,
    AbstractStrategy,
    Binary,
    Block,
    FixedLength,
    Search,
    Tokenizer,
    Tokens,
)

from ._baselines import AbstractBaseline
from ._criteria import loss_name, requirement
from ._rates import CodebookUsage, codebook_usage
from ._results import Evaluation, Measurement, Reconstruction, Row, Sample, Spent, measure


@final
@dataclass(frozen=True, eq=False)
class Item:
    """A picture (one frame) or a clip to evaluate on.

    **Fields:**

    - `name`: for tables and captions.
    - `frames`: of any size that the tokenizer takes.
    - `fps`: frames per second, None if unknown or a picture.
    - `cuts`: indices of the first frame after each cut, where they are known; only shown.
    """

    name: str
    frames: UInt8[np.ndarray, "frames height width channels"]
    fps: float | int | None = None
    cuts: tuple[int, ...] = ()


# Measured, never acted on: any finite error will do.
_ANYTHING = MSE(math.inf)


@final
class Share(AbstractStrategy):
    """The same share of its tokens for every block, one probe each.

    As `FixedLength`, but it means the same for items of any size.
    """

    share: float
    criterion: AbstractCriterion

    def __init__(self, share: float | int, criterion: AbstractCriterion = _ANYTHING):
        """**Arguments:**

        - `share`: of the tokens that a block could have, above 0 and at most 1; the length is
            rounded, and not below what the block allows.
        - `criterion`: measured and reported, but never acted on.

        **Raises:** `ValueError` for a share outside that range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share} of the tokens; give more than 0, at most 1")
        self.share = float(share)
        self.criterion = criterion

    def search(self, block: Block) -> Search:
        yield (max(block.shortest, round(self.share * block.longest)),)


@final
@dataclass(frozen=True)
class Setting:
    """A strategy under a name. `searched`: whether it looks for lengths that meet a threshold."""

    name: str
    strategy: AbstractStrategy
    searched: bool


def share_settings(
    shares: Sequence[float | int] = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1),
) -> tuple[Setting, ...]:
    """Every block at the same share of its tokens: a rate-distortion curve."""
    return tuple(Setting(_share_name(share), Share(share), searched=False) for share in shares)


def _share_name(share: float | int) -> str:
    if share == 1:
        return "all tokens"
    return f"{Fraction(share).limit_denominator(1000)} of the tokens"


def length_settings(lengths: Sequence[int]) -> tuple[Setting, ...]:
    """Every block at the same number of tokens: a rate-distortion curve."""
    return tuple(Setting(f"{n} tokens", FixedLength(length=n), searched=False) for n in lengths)


def threshold_settings(
    criteria: Sequence[AbstractCriterion],
    *,
    search: Callable[[AbstractCriterion], AbstractStrategy] = Binary,
) -> tuple[Setting, ...]:
    """Each block with the fewest tokens found that meet a criterion.

    **Arguments:**

    - `criteria`: one setting for each, such as `MSE(0.003)`.
    - `search`: makes the strategy: `Binary`, or `Full` for the exhaustive optimum.
    """
    suffix = "" if search is Binary else f", {getattr(search, '__name__', 'search')}"
    return tuple(
        Setting(f"{requirement(criterion)}{suffix}", search(criterion), searched=True)
        for criterion in criteria
    )


def describe_device() -> str:
    """What jax computes on, for people."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return f"{len(jax.devices())} x {device.device_kind}"


_Run = Iterator[tuple[Measurement, Reconstruction]]


def _setting_run(
    tokenizer: Tokenizer, setting: Setting, items: Sequence[Item], truths: Sequence[np.ndarray]
) -> _Run:
    """Encodes items together, then decodes one after another."""
    tokenizer = tokenizer.with_strategy(setting.strategy)
    start = time.perf_counter()
    rates = [None if item.fps is None else float(item.fps) for item in items]
    encoded = tokenizer.encode_batch([item.frames for item in items], rates)
    seconds = _divided(time.perf_counter() - start, encoded)
    for item, truth, tokens, encode_seconds in zip(items, truths, encoded, seconds, strict=True):
        start = time.perf_counter()
        frames = tokenizer.decode(tokens)
        decode_seconds = time.perf_counter() - start
        losses = _losses(setting.strategy.criterion, truth, frames, tokens)
        spent = Spent(
            lengths=tuple(map(int, tokens.lengths)),
            tokens_per_block=tokens.tokens_per_block,
            frames_per_block=tokens.frames_per_block,
            bits_per_token=tokens.bits_per_token,
            losses=losses,
            met=tuple(map(setting.strategy.criterion.meets, losses)),
            measured=tuple(map(bool, tokens.measured)),
            encoder_evaluations=int(tokens.encoder_evaluations.sum()),
            decoder_evaluations=int(tokens.decoder_evaluations.sum()),
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
        )
        measured = _measurement(item, truth, frames, tokens.bits, spent)
        yield measured, Reconstruction(setting.name, frames, tokens)


def _baseline_run(
    baseline: AbstractBaseline, items: Sequence[Item], truths: Sequence[np.ndarray]
) -> _Run:
    for item, truth in zip(items, truths, strict=True):
        frames = baseline(truth)
        measured = _measurement(item, truth, frames, baseline.bits(*truth.shape[:3]), None)
        yield measured, Reconstruction(baseline.label(), frames, None)


def _divided(seconds: float, encoded: Sequence[Tokens]) -> list[float]:
    """Wall-clock time of a call for several items, by what each took of it."""
    if len(encoded) == 1:
        return [seconds]
    parts = np.array([0.0 if each.seconds is None else each.seconds.sum() for each in encoded])
    return [float(part) for part in seconds * parts / parts.sum()]


def _losses(
    criterion: AbstractCriterion, truth: np.ndarray, frames: np.ndarray, tokens: Tokens
) -> tuple[float, ...]:
    """Of each block. What the strategy did not measure is measured here, on what came back."""
    size = tokens.frames_per_block
    return tuple(
        float(tokens.losses[block])
        if tokens.measured[block]
        else float(criterion(truth[start : start + size], frames[start : start + size]))
        for block, start in enumerate(range(0, len(truth), size))
    )


def _measurement(
    item: Item, truth: np.ndarray, frames: np.ndarray, bits: float | None, spent: Spent | None
) -> Measurement:
    count, height, width = truth.shape[:3]
    return Measurement(item.name, count, height, width, bits, measure(truth, frames), spent)


def _usage(tokens: Sequence[Tokens]) -> CodebookUsage | None:
    codes = [each.codes for each in tokens if each.codes is not None]
    if not codes or tokens[0].codebook_size is None:
        return None
    return codebook_usage(np.concatenate(codes), tokens[0].codebook_size)


@final
class _Column:
    """What one setting or baseline gave so far, item after item."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.tokens: list[Tokens] = []

    def add(self, measured: Measurement, tokens: Tokens | None) -> None:
        self.measurements.append(measured)
        if tokens is not None:
            self.tokens.append(tokens)


def _setting_row(setting: Setting, column: _Column) -> Row:
    threshold = setting.strategy.criterion.threshold
    return Row(
        name=setting.name,
        searched=setting.searched,
        loss=loss_name(setting.strategy.criterion),
        threshold=threshold if math.isfinite(threshold) else None,
        measurements=tuple(column.measurements),
        usage=_usage(column.tokens),
    )


def _baseline_row(baseline: AbstractBaseline, column: _Column) -> Row:
    return Row(baseline.label(), False, "", None, tuple(column.measurements), None)


def _check(items: Sequence[Item], names: Sequence[str], together: int) -> None:
    if not items:
        raise ValueError("nothing to evaluate: give at least one picture or clip")
    if len(set(names)) < len(names):
        raise ValueError(f"two settings or baselines have the same name: {sorted(names)}")
    if together < 1:
        raise ValueError(f"{together} items are to be encoded together; at least 1 is")


def _warm_up(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    truths: Sequence[np.ndarray],
    compiled: set[tuple[int, ...]],
) -> None:
    """Compiles what these items need: that is, for their sizes and for the windows they fill."""
    size = tokenizer.codec.frames_per_block
    warm = tokenizer.with_strategy(FixedLength(length=1))
    for item, truth in zip(items, truths, strict=True):
        blocks = min(-(-len(truth) // size), tokenizer.window)
        needed = (*truth.shape[1:3], blocks)
        if needed not in compiled:
            warm.decode(warm.encode(item.frames[: blocks * size]))
            compiled.add(needed)


def evaluate(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    settings: Sequence[Setting],
    baselines: Sequence[AbstractBaseline] = (),
    name: str = "evaluation",
    keep: int = 0,
    together: int | None = None,
    progress: Callable[[], None] | None = None,
) -> Evaluation:
    """Measures a tokenizer at several settings, and trivial coders beside it, on the same items.

    Reconstructions are compared with the items as the tokenizer sees them (`Tokenizer.fit`), and
    the baselines are given the same. Seconds are wall-clock time of encoding (resizing included)
    and decoding for an item, or its share of it where several are encoded together; what has to be
    compiled for a new size of frame or window is compiled before, on blocks that are not timed.

    Pictures and clips want separate calls: their tables differ in what a block costs, and so do
    their baselines.

    **Arguments:**

    - `tokenizer`: gives the model, window and size rule; its strategy is not used.
    - `items`: pictures and clips.
    - `settings`: from `share_settings`, `length_settings` and `threshold_settings`, or your own.
    - `baselines`: from `fit_baselines`, fitted to other material.
    - `name`: of the set of items, for titles.
    - `keep`: of so many items, the first ones, pixels and tokens are kept in `Evaluation.samples`.
    - `together`: so many items go through `Tokenizer.encode_batch` at once, and strategies that
        plan, plan over them; by default as many as the codec has lanes.
    - `progress`: called after each item at each setting and baseline, that is
        `len(items) * (len(settings) + len(baselines))` times.

    **Returns:**

    An `Evaluation`: a row for each setting, then one for each baseline.

    **Raises:**

    `ValueError` if there is no item, two rows would have the same name, or `together` is below 1.
    """
    names = [*(setting.name for setting in settings), *(each.label() for each in baselines)]
    size = tokenizer.codec.lanes if together is None else together
    _check(items, names, size)
    columns = {each: _Column() for each in names}
    samples: list[Sample] = []
    compiled: set[tuple[int, ...]] = set()
    for first in range(0, len(items), size):
        group = items[first : first + size]
        truths = [tokenizer.fit(item.frames) for item in group]
        _warm_up(tokenizer, group, truths, compiled)
        kept: list[list[Reconstruction]] = [[] for _ in group]
        for run in (
            *(_setting_run(tokenizer, setting, group, truths) for setting in settings),
            *(_baseline_run(baseline, group, truths) for baseline in baselines),
        ):
            for reconstructions, (measured, reconstruction) in zip(kept, run, strict=True):
                columns[reconstruction.row].add(measured, reconstruction.tokens)
                reconstructions.append(reconstruction)
                if progress is not None:
                    progress()
        samples += [
            Sample(index, item.name, item.fps, item.cuts, truth, tuple(reconstructions))
            for index, item, truth, reconstructions in zip(
                range(first, keep), group, truths, kept, strict=False
            )
        ]
    return Evaluation(
        name=name,
        device=describe_device(),
        fingerprint=tokenizer.codec.fingerprint,
        rows=(
            *(_setting_row(setting, columns[setting.name]) for setting in settings),
            *(_baseline_row(baseline, columns[baseline.label()]) for baseline in baselines),
        ),
        samples=tuple(samples),
    )
