import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import tiny_model

from elastictok.models import trainable
from elastictok.train import Constant, Cosine, adamw, matrices, muon


@given(warmup=st.integers(0, 50), extra=st.integers(1, 200), final=st.floats(0, 1))
def test_cosine_is_optax_cosine_after_a_ramp(warmup, extra, final):
    steps = warmup + extra
    ours = Cosine(steps, warmup=warmup, final=final)
    theirs = optax.cosine_decay_schedule(1.0, extra, alpha=final)
    for step in {0, warmup // 2, warmup, warmup + extra // 2, steps - 1, steps, steps + 7}:
        ramp = min(1.0, (step + 1) / max(warmup, 1))
        expected = ramp * float(theirs(max(step - warmup, 0)))
        assert float(ours(step)) == pytest.approx(expected, abs=1e-5)


@given(warmup=st.integers(0, 50), step=st.integers(0, 100))
def test_constant_rises_to_one_and_stays(warmup, step):
    factor = float(Constant(warmup)(step))
    assert factor > 0
    assert factor <= float(Constant(warmup)(step + 1)) <= 1
    if step + 1 >= warmup:
        assert factor == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "warmup is -1"),
        (lambda: Cosine(10, warmup=10), "no room for 10 steps"),
        (lambda: Cosine(10, final=1.5), "final is 1.5"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run(optimizer, params, gradients):
    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def random_like(params, seed):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 6, 4)])
def test_muon_treats_each_stacked_layer_as_a_matrix_of_its_own(shape):
    layers = shape[0]
    optimizer = muon(0.1, weight_decay=0.01, clip=math.inf)
    stacked = random_like({"w": jnp.zeros(shape)}, 0)
    gradients = [random_like(stacked, seed) for seed in (1, 2, 3)]
    together = run(optimizer, stacked, gradients)["w"]
    for layer in range(layers):

        def own(tree, layer=layer):
            return jax.tree.map(lambda x: x[layer : layer + 1], tree)

        alone = run(optimizer, own(stacked), [own(g) for g in gradients])["w"]
        np.testing.assert_allclose(together[layer], alone[0], rtol=2e-5, atol=2e-6)


def test_muon_updates_are_nearly_orthogonal_and_as_large_as_the_rate():
    params = {"w": jnp.zeros((3, 8, 12))}
    gradient = random_like(params, 0)
    update = -run(muon(0.1, clip=math.inf), params, [gradient])["w"]
    # Newton-Schulz leaves singular values between .5 and 1.5; wide matrices are scaled up by
    # sqrt(out / in), for which axis 1 must be the input.
    for matrix, source in zip(np.asarray(update), np.asarray(gradient["w"]), strict=True):
        left, values, right = np.linalg.svd(matrix / (0.1 * math.sqrt(12 / 8)), full_matrices=False)
        assert values.min() > 0.5
        assert values.max() < 1.5
        u, _, v = np.linalg.svd(source, full_matrices=False)
        assert np.trace((left @ right) @ (u @ v).T) > 0.98 * 8
    tall = {"w": jnp.zeros((1, 12, 8))}
    update = run(muon(0.1, clip=math.inf), tall, [random_like(tall, 0)])["w"]
    assert np.linalg.svd(update[0] / 0.1, compute_uv=False).max() < 1.5


def test_muon_gives_everything_else_to_adam():
    params = random_like({"norms": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}, 0)
    gradients = [random_like(params, seed) for seed in (1, 2, 3)]
    schedule = Cosine(10, warmup=2)
    ours = muon(0.5, adam_learning_rate=0.01, schedule=schedule, clip=math.inf)
    adam = optax.adam(lambda step: 0.01 * schedule(step), nesterov=True)
    found, expected = run(ours, params, gradients), run(adam, params, gradients)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5)


def test_muon_takes_exactly_the_matrices():
    model = tiny_model()
    params = eqx.filter(model, trainable(model))
    chosen = jax.tree_util.tree_flatten_with_path(
        matrices(params),
        is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers),
    )[0]
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in chosen}
    parts = ["attention.query", "attention.key", "attention.value", "attention.out"]
    parts += ["feed_forward.gate", "feed_forward.up", "feed_forward.down"]
    layers = [f"transformer.layers.{part}" for part in parts]
    assert names == {
        f"{side}.{part}.weight"
        for side in ("encoder", "decoder")
        for part in [*layers, "in_proj", "out_proj"]
    }


def test_adamw_is_optax_adamw_on_a_clipped_gradient():
    params = random_like({"a": jnp.zeros((4, 3)), "b": jnp.zeros(7)}, 0)
    gradients = [jax.tree.map(lambda x: 10 * x, random_like(params, s)) for s in (1, 2, 3)]
    clipped = []
    for gradient in gradients:
        norm = math.sqrt(sum(float((np.asarray(x) ** 2).sum()) for x in gradient.values()))
        assert norm > 2
        clipped.append(jax.tree.map(lambda x, norm=norm: x * (2 / norm), gradient))
    schedule = Constant(2)
    ours = adamw(0.1, schedule=schedule, weight_decay=0.3, b1=0.8, b2=0.9, clip=2.0)
    rates = [0.05, 0.1, 0.1]
    expected = {name: np.asarray(x, np.float64) for name, x in params.items()}
    first = {name: 0.0 for name in params}
    second = {name: 0.0 for name in params}
    for t, (gradient, rate) in enumerate(zip(clipped, rates, strict=True), start=1):
        for name in params:
            g = np.asarray(gradient[name], np.float64)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            move = (first[name] / (1 - 0.8**t)) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-8)
            expected[name] = expected[name] - rate * (move + 0.3 * expected[name])
    for name, array in run(ours, params, gradients).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
