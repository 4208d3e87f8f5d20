"""One step: what counts in it, what moves, and that it is compiled once."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import OPTIMIZER, QUANTIZER_WEIGHT, make_batch, quantizers, tiny_model

from elastictok.models import ConditionDropout, FixedDrop, UniformDrop
from elastictok.train import (
    L1,
    MSE,
    CompiledStep,
    RecompilationError,
    data_mesh,
    init_state,
    train_step,
)
from elastictok.train._devices import place, replicated
from elastictok.train._step import batch_losses, step_keys

MESH = data_mesh(jax.local_devices()[:1])


def on_device(batch):
    return place(batch, MESH)


def step_function(**changes):
    chosen = {
        "optimizer": OPTIMIZER,
        "loss": MSE(),
        "tail_drop": UniformDrop(),
        "quantizer_weight": QUANTIZER_WEIGHT,
    }
    return functools.partial(train_step, **(chosen | changes))


def start(model, optimizer=None, seed=0):
    state = init_state(model, optimizer or OPTIMIZER, jax.random.key(seed))
    return jax.device_put(state, replicated(MESH))


@functools.cache
def compiled(name):
    """A step for a quantizer, and a function that makes states for it. Compiling takes seconds."""
    model = tiny_model(quantizers()[name])
    make = functools.partial(start, model)
    return CompiledStep(step_function(), make(), on_device(make_batch(0))), make


EACH_QUANTIZER = pytest.mark.parametrize("name", sorted(quantizers()))


def same(a, b):
    def numbers(x):
        return np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(numbers(x), numbers(y)) for x, y in leaves)


@EACH_QUANTIZER
@settings(max_examples=5)
@given(noise=st.integers(0, 2**31))
def test_padding_changes_nothing(name, noise):
    step, make = compiled(name)
    batch = make_batch(0)
    rng = np.random.default_rng(noise)
    pixels = np.where(
        batch.valid[:, :, None, None, None, None],
        batch.pixels,
        rng.integers(0, 256, batch.pixels.shape, dtype=np.uint8),
    )
    segments = np.where(batch.valid, batch.segments, rng.integers(0, 3)).astype(np.int32)
    other = dataclasses.replace(batch, pixels=pixels, segments=segments)
    # The next state is the gradient's witness: every weight moves by it.
    assert same(step(make(), on_device(batch)), step(make(), on_device(other)))


@EACH_QUANTIZER
def test_valid_pixels_do_change_something(name):
    step, make = compiled(name)
    batch = make_batch(0)
    pixels = batch.pixels.copy()
    pixels[1, 0] ^= 128
    other = dataclasses.replace(batch, pixels=pixels)
    (_, a), (_, b) = step(make(), on_device(batch)), step(make(), on_device(other))
    assert a["loss"] != b["loss"]


@pytest.mark.parametrize(
    ("name", "loss"),
    [("VQ", MSE()), ("LFQ", MSE()), ("GaussianVAE", L1())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_losses_are_those_of_a_loop_over_examples(name, loss):
    model = tiny_model(quantizers()[name])
    batch = make_batch(3)
    keys = step_keys(jax.random.key(0), 0, 8)
    total, (metrics, summed) = jax.jit(
        lambda model, batch: batch_losses(model, batch, loss, FixedDrop(3), 0.5, keys)
    )(model, on_device(batch))

    errors, quantizer_losses, counts, sums = [], [], [], []
    examples = zip(batch.pixels, batch.segments, batch.valid, strict=True)
    one = jax.jit(lambda *inputs: model(*inputs[:-1], key=inputs[-1]))
    for (pixels, segments, valid), key in zip(examples, keys.model, strict=True):
        frames = (pixels.astype(np.float64) / 127.5 - 1).astype(np.float32)
        flat = frames.reshape(-1, *frames.shape[2:])
        out = one(flat, jnp.full(2, 3), segments, valid, key)
        difference = np.asarray(out.pixels).reshape(frames.shape) - frames
        errors += [difference[block] for block in range(2) if valid[block]]
        quantizer_losses.append(float(out.loss))
        counts.append(int(valid.sum()))
        sums.append(out.statistics)
    square = float(np.mean(np.square(errors)))
    reconstruction = square if isinstance(loss, MSE) else float(np.mean(np.abs(errors)))
    statistics = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), summed, statistics)
    per_block = np.dot(quantizer_losses, counts) / sum(counts)
    quantizer = 0.5 * per_block + float(model.quantizer.batch_loss(statistics))
    expected = {
        "loss": reconstruction + quantizer,
        "reconstruction": reconstruction,
        "quantizer": quantizer,
        "mse": square,
        "kept": 3 / 4,
    }
    assert float(total) == float(metrics["loss"])
    for key, value in expected.items():
        assert float(metrics[key]) == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_loss_need_not_know_of_padding():
    def careless(prediction, target, valid, *, key=None):
        return jnp.mean(jnp.square(prediction - target))

    batch = make_batch(0)
    noise = np.random.default_rng(0).integers(0, 256, batch.pixels.shape, dtype=np.uint8)
    pixels = np.where(batch.valid[:, :, None, None, None, None], batch.pixels, noise)
    keys = step_keys(jax.random.key(0), 0, 8)
    _, (metrics, _) = jax.jit(
        lambda model, batch: batch_losses(model, batch, careless, FixedDrop(3), 0.5, keys)
    )(tiny_model(), on_device(dataclasses.replace(batch, pixels=pixels)))
    # Both sides are zero where there is padding, and only the division counts it.
    share = batch.valid.mean()
    assert float(metrics["reconstruction"]) == pytest.approx(
        float(metrics["mse"]) * share, rel=1e-5
    )


def test_lengths_are_drawn_anew_for_every_step_and_block():
    seen = []

    def spy(key, blocks, low, high):
        lengths = UniformDrop()(key, blocks, low, high)
        jax.debug.callback(lambda x: seen.append(np.array(x)), lengths)
        return lengths

    state, batch = start(tiny_model()), on_device(make_batch(0))
    step = CompiledStep(step_function(tail_drop=spy), state, batch)
    for _ in range(12):
        state, _ = step(state, batch)
    jax.effects_barrier()
    drawn = np.array(seen).reshape(12, -1)  # steps; then examples and blocks
    assert set(drawn.ravel()) == {1, 2, 3, 4}
    assert len({tuple(row) for row in drawn}) == 12
    assert np.bincount(drawn.ravel())[1:].min() > 0.6 * drawn.size / 4


@pytest.mark.heavy
def test_condition_dropout_tells_the_encoder_that_all_is_kept():
    """With a share of 1: the loss of encoding with all tokens and decoding the first few."""
    batch = on_device(make_batch(0))
    # What the encoder is told hardly matters to a model that was not trained.
    model = eqx.tree_at(lambda m: m.encoder.masked, tiny_model(), replace_fn=lambda x: 100 * x)
    examples, blocks, frames, *size = batch.pixels.shape[:5]
    keys = step_keys(jax.random.key(0), 0, examples)

    def loss(policy):
        return batch_losses(model, batch, MSE(), policy, 0.0, keys)[1][0]["mse"]

    def one(pixels, segments, valid):
        x = pixels.reshape(blocks * frames, *size, 3) / 127.5 - 1
        full, few = jnp.full(blocks, model.max_tokens), jnp.full(blocks, 2)
        latents = model.encode(x, full, segments, valid)
        error = model.decode(latents, few, segments, valid, height=size[0], width=size[1]) - x
        error = jnp.mean(jnp.square(error).reshape(blocks, -1), axis=1)
        return jnp.sum(jnp.where(valid, error, 0))

    expected = jax.vmap(one)(batch.pixels, batch.segments, batch.valid).sum() / batch.valid.sum()
    dropped = jax.jit(lambda: loss(ConditionDropout(FixedDrop(2), 1.0)))()
    assert float(dropped) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(jax.jit(lambda: loss(FixedDrop(2)))()) - float(expected)) > 1e-5


def test_the_optimizer_leaves_an_averaged_code_book_alone():
    step, make = compiled("VQ")
    state = make()
    model = tiny_model(quantizers()["VQ"])
    moments = [x.shape for x in jax.tree.leaves(state.opt_state)]
    assert model.quantizer.codebook.shape not in moments
    batch = on_device(make_batch(0))
    after, _ = step(state, batch)

    keys = step_keys(make().key, 0, 8)
    losses = functools.partial(batch_losses, loss=MSE(), tail_drop=UniformDrop())
    _, (_, statistics) = jax.jit(lambda m: losses(m, batch, quantizer_weight=0.0, keys=keys))(model)
    expected = model.quantizer.update(statistics)
    np.testing.assert_allclose(after.model.quantizer.codebook, expected.codebook, rtol=1e-5)
    assert not np.array_equal(expected.codebook, model.quantizer.codebook)
    assert int(after.step) == 1


def test_every_trained_array_moves():
    step, make = compiled("GaussianVAE")
    after, _ = step(make(), on_device(make_batch(0)))
    pairs = zip(jax.tree.leaves(make().model), jax.tree.leaves(after.model), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)


def test_any_optax_transformation_will_do():
    optimizer = optax.sgd(1.0)  # then a step is the gradient
    before = start(tiny_model(quantizers()["GaussianVAE"]), optimizer)
    weights = [np.asarray(x) for x in jax.tree.leaves(before.model)]
    batch = on_device(make_batch(0))
    step = CompiledStep(step_function(optimizer=optimizer), before, batch)
    after, metrics = step(before, batch)
    moved = zip(weights, jax.tree.leaves(after.model), strict=True)
    squares = sum(float(((new - old) ** 2).sum()) for old, new in moved)
    assert float(metrics["gradient_norm"]) == pytest.approx(squares**0.5, rel=1e-4)
    assert squares > 1e-6


@EACH_QUANTIZER
def test_compiled_once_and_donated(name):
    step, make = compiled(name)
    compilations = []

    def listen(event, _seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    states = [make()]
    batches = [on_device(make_batch(number)) for number in range(3)]
    jax.block_until_ready((states, batches))
    jax.monitoring.register_event_duration_secs_listener(listen)
    for batch in batches:
        states.append(step(states[-1], batch)[0])
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    assert all(x.is_deleted() for x in jax.tree.leaves(states[0]) if isinstance(x, jax.Array))
    assert [int(states[-1].step)] == [3]


@pytest.mark.parametrize(
    ("batch", "change"),
    [
        (make_batch(0, examples=6), r"pixels: uint8\[8, 2, 1, 16, 16, 3\] -> uint8\[6, 2"),
        (make_batch(0, blocks=1), r"valid: bool\[8, 2\] -> bool\[8, 1\]"),
    ],
)
def test_a_second_shape_is_refused_by_name(batch, change):
    step, make = compiled("FSQ")
    with pytest.raises(RecompilationError, match=change):
        step(make(), on_device(batch))


def test_a_step_that_changes_the_state_is_refused():
    def widen(state, batch):
        after, metrics = step_function()(state, batch)
        return eqx.tree_at(lambda s: s.step, after, after.step.astype(jnp.float32)), metrics

    with pytest.raises(RecompilationError, match=r"step: int32\[\] -> float32\[\]"):
        CompiledStep(widen, start(tiny_model()), on_device(make_batch(0)))


def test_the_state_shares_no_memory_with_the_model():
    model = tiny_model(quantizers()["VQ"])  # one array of it stands in two fields
    step, _ = compiled("VQ")
    step(start(model), on_device(make_batch(0)))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(model))


def test_a_batch_keeps_nothing_of_the_callers_memory():
    batch = make_batch(0)
    before = batch.pixels.copy()
    placed = on_device(batch)
    batch.pixels[:] = 0
    assert np.array_equal(np.asarray(placed.pixels), before)
