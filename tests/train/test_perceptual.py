"""The perceptual loss, mostly with a distance simple enough to tell where it looked."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.eval import LPIPS, AlexNet
from elastictok.train import L1, MSE, Constant, Cosine, Perceptual, Sum

BATCH, BLOCKS, FRAMES, SIZE = 3, 4, 2, 8
VALID = hnp.arrays(bool, (BATCH, BLOCKS))
SEEDS = st.integers(0, 2**32 - 1)


def absolute(a, b):
    return jnp.mean(jnp.abs(a - b))


def root(a, b):
    return jnp.sqrt(jnp.mean(jnp.square(a - b)))


def clips(seed=0, frames=FRAMES, height=SIZE, width=SIZE):
    shape = (BATCH, BLOCKS, frames, height, width, 3)
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(2))


@eqx.filter_jit
def value_and_gradient(loss, prediction, target, valid, key):
    return jax.value_and_grad(loss)(prediction, target, jnp.asarray(valid), key=key)


def looked_at(loss, valid, seed):
    """`[batch blocks frames]`: where the gradient is not zero."""
    _, slopes = value_and_gradient(loss, *clips(), valid, jax.random.key(seed))
    return np.any(np.asarray(slopes), axis=(3, 4, 5))


@given(valid=VALID, seed=SEEDS, samples=st.sampled_from([1, 3]))
def test_the_mean_over_sequences_of_frames_in_valid_blocks(valid, seed, samples):
    # Equal pictures, which padding is made of, are not at distance 0 here.
    loss = Perceptual(lambda a, b: 1 + absolute(a, b), samples=samples, size=SIZE)
    prediction, target = clips()
    value, slopes = value_and_gradient(loss, prediction, target, valid, jax.random.key(seed))
    seen = np.any(np.asarray(slopes), axis=(3, 4, 5))
    assert not seen[~valid].any()
    per_sequence = seen.sum((1, 2))
    some = valid.any(1)
    assert (per_sequence[some] >= 1).all()
    assert (per_sequence[some] <= samples).all()
    assert not per_sequence[~some].any()
    # Each frame's slope says how often it was drawn.
    one = 1 / (max(some.sum(), 1) * samples * SIZE * SIZE * 3)
    times = np.round(np.abs(np.asarray(slopes)).max((3, 4, 5)) / one)
    assert np.array_equal(times.sum((1, 2)), samples * some)
    distances = 1 + np.abs(np.asarray(prediction) - np.asarray(target)).mean((3, 4, 5))
    expected = (times * distances).sum() / samples / max(some.sum(), 1)
    assert float(value) == pytest.approx(expected, rel=1e-4)


@given(valid=VALID, seed=SEEDS, junk=st.sampled_from([0.5, np.nan, np.inf]))
@example(valid=np.arange(BATCH * BLOCKS).reshape(BATCH, BLOCKS) > 5, seed=0, junk=np.nan)
@example(valid=np.zeros((BATCH, BLOCKS), bool), seed=0, junk=np.inf)
def test_what_is_in_invalid_blocks_changes_nothing(valid, seed, junk):
    # A distance without a gradient at equal pictures, such as two frames of padding.
    loss = Perceptual(root, size=SIZE + 3)
    prediction, target = clips()
    mask = valid[:, :, None, None, None, None]
    key = jax.random.key(seed)
    expected = value_and_gradient(loss, prediction, target, valid, key)
    others = (jnp.where(mask, x, junk) for x in (prediction, target))
    found = value_and_gradient(loss, *others, valid, key)
    assert float(found[0]) == float(expected[0])
    assert np.isfinite(np.asarray(found[1])).all()
    np.testing.assert_array_equal(np.asarray(found[1]), np.asarray(expected[1]))
    assert not np.asarray(found[1])[~valid].any()


def test_every_valid_block_and_frame_is_drawn_equally_often():
    loss = Perceptual(absolute, size=SIZE)
    valid = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    keys = jax.random.split(jax.random.key(1), 800)
    prediction, target = clips()

    @jax.jit
    @jax.vmap
    def slopes(key):
        slope = jax.grad(loss)(prediction, target, jnp.asarray(valid), key=key)
        return jnp.any(slope, axis=(3, 4, 5))

    seen = np.asarray(slopes(keys))
    assert (seen.sum((2, 3)) == [1, 1, 0]).all()
    share = seen.mean(0)
    choices = FRAMES * valid.sum(1, keepdims=True)
    expected = np.where(valid, 1 / np.maximum(choices, 1), 0)
    # Six standard deviations of a share of 800 draws.
    assert (np.abs(share - expected[:, :, None]) <= 6 * np.sqrt(0.25 / 800)).all()
    assert (share[valid] > 0.05).all()
    # Sequences are drawn for apart from each other, and blocks apart from frames.
    where = seen.reshape(800, BATCH, -1).argmax(2)
    assert len({tuple(row) for row in where[:, :2]}) == 8 * 4


def test_deterministic_in_the_key():
    loss = Perceptual(absolute, samples=2, size=SIZE)
    valid = np.ones((BATCH, BLOCKS), bool)
    assert np.array_equal(looked_at(loss, valid, 5), looked_at(loss, valid, 5))
    assert any(
        not np.array_equal(looked_at(loss, valid, 5), looked_at(loss, valid, seed))
        for seed in range(6, 9)
    )
    # The draws of a sequence are its own: they do not depend on what is valid elsewhere.
    less = valid.copy()
    less[0, 1:] = False
    assert np.array_equal(looked_at(loss, valid, 5)[1:], looked_at(loss, less, 5)[1:])


def test_without_a_key():
    loss = Perceptual(absolute)
    with pytest.raises(ValueError, match=r"Perceptual looks at random frames.*key"):
        loss(*clips(), jnp.ones((BATCH, BLOCKS), bool))


@pytest.mark.parametrize("name", ["samples", "size"])
def test_settings_below_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Perceptual(absolute, **{name: 0})


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [(8, 8, 8, (8, 8)), (8, 8, 20, (20, 20)), (12, 8, 4, (6, 4)), (8, 20, 16, (16, 40))],
)
def test_frames_are_resized_by_their_short_side(height, width, size, shape):
    seen = []

    def distance(a, b):
        seen.append((a.shape, b.shape))
        return absolute(a, b)

    prediction, target = clips(height=height, width=width)
    valid = jnp.ones((BATCH, BLOCKS), bool)
    Perceptual(distance, size=size)(prediction, target, valid, key=jax.random.key(0))
    assert seen == [((*shape, 3), (*shape, 3))]


def test_every_pixel_of_a_large_frame_counts():
    loss = Perceptual(lambda a, b: jnp.mean(a - b), size=4)
    prediction, target = clips(height=32, width=32)
    valid = np.ones((BATCH, BLOCKS), bool)
    value, slopes = value_and_gradient(loss, prediction, target, valid, jax.random.key(0))
    slopes = np.asarray(slopes)
    drawn = slopes.any((3, 4, 5))
    assert drawn.sum() == BATCH
    inner = slopes[drawn][:, 4:-4, 4:-4]
    assert (inner > 0).all()
    assert inner.max() < 2 * inner.min()
    # A mean stays what it was, but for the border.
    means = np.asarray(prediction - target)[drawn].mean()
    assert float(value) == pytest.approx(means, abs=0.02)


def lpips():
    network = AlexNet(key=jax.random.key(0))
    return LPIPS(network, tuple(jnp.full(width, 1 / width) for width in network.channels))


@pytest.mark.heavy
def test_lpips_as_a_loss():
    distance = lpips()
    loss = Perceptual(distance, size=40)
    prediction, target = (x[:, :, :1] for x in clips(height=32, width=32))
    valid = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    key = jax.random.key(3)
    value, slopes = value_and_gradient(loss, prediction, target, valid, key)

    @jax.jit
    def directly(a, b):
        large = (jax.image.resize(x, (40, 40, 3), "bilinear") for x in (a, b))
        return distance(*large)

    expected = [float(directly(prediction[i, j, 0], target[i, j, 0])) for i, j in [(0, 0), (1, 2)]]
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-4)
    assert np.array_equal(np.asarray(slopes).any((2, 3, 4, 5)), valid)
    # Frames that fit exactly, and flat ones, have a gradient that a step survives.
    for one, other in [(target, target), (0 * target, target), (0 * target, 0 * target)]:
        _, slopes = value_and_gradient(loss, one, other, valid, key)
        assert np.isfinite(np.asarray(slopes)).all()


def test_sum():
    prediction, target = clips()
    valid = jnp.asarray(np.array([[1, 1, 0, 1]] * BATCH, bool))
    total = Sum((1.0, MSE()), (jnp.asarray(0.5), L1()), (2, lambda *_, key: jnp.asarray(3.0)))
    expected = MSE()(prediction, target, valid) + 0.5 * L1()(prediction, target, valid) + 6
    assert float(total(prediction, target, valid)) == pytest.approx(float(expected))
    one, both = MSE(), eqx.filter_jit(Sum((1.0, MSE())))
    slope = jax.grad(both)(prediction, target, valid)
    np.testing.assert_allclose(slope, jax.grad(one)(prediction, target, valid), rtol=1e-6)


def test_terms_of_a_sum_get_different_keys():
    keys = []

    def record(prediction, target, valid, *, key=None):
        keys.append(key)
        return jnp.zeros(())

    inputs = (*clips(), jnp.ones((BATCH, BLOCKS), bool))
    total = Sum((1.0, record), (1.0, record), (1.0, Sum((1.0, record))))
    total(*inputs)
    assert keys == [None] * 3
    keys.clear()
    total(*inputs, key=jax.random.key(0))
    data = {tuple(np.asarray(jax.random.key_data(key))) for key in keys}
    assert len(data) == 3
    keys.clear()
    total(*inputs, key=jax.random.key(0))
    assert {tuple(np.asarray(jax.random.key_data(key))) for key in keys} == data


@pytest.mark.parametrize("step", [0, 3, 10])
def test_weights_that_are_schedules(step):
    prediction, target = clips()
    valid = jnp.ones((BATCH, BLOCKS), bool)
    cosine = Cosine(10, warmup=2)
    inner = Sum((lambda step: step / 10, L1()), (1.0, MSE()))
    total = Sum((Constant(), MSE()), (cosine, L1()), (0.25, inner))

    @eqx.filter_jit
    def loss(total, step):
        return total.at(step)(prediction, target, valid)

    mse, l1 = (float(one(prediction, target, valid)) for one in (MSE(), L1()))
    expected = mse + float(cosine(step)) * l1 + 0.25 * (step / 10 * l1 + mse)
    assert float(loss(total, jnp.asarray(step))) == pytest.approx(expected, rel=1e-5)
    # `at` gives another sum; this one is still without a step.
    for unready in (total, Sum((1.0, inner))):
        with pytest.raises(ValueError, match=r"is a schedule.*loss\.at\(step\)"):
            unready(prediction, target, valid)


def test_sums_that_make_no_sense():
    with pytest.raises(ValueError, match="Sum of no losses"):
        Sum()
    with pytest.raises(ValueError, match=r"MSE\(\) is no weight.*\(weight, loss\)"):
        Sum((MSE(), L1()))
    for weight in (np.nan, np.inf):
        with pytest.raises(ValueError, match="give a finite number"):
            Sum((weight, MSE()))


def test_a_sum_says_what_it_is():
    text = repr(Sum((1.0, MSE()), (0.1, Perceptual(lpips()))))
    assert "MSE()" in text
    assert "AlexNet()" in text
    assert len(text) < 300
