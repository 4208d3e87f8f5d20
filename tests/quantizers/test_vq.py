"""Vector quantization against brute force and loops in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.quantizers import VQ, VQStatistics, _nearest

TOKENS, CODES, DIM = 40, 24, 3


def make(revival: float = 0.0, decay: float = 0.9, codes: int = CODES) -> VQ:
    return VQ(codes, DIM, key=jax.random.key(1), revival=revival, decay=decay, epsilon=1e-3)


CALL = eqx.filter_jit(lambda vq, z, keep: vq(z, keep))
UPDATE = eqx.filter_jit(lambda vq, statistics: vq.update(statistics))


def to_codes(vq: VQ, z) -> np.ndarray:
    # Compiled anew each time: the tests below change constants of the module.
    return np.asarray(jax.jit(lambda x: vq.to_codes(x))(z))


def draw(seed: int, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, DIM)).astype(np.float32), rng.random(tokens) < 0.7


def brute_force(z: np.ndarray, book: np.ndarray) -> np.ndarray:
    z, book = z.astype(np.float64), book.astype(np.float64)
    return np.sum((z[:, None] - book[None]) ** 2, axis=-1).argmin(-1)


@given(seed=st.integers(0, 2**32 - 1))
def test_call_against_brute_force(seed):
    vq, (z, keep) = make(), draw(seed)
    book = np.asarray(vq.codebook)
    out = CALL(vq, z, keep)
    codes = brute_force(z, book)
    np.testing.assert_array_equal(np.asarray(out.codes)[keep], codes[keep])
    counts, sums, loss = np.zeros(CODES), np.zeros((CODES, DIM)), 0.0
    for token in np.flatnonzero(keep):
        counts[codes[token]] += 1
        sums[codes[token]] += z[token]
        loss += 0.25 * np.sum((z[token] - book[codes[token]]) ** 2)
    np.testing.assert_array_equal(out.statistics.counts, counts)
    np.testing.assert_allclose(out.statistics.sums, sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_gradient_of_the_commitment_loss(seed):
    vq, (z, keep) = make(), draw(seed)
    gradient = jax.grad(lambda x: CALL(vq, x, keep).loss)(jnp.asarray(z))
    nearest = np.asarray(vq.codebook)[brute_force(z, np.asarray(vq.codebook))]
    expected = np.where(keep[:, None], 0.5 * (z - nearest), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_statistics_carry_no_gradient():
    vq, (z, keep) = make(), draw(0)
    gradient = jax.grad(lambda x: jnp.sum(CALL(vq, x, keep).statistics.sums))(jnp.asarray(z))
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
    ("distances", "narrowest", "codes"),
    [(1, 1, 24), (1, 7, 2), (1, 7, 24), (1, 128, 129), (200, 1, 129)],
)
def test_chunks_of_the_book_make_no_difference(monkeypatch, distances, narrowest, codes):
    monkeypatch.setattr(_nearest, "_MAX_DISTANCES", distances)
    monkeypatch.setattr(_nearest, "_MIN_CHUNK", narrowest)
    vq, (z, _) = make(codes=codes), draw(3)
    np.testing.assert_array_equal(
        vq.to_codes(jnp.asarray(z)), brute_force(z, np.asarray(vq.codebook))
    )


def test_distances_are_held_in_chunks(monkeypatch):
    monkeypatch.setattr(_nearest, "_MAX_DISTANCES", 160)
    monkeypatch.setattr(_nearest, "_MIN_CHUNK", 4)
    vq, (z, _) = make(codes=1000), draw(3)
    text = str(jax.make_jaxpr(vq.to_codes)(z))
    assert f"[{TOKENS},4]" in text
    assert f"[{TOKENS},1000]" not in text


def test_first_of_equal_entries_wins(monkeypatch):
    monkeypatch.setattr(_nearest, "_MAX_DISTANCES", 1)
    monkeypatch.setattr(_nearest, "_MIN_CHUNK", 2)
    vq = eqx.tree_at(lambda q: q.codebook, make(codes=6), jnp.ones((6, DIM)))
    np.testing.assert_array_equal(to_codes(vq, np.ones((3, DIM), np.float32)), [0, 0, 0])


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_moving_averages_against_a_loop(seed):
    vq, steps = make(), 12
    counts, sums = np.ones(CODES), np.asarray(vq.codebook, np.float64)
    for step in range(steps):
        z, keep = draw(seed + step)
        book = np.asarray(vq.codebook)
        codes = brute_force(z, book)
        for i in range(CODES):
            mine = keep & (codes == i)
            counts[i] = 0.9 * counts[i] + 0.1 * mine.sum()
            sums[i] = 0.9 * sums[i] + 0.1 * z[mine].sum(0)
        total = counts.sum()
        smoothed = (counts + 1e-3) / (total + CODES * 1e-3) * total
        vq = UPDATE(vq, CALL(vq, z, keep).statistics)
        np.testing.assert_allclose(vq.counts, counts, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(vq.codebook, sums / smoothed[:, None], rtol=1e-4, atol=1e-4)


def test_the_book_finds_clusters():
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(8, DIM))
    vq = VQ(8, DIM, key=jax.random.key(0), decay=0.8)
    for _ in range(200):
        z = centres[rng.integers(0, 8, 256)] + 0.05 * rng.normal(size=(256, DIM))
        vq = UPDATE(vq, CALL(vq, z.astype(np.float32), np.ones(256, bool)).statistics)
    distances = np.linalg.norm(centres[:, None] - np.asarray(vq.codebook)[None], axis=-1)
    assert distances.min(axis=1).max() < 0.1, "without revival some clusters share an entry"


def statistics_of(counts: list[float], points: list[list[float]]) -> VQStatistics:
    weights = jnp.asarray(counts, jnp.float32)
    return VQStatistics(weights, weights[:, None] * jnp.asarray(points, jnp.float32))


def test_revival_splits_the_most_used_entries():
    vq = VQ(4, 2, key=jax.random.key(0), decay=0.0, revival=0.1, epsilon=1e-9)
    points = [[1.0, 0.0], [5.0, 5.0], [0.0, 1.0], [-3.0, 2.0]]
    old = np.asarray(vq.codebook)
    # Entry 2 is dead and takes half of entry 1; entry 0 is alive, so entry 3 keeps its tokens.
    new = UPDATE(vq, statistics_of([30, 100, 1, 60], points))
    np.testing.assert_allclose(new.counts, [30, 50, 50, 60], rtol=1e-5)
    beside = np.array([5.0, 5.0]) + 0.01 * (old[2] - [5.0, 5.0])
    np.testing.assert_allclose(new.codebook, [points[0], points[1], beside, points[3]], rtol=1e-5)
    np.testing.assert_allclose(new.sums, new.counts[:, None] * new.codebook, rtol=1e-5)
    # Both of the lightest are dead, but only one of the heaviest is above the mean.
    new = UPDATE(vq, statistics_of([20, 100, 0, 1], points))
    np.testing.assert_allclose(new.counts, [20, 50, 50, 1], rtol=1e-5)


def test_revival_can_be_off():
    vq = VQ(4, 2, key=jax.random.key(0), decay=0.0, revival=0.0)
    new = UPDATE(vq, statistics_of([30, 100, 1, 60], [[1.0, 0.0]] * 4))
    np.testing.assert_allclose(new.counts, [30, 100, 1, 60])


def test_dead_entries_come_to_be_used():
    """Latents far from most of the initial book: all entries end up in use."""
    rng = np.random.default_rng(0)
    used = {}
    for revival in (0.0, 0.1):
        vq = VQ(32, DIM, key=jax.random.key(0), decay=0.8, revival=revival)
        for _ in range(150):
            z = 6 + rng.normal(size=(256, DIM)).astype(np.float32)
            out = CALL(vq, z, np.ones(256, bool))
            vq = UPDATE(vq, out.statistics)
        used[revival] = len(np.unique(out.codes))
    assert used[0.0] < 16
    assert used[0.1] > 28


def test_a_batch_with_nothing_kept_changes_nothing_even_with_dead_entries():
    vq = VQ(4, 2, key=jax.random.key(0), decay=0.5, revival=0.1)
    vq = eqx.tree_at(lambda q: q.counts, vq, jnp.array([0.001, 9.0, 3.0, 0.002]))
    new = UPDATE(vq, statistics_of([0, 0, 0, 0], [[0.0, 0.0]] * 4))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(vq), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_trained_by_gradient():
    marks = jax.tree.leaves(make().trainable())
    assert marks == [False, False, False]


def test_refined_is_another_book():
    vq = make()
    finer = vq.refined()
    np.testing.assert_array_equal(finer.codebook, vq.codebook / 2)
    assert finer.codebook_size == vq.codebook_size
    assert finer.decay == vq.decay
    # The averages agree with the book, so a step without news moves no entry.
    np.testing.assert_array_equal(finer.sums, finer.codebook * finer.counts[:, None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"dim": 0}, "dim is 0"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"commitment": -1.0}, "commitment is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"revival": 0.5}, "revival is 0.5"),
        ({"decay": float("nan")}, "decay is nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQ(**({"codebook_size": 4, "dim": 2, "key": jax.random.key(0)} | arguments))
