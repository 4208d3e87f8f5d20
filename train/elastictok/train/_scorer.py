"""Training a scorer: losses are measured at a few lengths of each block, and learnt from pixels."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32

from elastictok.inference import (
    SCORE_SHARES,
    AbstractCriterion,
    AbstractStrategy,
    Block,
    Scorer,
    Search,
    Tokenizer,
    criterion_name,
)

from ._errors import NonFiniteError
from ._optimizers import Cosine, adamw
from ._progress import display

# Lower losses count as this one: a perfect block has no logarithm.
_LEAST = 1e-8


@final
@dataclasses.dataclass(frozen=True)
class ScoreTarget:
    """A block and what it loses.

    - `block`: with the pixels of the block and of those before it.
    - `lengths`: ascending, from its shortest to its longest.
    - `losses`: measured, at those lengths.
    """

    block: Block
    lengths: np.ndarray
    losses: np.ndarray


def score_targets(
    tokenizer: Tokenizer,
    clips: Sequence[np.ndarray],
    criterion: AbstractCriterion,
    *,
    context: int = 2,
    shares: Sequence[float | int] = SCORE_SHARES,
    seed: int = 0,
) -> list[ScoreTarget]:
    """Measures what a scorer is to predict: of every block, the losses at a few lengths.

    A block's losses depend on the lengths of those before it. Half of the blocks are given the
    shortest measured length that meets the criterion, as they will be in use, the other half any of
    those measured.

    **Arguments:**

    - `tokenizer`: its codec, window, `native` and `limit` are used; its strategy is not.
    - `clips`: pictures and clips, `u8[frames height width channels]`.
    - `criterion`: whose losses.
    - `context`: blocks whose pixels a target holds, the one at hand included.
    - `shares`: of the way from the shortest to the longest length; those of a `Scorer` by default.
    - `seed`: of the lengths drawn.

    **Returns:** a target for each block, in no order that means anything.
    """
    recorder = _Recorder(
        criterion, tuple(float(share) for share in shares), context - 1, np.random.default_rng(seed)
    )
    tokenizer.with_strategy(recorder).encode_batch(clips)
    return recorder.targets


@final
class _Recorder(AbstractStrategy):
    """Probes the lengths at `shares`, and remembers what it was told."""

    criterion: AbstractCriterion
    shares: tuple[float, ...]
    earlier: int
    generator: np.random.Generator
    targets: list[ScoreTarget] = eqx.field(default_factory=list)

    @property
    def history(self) -> int:
        return self.earlier

    def search(self, block: Block) -> Search:
        span = block.longest - block.shortest
        lengths = block.shortest + np.rint(np.multiply(self.shares, span)).astype(np.int64)
        losses = yield tuple(lengths.tolist())
        self.targets.append(ScoreTarget(block, lengths, np.array(losses, np.float64)))
        if self.generator.random() < 0.5:
            return None
        return int(self.generator.choice(np.unique(lengths)))


def fit_scorer(
    tokenizer: Tokenizer,
    targets: Sequence[ScoreTarget],
    criterion: AbstractCriterion,
    *,
    steps: int = 800,
    batch_size: int = 16,
    learning_rate: float | int = 2e-3,
    context: int = 2,
    shares: Sequence[float | int] = SCORE_SHARES,
    patch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scorer:
    """Trains a scorer on what `score_targets` measured.

    By AdamW on the mean absolute error of the curves: of the logarithms of the losses if none is
    negative, else of the losses. The same seed gives the same scorer on the same machine.

    **Arguments:**

    - `tokenizer`: whose codec the targets are of.
    - `targets`: of blocks of any sizes; the step is compiled for each.
    - `criterion`: as of the targets.
    - `steps`, `batch_size`, `learning_rate`: the rate falls to 0 along a cosine.
    - `context`, `shares`: as of the targets.
    - `patch`: height and width of a patch, see `Scorer`; by default 8, and 16 for codecs made for
      frames of 128 pixels and more.
    - `seed`: of weights and batches.
    - `progress`: a line on standard error now and then.

    **Raises:** `ValueError` without targets, or if no loss is finite.
    """
    if not targets:
        raise ValueError("there are no targets to train a scorer on; give pictures or clips")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1")
    logarithmic = all(not np.any(target.losses < 0) for target in targets)
    codec = tokenizer.codec
    scorer = Scorer(
        frames_per_block=codec.frames_per_block,
        criterion=criterion_name(criterion),
        codec=codec.fingerprint,
        context=context,
        patch=(8 if min(codec.size) < 128 else 16) if patch is None else patch,
        shares=shares,
        logarithmic=logarithmic,
        key=jax.random.key(seed),
    )
    curves = [_curve(target, logarithmic) for target in targets]
    scorer = eqx.tree_at(lambda s: s.bias, scorer, _bias(curves, scorer.shares))
    batches = _batches(_groups(scorer, targets, curves), steps, batch_size, seed)
    return _train(scorer, batches, steps, learning_rate, progress)


class _Curve(NamedTuple):
    """A target on the scorer's scale, and where it is known."""

    places: np.ndarray
    values: np.ndarray
    known: np.ndarray


class _Batch(eqx.Module):
    """Blocks of one size, as the scorer measures them, and their curves."""

    features: Float[Array, "batch tokens features"]
    valid: Bool[Array, "batch blocks"]
    places: Float[Array, "batch candidates"]
    values: Float[Array, "batch candidates"]
    known: Bool[Array, "batch candidates"]
    grid: tuple[int, int] = eqx.field(static=True)


def _curve(target: ScoreTarget, logarithmic: bool) -> _Curve:
    span = target.block.longest - target.block.shortest
    places = (target.lengths - target.block.shortest) / span if span else np.ones(1)
    known = np.isfinite(target.losses)
    values = np.where(known, target.losses, 0.0)
    if logarithmic:
        values = np.log(np.maximum(values, _LEAST))
    return _Curve(np.broadcast_to(places, values.shape), values, known)


def _bias(curves: Sequence[_Curve], shares: Sequence[float]) -> Float32[Array, "shares"]:
    """What makes the scorer predict the mean curve to begin with."""
    usable = [curve for curve in curves if curve.known.any()]
    if not usable:
        raise ValueError("none of the measured losses is finite: the codec or the criterion fails")
    on = [
        np.interp(shares, curve.places[curve.known], curve.values[curve.known]) for curve in usable
    ]
    mean = np.mean(on, axis=0)
    drops = np.maximum(-np.diff(mean), 1e-3)
    # The inverse of softplus.
    return jnp.asarray(np.concatenate([mean[:1], drops + np.log(-np.expm1(-drops))]), jnp.float32)


class _Group(NamedTuple):
    """All blocks of one size, in NumPy; the fields are those of `_Batch`."""

    features: np.ndarray
    valid: np.ndarray
    places: np.ndarray
    values: np.ndarray
    known: np.ndarray
    grid: tuple[int, int]


def _groups(
    scorer: Scorer, targets: Sequence[ScoreTarget], curves: Sequence[_Curve]
) -> list[_Group]:
    """What is measured of pixels is not trained: once is enough."""
    groups: dict[tuple[int, int], list[tuple[np.ndarray, ...]]] = defaultdict(list)
    measure = eqx.filter_jit(scorer.measure)
    for target, curve in zip(targets, curves, strict=True):
        pixels, valid = scorer.window(target.block)
        features = np.asarray(measure(jnp.asarray(pixels), jnp.asarray(valid)))
        places, values = curve.places.astype(np.float32), curve.values.astype(np.float32)
        groups[scorer.grid(*pixels.shape[1:3])].append(
            (features, valid, places, values, curve.known)
        )
    found = []
    for grid, parts in groups.items():
        features, valid, places, values, known = (np.stack(x) for x in zip(*parts, strict=True))
        found.append(_Group(features, valid, places, values, known, grid))
    return found


def _batches(groups: Sequence[_Group], steps: int, size: int, seed: int) -> Iterator[_Batch]:
    """Random blocks, those of a batch of one size; each block is as likely as any other."""
    generator = np.random.default_rng(seed)
    counts = np.array([len(group.valid) for group in groups])
    for _ in range(steps):
        group = groups[generator.choice(len(groups), p=counts / counts.sum())]
        chosen = generator.integers(len(group.valid), size=size)
        yield _Batch(
            jnp.asarray(group.features[chosen]),
            jnp.asarray(group.valid[chosen]),
            jnp.asarray(group.places[chosen]),
            jnp.asarray(group.values[chosen]),
            jnp.asarray(group.known[chosen]),
            group.grid,
        )


def _train(
    scorer: Scorer,
    batches: Iterator[_Batch],
    steps: int,
    learning_rate: float | int,
    progress: bool,
) -> Scorer:
    optimizer = _optimizer(learning_rate, steps)
    state = optimizer.init(eqx.filter(scorer, eqx.is_array))
    show = display(progress=progress, start=0, steps=steps)
    every = max(1, steps // 10)
    errors: list[Float[Array, ""]] = []
    try:
        for step, batch in enumerate(batches, start=1):
            scorer, state, error = _update(scorer, state, batch, optimizer)
            errors.append(error)
            show.step(step)
            if step % every == 0:
                mean = float(np.mean([float(each) for each in errors]))
                if not math.isfinite(mean):
                    raise NonFiniteError(f"the scorer's error at step {step} is {mean}")
                show.say(f"scorer, step {step}/{steps}: error of the curves {mean:.3f}")
                errors.clear()
    finally:
        show.close()
    return scorer


# The same object again, so that training again compiles nothing again.
@functools.lru_cache(maxsize=8)
def _optimizer(learning_rate: float | int, steps: int) -> optax.GradientTransformation:
    schedule = Cosine(steps, warmup=min(50, steps // 10))
    return adamw(learning_rate, schedule=schedule, weight_decay=0.1)


@eqx.filter_jit
def _update(
    scorer: Scorer,
    state: optax.OptState,
    batch: _Batch,
    optimizer: optax.GradientTransformation,
) -> tuple[Scorer, optax.OptState, Float[Array, ""]]:
    error, gradients = eqx.filter_value_and_grad(_error)(scorer, batch)
    updates, state = optimizer.update(gradients, state, eqx.filter(scorer, eqx.is_array))
    return eqx.apply_updates(scorer, updates), state, error


def _error(scorer: Scorer, batch: _Batch) -> Float[Array, ""]:
    """Mean absolute error over what is known."""
    shares = jnp.asarray(scorer.shares, jnp.float32)
    curves = jax.vmap(lambda x, valid: scorer.curve(x, valid, batch.grid))(
        batch.features, batch.valid
    )
    predicted = jax.vmap(lambda places, curve: jnp.interp(places, shares, curve))(
        batch.places, curves
    )
    off = jnp.where(batch.known, jnp.abs(predicted - batch.values), 0.0)
    return jnp.sum(off) / jnp.maximum(jnp.sum(batch.known), 1)
