"""One training step: from uint8 pixels to the next state, a pure function."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from elastictok.models import ElasticTok, trainable

from ._errors import DataError
from ._losses import MSE, mean_over_valid

Loss = Callable[..., Float[Array, ""]]
TailDrop = Callable[..., Int[Array, "blocks"]]
Metrics = dict[str, Float[Array, ""]]


class TrainState(eqx.Module):
    """All that a step reads and writes: what a checkpoint holds.

    - `model`: the model.
    - `opt_state`: of the optimizer, over the trained arrays only.
    - `step`: steps done.
    - `key`: of the run; each step folds its number into it.
    """

    model: ElasticTok
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]


class DeviceBatch(eqx.Module):
    """A batch on the devices, pixels still bytes."""

    pixels: UInt8[Array, "batch blocks frames height width 3"]
    segments: Int[Array, "batch blocks"]
    valid: Bool[Array, "batch blocks"]


def init_state(
    model: ElasticTok, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """The state before the first step. It shares no memory with `model`: steps donate it."""
    model = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, model)
    params = eqx.filter(model, trainable(model))
    return TrainState(model, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    *,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    tail_drop: TailDrop,
    quantizer_weight: float | int,
) -> tuple[TrainState, Metrics]:
    """Draws lengths, reconstructs, moves the trained arrays, then lets the quantizer update itself.

    The total is `loss + quantizer_weight * (quantizer's loss per valid block) + batch loss`, where
    the quantizer's loss is summed over kept tokens and averaged over the valid blocks of the batch,
    and its batch loss is a function of the statistics summed over the batch.

    **Returns:** the next state, and for this batch, before the update: `loss` (the total),
    `reconstruction`, `quantizer` (what the quantizer adds to the total), `mse` (pixels in
    [-1, 1]), `kept` (share of tokens kept in valid blocks) and `gradient_norm`.
    """
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    params, rest = eqx.partition(state.model, trainable(state.model))

    def total(params: PyTree):
        model = eqx.combine(params, rest)
        return batch_losses(model, batch, loss, tail_drop, quantizer_weight, keys)

    (_, (metrics, statistics)), gradient = jax.value_and_grad(total, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, params)
    model = eqx.combine(eqx.apply_updates(params, updates), rest)
    quantizer = model.quantizer.update(jax.lax.stop_gradient(statistics))
    model = eqx.tree_at(lambda m: m.quantizer, model, quantizer)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    return TrainState(model, opt_state, state.step + 1, state.key), metrics


def batch_losses(
    model: ElasticTok,
    batch: DeviceBatch,
    loss: Loss,
    tail_drop: TailDrop,
    quantizer_weight: float | int,
    keys: Key[Array, "3"],
) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
    """The total loss of a batch, its metrics, and the quantizer's statistics summed over it.

    **Arguments:** as of `train_step`; `keys` for the lengths, the model and the loss.
    """
    drop_key, model_key, loss_key = keys[0], keys[1], keys[2]
    examples, blocks, frames, height, width, _ = batch.pixels.shape
    if frames != model.frames_per_block:
        raise DataError(
            f"the batches have blocks of {frames} frames and the model of {model.frames_per_block};"
            " make them with Geometry(model.size, model.frames_per_block, model.context)"
        )
    tokens = model.tokens_per_block(height, width)
    least = min(model.min_tokens, tokens)
    lengths = jax.vmap(lambda key: tail_drop(key, blocks, least, tokens))(
        jax.random.split(drop_key, examples)
    )
    target = batch.pixels.astype(jnp.float32) / 127.5 - 1
    out = jax.vmap(
        lambda x, length, segments, valid, key: model(x, length, segments, valid, key=key)
    )(
        target.reshape(examples, blocks * frames, height, width, 3),
        lengths,
        batch.segments,
        batch.valid,
        jax.random.split(model_key, examples),
    )
    # Both sides, before any arithmetic: what a loss does with padding then has no gradient either.
    seen = batch.valid[:, :, None, None, None, None]
    prediction = jnp.where(seen, out.pixels.reshape(target.shape), 0)
    target = jnp.where(seen, target, 0)
    reconstruction = loss(prediction, target, batch.valid, key=loss_key)

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
        "mse": MSE()(prediction, target, batch.valid),
        "kept": mean_over_valid(share, batch.valid),
    }
    return metrics["loss"], (metrics, statistics)
