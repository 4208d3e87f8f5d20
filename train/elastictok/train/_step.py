"""One training step: from uint8 pixels to the next state, a pure function."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree, UInt8

from elastictok.models import (
    LOCAL,
    AbstractExecution,
    AbstractTailDrop,
    ElasticTok,
    trainable,
)

from ._errors import DataError
from ._losses import MSE, AbstractLoss, mean_over_valid

Loss = Callable[..., Float[Array, ""]]
TailDrop = Callable[..., Int[Array, "blocks"]]
Weight = float | int | optax.Schedule
Metrics = dict[str, Float[Array, ""]]


class TrainState(eqx.Module):
    """All that a step reads and writes: what a checkpoint holds.

    - `model`: the model.
    - `opt_state`: of the optimizer, over the trained arrays only.
    - `step`: steps done.
    - `key`: of the run; each step folds its number into it.
    - `average`: of the trained arrays over the steps, None elsewhere; None without averaging.
    """

    model: ElasticTok
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]
    average: PyTree | None = None

    def averaged(self) -> ElasticTok:
        """The model with the averaged arrays where there are such."""
        return self.model if self.average is None else eqx.combine(self.average, self.model)


class DeviceBatch(eqx.Module):
    """A batch on the devices, pixels still bytes."""

    pixels: UInt8[Array, "batch blocks frames height width 3"]
    segments: Int[Array, "batch blocks"]
    valid: Bool[Array, "batch blocks"]


class Average(eqx.Module):
    """Exponential average of the weights over the steps, often a better model than the last one.

    - `decay`: 0.999 looks back over about a thousand steps. Early steps count more, with a decay of
        `(1 + step) / (10 + step)` while that is less: the random weights of the start are forgotten
        soon.
    """

    decay: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and less than 1")

    def __call__(self, average: PyTree, params: PyTree, step: Int[Array, ""]) -> PyTree:
        """The next average.

        **Arguments:**

        - `average`: the last one.
        - `params`: after this step.
        - `step`: done before this one.
        """
        decay = jnp.minimum(self.decay, (1 + step) / (10 + step))
        return jax.tree.map(
            lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), average, params
        )


def init_state(
    model: ElasticTok,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    average: bool = False,
) -> TrainState:
    """The state before the first step. It shares no memory with `model`: steps donate it.

    **Arguments:**

    - `average`: whether to keep an average of the weights, see [`Average`][].
    """
    model = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, model)
    params = eqx.filter(model, trainable(model))
    averaged = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(model, optimizer.init(params), jnp.zeros((), jnp.int32), key, averaged)


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    *,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    tail_drop: TailDrop,
    quantizer_weight: Weight,
    accumulate: int = 1,
    average: Average | None = None,
    execution: AbstractExecution = LOCAL,
) -> tuple[TrainState, Metrics]:
    """Draws lengths, reconstructs, moves the trained arrays, then lets the quantizer update itself.

    The total is `loss + quantizer_weight * (quantizer's loss per valid block) + batch loss`, where
    the quantizer's loss is summed over kept tokens and averaged over the valid blocks of the batch,
    and its batch loss is a function of the statistics summed over the batch.

    **Arguments:**

    - `quantizer_weight`: a number, or a function of the step.
    - `accumulate`: parts that the batch is computed in, one after the other, for less memory. The
        gradient is that of the whole batch, for losses that are means over valid blocks; the
        quantizer's batch loss, and what a loss draws at random, are per part.
    - `tail_drop`: draws the kept lengths. One whose `probe` is not None is told before how well the
        state's averaged model reconstructs the blocks from that share of their tokens: one more
        pass forward, part by part, and the same errors however many parts there are.
    - `average`: how the state's average moves; None leaves it.
    - `execution`: how the model's layers are carried out.

    **Returns:** the next state, and for this batch, before the update: `loss` (the total),
    `reconstruction`, `quantizer` (what the quantizer adds to the total), `mse` (pixels in
    [-1, 1]), `kept` (share of tokens kept in valid blocks) and `gradient_norm`.
    """
    if isinstance(loss, AbstractLoss):
        loss = loss.at(state.step)
    weight = quantizer_weight(state.step) if callable(quantizer_weight) else quantizer_weight
    params, rest = eqx.partition(state.model, trainable(state.model))

    def total(params: PyTree, part: _Part):
        model = eqx.combine(params, rest)
        value, others = batch_losses(
            model, part.batch, loss, tail_drop, weight, part.keys, execution, part.errors
        )
        return part.share * value, others

    parts = _parts(batch, step_keys(state.key, state.step, batch.pixels.shape[0]), accumulate)
    if isinstance(tail_drop, AbstractTailDrop) and tail_drop.probe is not None:
        measure = functools.partial(
            block_errors, state.averaged(), share=tail_drop.probe, execution=execution
        )
        parts = parts._replace(errors=relative(_each(measure, parts.batch), parts.batch.valid))
    gradient, metrics, statistics = _accumulated(
        functools.partial(jax.value_and_grad(total, has_aux=True), params), parts
    )
    updates, opt_state = optimizer.update(gradient, state.opt_state, params)
    params = eqx.apply_updates(params, updates)
    model = eqx.combine(params, rest)
    quantizer = model.quantizer.update(jax.lax.stop_gradient(statistics))
    model = eqx.tree_at(lambda m: m.quantizer, model, quantizer)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    averaged = state.average
    if average is not None:
        averaged = average(averaged, params, state.step)
    return TrainState(model, opt_state, state.step + 1, state.key, averaged), metrics


class Keys(NamedTuple):
    """Of a step: for each example's lengths, for each example's model, for the loss."""

    lengths: Key[Array, "batch"]
    model: Key[Array, "batch"]
    loss: Key[Array, ""]


class _Part(NamedTuple):
    """What is computed at once, its share of the batch's valid blocks, and for a policy that wants
    to know them the errors of its blocks."""

    batch: DeviceBatch
    keys: Keys
    share: Float[Array, ""]
    errors: Float[Array, "*parts batch blocks"] | None = None


def step_keys(key: Key[Array, ""], step: Int[ArrayLike, ""], examples: int) -> Keys:
    """The keys of a step of a run.

    **Arguments:**

    - `key`: of the run.
    - `examples`: in a batch.
    """
    lengths, model, loss = jax.random.split(jax.random.fold_in(key, step), 3)
    return Keys(jax.random.split(lengths, examples), jax.random.split(model, examples), loss)


def _parts(batch: DeviceBatch, keys: Keys, count: int) -> _Part:
    """All parts, stacked. A part has every `count`-th example, some of each device's."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    if batch.pixels.shape[0] % count:
        raise DataError(
            f"a batch of {batch.pixels.shape[0]} examples cannot be computed in {count} parts; "
            f"choose a batch size that is a multiple of {count}, or accumulate less"
        )
    batches = jax.tree.map(split, batch)
    blocks = jnp.sum(batches.valid, axis=(1, 2))
    loss_keys = keys.loss[None] if count == 1 else jax.random.split(keys.loss, count)
    each = Keys(split(keys.lengths), split(keys.model), loss_keys)
    return _Part(batches, each, blocks / jnp.maximum(jnp.sum(blocks), 1))


def _each(function: Callable[[DeviceBatch], Array], batches: DeviceBatch) -> Array:
    """The function's values for all parts, stacked; one part after the other."""
    if batches.valid.shape[0] > 1:
        return jax.lax.map(function, batches)
    return function(jax.tree.map(lambda x: x[0], batches))[None]


def _accumulated(
    part_gradient: Callable[[_Part], Any], parts: _Part
) -> tuple[PyTree, Metrics, PyTree]:
    """The gradient, metrics and statistics of all parts."""

    def one(part: _Part) -> tuple[PyTree, Metrics, PyTree]:
        (_, (metrics, statistics)), gradient = part_gradient(part)
        return gradient, jax.tree.map(lambda value: part.share * value, metrics), statistics

    count = parts.share.shape[0]
    first = jax.tree.map(lambda x: x[0], parts)
    if count == 1:
        return one(first._replace(share=jnp.ones(())))

    def add(so_far: PyTree, part: _Part) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, so_far, one(part)), None

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.scan(add, nothing, parts)[0]


def block_errors(
    model: ElasticTok,
    batch: DeviceBatch,
    *,
    share: float,
    execution: AbstractExecution = LOCAL,
) -> Float[Array, "batch blocks"]:
    """The mean squared error of each block's pixels, in [-1, 1], without a gradient.

    **Arguments:**

    - `share`: of the tokens, of which the model reconstructs (within its bounds).
    - `execution`: as of `train_step`.

    **Returns:** 0 for blocks that are not valid.
    """
    examples, blocks, _, height, width, _ = batch.pixels.shape
    tokens = model.tokens_per_block(height, width)
    kept = min(max(round(share * tokens), min(model.min_tokens, tokens)), tokens)
    lengths = jnp.full((blocks,), kept, jnp.int32)
    target = _clips(model, batch)
    pixels = jax.vmap(
        lambda x, segments, valid: model(x, lengths, segments, valid, execution=execution).pixels,
        spmd_axis_name=execution.batch_axes,
    )(target, batch.segments, batch.valid)
    errors = jnp.mean(jnp.square(pixels - target).reshape(examples, blocks, -1), axis=-1)
    return jax.lax.stop_gradient(jnp.where(batch.valid, errors, 0))


def relative(
    errors: Float[Array, "*parts batch blocks"], valid: Bool[Array, "*parts batch blocks"]
) -> Float[Array, "*parts batch blocks"]:
    """Errors divided by their mean over the valid blocks; 1 for all if there is none at all."""
    mean = jnp.sum(jnp.where(valid, errors, 0)) / jnp.maximum(jnp.sum(valid), 1)
    return jnp.where(mean > 0, errors / jnp.where(mean > 0, mean, 1), 1)


def _clips(model: ElasticTok, batch: DeviceBatch) -> Float[Array, "batch frames height width 3"]:
    """The pixels of a batch in [-1, 1], the blocks of an example one after the other."""
    examples, _, frames, *rest = batch.pixels.shape
    if frames != model.frames_per_block:
        raise DataError(
            f"the batches have blocks of {frames} frames and the model of {model.frames_per_block};"
            " make them with Geometry(model.size, model.frames_per_block, model.context)"
        )
    return (batch.pixels.astype(jnp.float32) / 127.5 - 1).reshape(examples, -1, *rest)


def batch_losses(
    model: ElasticTok,
    batch: DeviceBatch,
    loss: Loss,
    tail_drop: TailDrop,
    quantizer_weight: ArrayLike,
    keys: Keys,
    execution: AbstractExecution = LOCAL,
    errors: Float[Array, "batch blocks"] | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
    """The total loss of a batch, its metrics, and the quantizer's statistics summed over it. Pixels
    are compared where the model's decoder is asked for them (`ElasticTok.reconstruct`).

    **Arguments:** as of `train_step`, and

    - `errors`: that a `tail_drop` with a `probe` is informed of: `relative(block_errors(...))`.
    """
    if isinstance(loss, AbstractLoss) and loss.whole_frames and model.decoder.sample is not None:
        raise ValueError(
            f"{loss!r} looks at whole frames and the model's decoder is trained on "
            f"{model.decoder.sample!r}; use a loss of single pixels (leave out --perceptual), or a "
            "decoder without a sample"
        )
    _, blocks, _, height, width, _ = batch.pixels.shape
    tokens = model.tokens_per_block(height, width)
    least = min(model.min_tokens, tokens)

    def draw(key: Key[Array, ""], errors: Float[Array, "blocks"] | None):
        if not isinstance(tail_drop, AbstractTailDrop):  # any other function only draws
            lengths = tail_drop(key, blocks, least, tokens)
            return lengths, lengths
        policy = tail_drop if errors is None else tail_drop.informed(errors)
        lengths = policy(key, blocks, least, tokens)
        return lengths, policy.told(key, lengths, tokens)

    lengths, told = jax.vmap(draw)(keys.lengths, errors)
    out = jax.vmap(
        lambda x, length, told, segments, valid, key: model.reconstruct(
            x, length, segments, valid, told=told, key=key, execution=execution
        ),
        spmd_axis_name=execution.batch_axes,
    )(_clips(model, batch), lengths, told, batch.segments, batch.valid, keys.model)
    # Both sides, before any arithmetic: what a loss does with padding then has no gradient either.
    seen = out.valid[:, :, None, None, None, None]
    prediction, target = jnp.where(seen, out.prediction, 0), jnp.where(seen, out.target, 0)
    reconstruction = loss(prediction, target, out.valid, key=keys.loss)

    # A model divides by its own example's valid blocks: the mean over the batch weighs them back.
    count = jnp.sum(batch.valid, axis=1)
    per_block = jnp.sum(out.loss * count) / jnp.maximum(jnp.sum(count), 1)
    statistics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), out.statistics)
    quantizer = quantizer_weight * per_block + model.quantizer.batch_loss(statistics)

    share = jnp.where(batch.valid, jnp.clip(lengths, least, tokens) / tokens, 0)
    metrics = {
        "loss": reconstruction + quantizer,
        "reconstruction": reconstruction,
        "quantizer": quantizer,
        "mse": MSE()(prediction, target, out.valid),
        "kept": mean_over_valid(share, batch.valid),
    }
    return metrics["loss"], (metrics, statistics)
