"""Steps whose kept lengths depend on the blocks' errors."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import result, start
from test_fit import ONE_DEVICE, equal, train
from tiny_training import OPTIMIZER, Counted, CountedIterator, make_batch, quantizers, tiny_model

from elastictok.data import Batch
from elastictok.models import (
    AbstractTailDrop,
    ConditionDropout,
    FixedDrop,
    InformationDrop,
    UniformDrop,
)
from elastictok.train import MSE, Average, init_state, train_step
from elastictok.train._devices import place
from elastictok.train._step import batch_losses, block_errors, relative, step_keys


def step_function(**changes):
    chosen = {
        "optimizer": OPTIMIZER,
        "loss": MSE(),
        "tail_drop": InformationDrop(),
        "quantizer_weight": 0.5,
    }
    return functools.partial(train_step, **(chosen | changes))


class Remembering(InformationDrop):
    """Passes on the errors that it is told to whoever wants to see them."""

    seen: list = eqx.field(static=True, default_factory=list)

    def __call__(self, key, blocks, min_tokens, max_tokens):
        jax.debug.callback(lambda x: self.seen.append(np.array(x)), self.errors)
        return InformationDrop.__call__(self, key, blocks, min_tokens, max_tokens)


def told(model, batch, *, average=None, accumulate=1, probe=0.5):
    """The errors that a step tells its policy, a row for each example; and the state before."""
    policy = Remembering(probe=probe)
    state = init_state(model, OPTIMIZER, jax.random.key(0), average=average is not None)
    if average is not None:  # another model than the current one
        state = eqx.tree_at(
            lambda s: s.average, state, jax.tree.map(lambda x: 0.5 * x, state.average)
        )
    step = step_function(tail_drop=policy, average=average, accumulate=accumulate)
    jax.block_until_ready(eqx.filter_jit(step)(state, place(batch, ONE_DEVICE)))
    jax.effects_barrier()
    return rows(policy.seen), state


def rows(examples):
    """Examples in an order of their own: what is seen of a vmap comes in any."""
    return np.array(sorted(map(tuple, np.reshape(examples, (-1, 2)))))


def by_hand(model, batch, kept):
    """Errors over their mean, example by example, from all that the model is made of."""
    errors = np.zeros(batch.valid.shape)
    one = jax.jit(lambda x, s, v: model(x, jnp.full(len(v), kept), s, v).pixels)
    for i, (pixels, segments, valid) in enumerate(
        zip(batch.pixels, batch.segments, batch.valid, strict=True)
    ):
        x = (pixels.astype(np.float64) / 127.5 - 1).astype(np.float32)
        flat = x.reshape(-1, *x.shape[2:])
        difference = np.asarray(one(flat, segments, valid), np.float64).reshape(x.shape) - x
        errors[i] = np.square(difference).reshape(len(valid), -1).mean(axis=1)
    return rows(np.where(batch.valid, errors / errors[batch.valid].mean(), 0))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 2),
        ({"probe": 1.0}, 4),
        ({"probe": 0.01}, 1),  # the model's least
        ({"accumulate": 4}, 2),
        ({"average": Average(0.9)}, 2),
    ],
    ids=str,
)
def test_a_policy_is_told_the_errors_of_the_averaged_model_over_their_mean(settings, kept):
    batch = make_batch(5)
    model = tiny_model(quantizers()["GaussianVAE"])
    errors, state = told(model, batch, **settings)
    expected = by_hand(state.averaged(), batch, kept)
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    assert len(np.unique(errors)) > 10
    if "average" in settings:
        other = by_hand(state.model, batch, kept)
        assert np.abs(errors - other).max() > 0.01


@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e3))
def test_errors_are_divided_by_the_mean_of_the_valid_blocks(seed, scale):
    rng = np.random.default_rng(seed)
    errors, valid = scale * rng.exponential(1, (3, 4, 2)), rng.random((3, 4, 2)) < 0.7
    errors = errors.astype(np.float32)
    found = np.asarray(relative(jnp.asarray(errors), jnp.asarray(valid)))
    if valid.any():
        np.testing.assert_allclose(found, errors / errors[valid].mean(dtype=np.float64), rtol=1e-5)
    else:
        assert (found == 1).all()


def test_a_batch_without_errors_is_of_equal_blocks():
    valid = jnp.array([[True, False]])
    np.testing.assert_array_equal(relative(jnp.zeros((1, 2)), valid), [[1, 1]])
    np.testing.assert_array_equal(relative(jnp.ones((1, 2)), jnp.zeros((1, 2), bool)), [[1, 1]])


def test_errors_have_no_gradient():
    model, batch = tiny_model(quantizers()["GaussianVAE"]), place(make_batch(0), ONE_DEVICE)

    def summed(model):
        return jnp.sum(block_errors(model, batch, share=0.5))

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(summed))(model)
    assert value > 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradient))


def test_padding_changes_nothing_and_pixels_do():
    batch = make_batch(0)
    state = init_state(tiny_model(), OPTIMIZER, jax.random.key(0))
    noise = np.random.default_rng(0).integers(0, 256, batch.pixels.shape, dtype=np.uint8)
    seen = batch.valid[:, :, None, None, None, None]
    step = eqx.filter_jit(step_function())

    def after(pixels):
        made = step(state, place(Batch(pixels, batch.segments, batch.valid), ONE_DEVICE))[0].model
        return jax.tree.leaves(made)

    assert equal(after(batch.pixels), after(np.where(seen, batch.pixels, noise)))
    assert not equal(after(batch.pixels), after(np.where(seen, noise, batch.pixels)))


def products(tail_drop):
    """Matrix products in the step's program, each as often as it stands there."""
    state = init_state(tiny_model(), OPTIMIZER, jax.random.key(0))
    arrays, static = eqx.partition(state, eqx.is_array)
    jaxpr = jax.make_jaxpr(
        lambda arrays, batch: eqx.filter(
            step_function(tail_drop=tail_drop)(eqx.combine(arrays, static), batch), eqx.is_array
        )
    )(arrays, place(make_batch(0), ONE_DEVICE))
    return str(jaxpr).count("dot_general")


def test_only_a_policy_that_asks_for_errors_pays_for_them():
    class Idle(UniformDrop):
        """`UniformDrop` that asks for errors and leaves them."""

        @property
        def probe(self):
            return 0.5

    usual = products(UniformDrop())
    assert usual > 10
    assert products(lambda key, *rest: UniformDrop()(key, *rest)) == usual
    assert products(FixedDrop(3)) == usual
    assert products(Idle()) > usual
    assert products(InformationDrop()) == products(Idle())
    assert products(ConditionDropout(InformationDrop(), 0.5)) == products(Idle())


def test_without_errors_a_step_says_what_is_missing():
    keys = step_keys(jax.random.key(0), 0, 8)
    with pytest.raises(ValueError, match=r"InformationDrop draws by the errors of 2 blocks"):
        batch_losses(
            tiny_model(), place(make_batch(0), ONE_DEVICE), MSE(), InformationDrop(), 0.5, keys
        )


@pytest.mark.heavy
def test_a_resumed_run_is_the_whole_run(tmp_path):
    settings: dict[str, Any] = {
        "tail_drop": ConditionDropout(InformationDrop(0.4), 0.5),
        "average": Average(0.9),
        "accumulate": 2,
    }
    whole = train(steps=6, **settings)
    train(steps=3, out=tmp_path, **settings)
    assert equal(whole, train(steps=6, out=tmp_path, resume=True, **settings))
    settings["tail_drop"] = UniformDrop()
    assert not equal(whole, train(steps=6, **settings))


class HalfPlain(Counted):
    """The first half of the examples is grey all over, the other half as ever."""

    def __iter__(self):
        class Iterator(CountedIterator):
            def __next__(self):
                batch = super().__next__()
                batch.pixels[: len(batch.pixels) // 2] = 128
                return batch

        return Iterator(self)


class Watched(AbstractTailDrop):
    """Another policy; its errors and lengths are noted."""

    inner: AbstractTailDrop
    seen: list = eqx.field(static=True, default_factory=list)
    errors: jax.Array | None = None

    @property
    def probe(self):
        return self.inner.probe

    def informed(self, errors):
        return Watched(self.inner.informed(errors), self.seen, errors)

    def __call__(self, key, blocks, min_tokens, max_tokens):
        lengths = self.inner(key, blocks, min_tokens, max_tokens)
        jax.debug.callback(
            lambda *pair: self.seen.append(np.stack(pair)), self.errors, lengths, ordered=False
        )
        return lengths


def test_hard_blocks_get_longer_lengths_and_easy_ones_short_ones():
    policy = Watched(InformationDrop())
    train(HalfPlain(), steps=80, tail_drop=policy)
    jax.effects_barrier()
    errors, lengths = np.concatenate(policy.seen[-40 * 8 :], axis=1)
    easy, hard = lengths[(errors > 0) & (errors < 0.5)], lengths[errors > 1.5]
    assert min(len(easy), len(hard)) > 100
    assert easy.mean() + 1 < hard.mean()
    assert len(set(hard)) > 1
    assert len(set(easy)) > 1


@pytest.mark.heavy
def test_meshes_and_parts_give_the_run_of_one_device():
    names = [
        f"GaussianVAE:{axes}:{parts}:information"
        for axes, parts in (("data=1", 1), ("data=2,sequence=2,fsdp=2", 1), ("data=2,fsdp=2", 2))
    ]
    one, *others = result(start("on_meshes.py", 8, *names, "GaussianVAE:data=1")).values()
    *others, uniform = others
    for other in others:
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
        assert other["compilations"] == 1
        assert other["in place"]
    assert np.abs(np.array(uniform["losses"]) - one["losses"]).max() > 1e-3
