"""Vector quantization against brute force and loops in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.quantizers import (
    VQ,
    Gradient,
    KMeansStart,
    MovingAverage,
    Residual,
    RotationTrick,
    VQStatistics,
    _nearest,
)

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


def hold(monkeypatch, distances: int, narrowest: int):
    """So many distances at once, on whatever device."""
    for device in ("", "_CPU"):
        monkeypatch.setattr(_nearest, f"_MAX_DISTANCES{device}", distances)
        monkeypatch.setattr(_nearest, f"_MIN_CHUNK{device}", narrowest)


def test_a_cpu_takes_smaller_chunks_to_the_same_codes(monkeypatch):
    monkeypatch.setattr(_nearest, "_MAX_DISTANCES_CPU", 1)
    monkeypatch.setattr(_nearest, "_MIN_CHUNK_CPU", 7)
    vq, (z, _) = make(codes=100), draw(3)
    text = str(jax.make_jaxpr(vq.to_codes)(z))
    assert f"[7,{TOKENS}]" in text
    assert f"[100,{TOKENS}]" in text
    expected = brute_force(z, np.asarray(vq.codebook))
    np.testing.assert_array_equal(to_codes(vq, z), expected)
    batch = jax.jit(jax.vmap(vq.to_codes))(np.stack([z, z[::-1]]))
    np.testing.assert_array_equal(batch, [expected, expected[::-1]])


@pytest.mark.parametrize(
    ("distances", "narrowest", "codes"),
    [(1, 1, 24), (1, 7, 2), (1, 7, 24), (1, 128, 129), (200, 1, 129)],
)
def test_chunks_of_the_book_make_no_difference(monkeypatch, distances, narrowest, codes):
    hold(monkeypatch, distances, narrowest)
    vq, (z, _) = make(codes=codes), draw(3)
    np.testing.assert_array_equal(
        vq.to_codes(jnp.asarray(z)), brute_force(z, np.asarray(vq.codebook))
    )


def test_distances_are_held_in_chunks(monkeypatch):
    hold(monkeypatch, 160, 4)
    vq, (z, _) = make(codes=1000), draw(3)
    text = str(jax.make_jaxpr(vq.to_codes)(z))
    assert f"[4,{TOKENS}]" in text
    assert f"[1000,{TOKENS}]" not in text
    assert f"[{TOKENS},1000]" not in text


def test_first_of_equal_entries_wins(monkeypatch):
    hold(monkeypatch, 1, 2)
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


def test_bad_parts():
    with pytest.raises(ValueError, match="weight is 0"):
        Gradient(0.0)
    with pytest.raises(ValueError, match="steps is 0"):
        KMeansStart(0)


def objective(vq: VQ, z, keep):
    return vq(z, keep).loss


GRADIENTS = eqx.filter_jit(eqx.filter_grad(objective))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_book_trained_by_gradient(seed):
    vq = VQ(CODES, DIM, key=jax.random.key(1), book=Gradient(0.7), revival=0.0)
    z, keep = draw(seed)
    book = np.asarray(vq.codebook, np.float64)
    codes, expected, loss = brute_force(z, book), np.zeros((CODES, DIM)), 0.0
    for token in np.flatnonzero(keep):
        error = z[token] - book[codes[token]]
        expected[codes[token]] -= 2 * 0.7 * error
        loss += (0.25 + 0.7) * np.sum(error**2)
    np.testing.assert_allclose(CALL(vq, z, keep).loss, loss, rtol=1e-4)
    gradient = GRADIENTS(vq, z, keep)
    np.testing.assert_allclose(gradient.codebook, expected, rtol=1e-4, atol=1e-4)
    updated = UPDATE(vq, CALL(vq, z, keep).statistics)
    np.testing.assert_array_equal(updated.codebook, vq.codebook)
    used = np.bincount(codes[keep], minlength=CODES)
    np.testing.assert_allclose(updated.counts, 0.99 + 0.01 * used, rtol=1e-5)


def test_the_decoder_does_not_train_the_book():
    vq = VQ(CODES, DIM, key=jax.random.key(1), book=Gradient())
    z, keep = draw(0)
    gradient = eqx.filter_grad(lambda q: jnp.sum(CALL(q, z, keep).latents))(vq)
    assert not np.asarray(gradient.codebook).any()


def test_a_book_trained_by_gradient_is_what_is_trained():
    marks = VQ(4, 2, key=jax.random.key(0), book=Gradient(), start=KMeansStart()).trainable()
    assert marks.codebook is True
    assert jax.tree.leaves(marks).count(True) == 1


def test_revival_of_a_book_trained_by_gradient():
    vq = VQ(4, 2, key=jax.random.key(0), decay=0.0, revival=0.1, book=Gradient())
    old = np.asarray(vq.codebook)
    # The sums are of no interest: entries are where the optimizer put them.
    new = UPDATE(vq, statistics_of([30, 100, 1, 60], [[9.0, 9.0]] * 4))
    np.testing.assert_allclose(new.counts, [30, 50, 50, 60], rtol=1e-5)
    beside = old[1] + 0.01 * (old[2] - old[1])
    np.testing.assert_array_equal(new.codebook[jnp.array([0, 1, 3])], old[[0, 1, 3]])
    np.testing.assert_allclose(new.codebook[2], beside, rtol=1e-5)


@pytest.mark.parametrize("book", [MovingAverage(), Gradient()], ids=["averages", "gradient"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_cosine_against_angles(book, seed):
    vq = VQ(CODES, DIM, key=jax.random.key(1), cosine=True, book=book)
    # Entries of any length, as an optimizer may leave them.
    lengths = jnp.linspace(0.1, 9.0, CODES)[:, None]
    vq = eqx.tree_at(lambda q: q.codebook, vq, vq.codebook * lengths)
    z, keep = draw(seed)
    units = z.astype(np.float64) / np.linalg.norm(z, axis=-1, keepdims=True)
    entries = np.asarray(vq.codebook, np.float64)
    entries /= np.linalg.norm(entries, axis=-1, keepdims=True)
    codes = (units @ entries.T).argmax(-1)
    out = CALL(vq, 3 * z, keep)
    np.testing.assert_array_equal(np.asarray(out.codes)[keep], codes[keep])
    np.testing.assert_allclose(np.asarray(out.latents)[keep], entries[codes][keep], atol=1e-6)
    error = np.where(keep[:, None], units - entries[codes], 0)
    weight = 1.25 if book.trained else 0.25
    np.testing.assert_allclose(out.loss, weight * np.sum(error**2), rtol=1e-4, atol=1e-6)
    sums = np.zeros((CODES, DIM))
    np.add.at(sums, codes[keep], units[keep])
    np.testing.assert_allclose(out.statistics.sums, sums, atol=1e-5)


def test_cosine_starts_at_length_one():
    vq = VQ(CODES, DIM, key=jax.random.key(1), cosine=True)
    np.testing.assert_allclose(np.linalg.norm(vq.codebook, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(vq.sums, vq.codebook)


def k_means(z: np.ndarray, size: int, seed: int) -> float:
    """Mean distortion of Lloyd's algorithm from entries drawn from the data."""
    rng = np.random.default_rng(seed)
    book = z[rng.choice(len(z), size, replace=False)]
    for _ in range(30):
        codes = brute_force(z, book)
        book = np.stack(
            [z[codes == i].mean(0) if (codes == i).any() else book[i] for i in range(size)]
        )
    return distortion(z, book)


def distortion(z: np.ndarray, book: np.ndarray) -> float:
    return np.sum((z[:, None] - book[None]) ** 2, axis=-1).min(-1).mean()


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return 5 + rng.normal(size=(1024, DIM)) * [1.0, 2.0, 0.5]


def clusters(rng: np.random.Generator) -> np.ndarray:
    return 3 * rng.normal(size=(8, DIM))[rng.integers(0, 8, 1024)] + 0.2 * rng.normal(
        size=(1024, DIM)
    )


@pytest.mark.parametrize("book", [MovingAverage(), Gradient()], ids=["averages", "gradient"])
@pytest.mark.parametrize("revival", [0.0, 0.01])
@pytest.mark.parametrize("sample", [gaussian, clusters])
def test_a_k_means_start_against_k_means(book, revival, sample):
    """Within a tenth of the best of five restarts of thrice as many steps."""
    for seed in range(2):
        z = sample(np.random.default_rng(seed)).astype(np.float32)
        start = KMeansStart(10)
        vq = VQ(32, DIM, key=jax.random.key(seed), start=start, book=book, revival=revival)
        before = distortion(z, np.asarray(vq.codebook))
        for _ in range(10):
            vq = UPDATE(vq, CALL(vq, z, np.ones(len(z), bool)).statistics)
        best = min(k_means(z, 32, restart) for restart in range(5))
        assert distortion(z, np.asarray(vq.codebook)) < 1.1 * best
        assert before > 3 * best, "else the start had nothing to do"


def test_a_k_means_start_step_by_step():
    vq = VQ(8, 2, key=jax.random.key(0), start=KMeansStart(2), decay=0.5, revival=0.0, epsilon=1e-9)
    rng = np.random.default_rng(0)
    z = (7 + rng.normal(size=(64, 2)) * [1, 3]).astype(np.float32)
    keep = rng.random(64) < 0.8
    one = UPDATE(vq, CALL(vq, z, keep).statistics)
    assert one.started == 1
    book = np.asarray(one.codebook, np.float64)
    np.testing.assert_allclose(book.mean(0), z[keep].mean(0), rtol=1e-4)
    np.testing.assert_allclose(book.std(0), z[keep].std(0), rtol=1e-3)
    # Statistics in which no entry is light: each goes to its mean.
    points = np.arange(16.0).reshape(8, 2)
    lloyd = statistics_of([5, 6, 7, 8, 5, 6, 7, 8], points.tolist())
    lloyd = eqx.tree_at(lambda s: s.squares, lloyd, jnp.ones(2), is_leaf=lambda x: x is None)
    two = UPDATE(one, lloyd)
    assert two.started == 2
    np.testing.assert_allclose(two.codebook, points, rtol=1e-5)
    np.testing.assert_allclose(two.counts, lloyd.counts)
    # From here on the averages move as ever.
    three = UPDATE(two, jax.tree.map(lambda x: 3 * x, lloyd))
    assert three.started == 2
    np.testing.assert_allclose(three.counts, 2 * lloyd.counts)
    with pytest.raises(ValueError, match="no squares"):
        vq.update(statistics_of([1.0] * 8, points.tolist()))
    # Nothing kept is no step.
    for state in (vq, one, two):
        same = UPDATE(state, jax.tree.map(jnp.zeros_like, lloyd))
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_k_means_start_of_equal_latents_is_finite():
    vq = VQ(8, 2, key=jax.random.key(0), start=KMeansStart(3))
    z = np.full((20, 2), 1e3, np.float32)
    for _ in range(5):
        vq = UPDATE(vq, CALL(vq, z, np.ones(20, bool)).statistics)
    assert np.isfinite(vq.codebook).all()
    np.testing.assert_allclose(CALL(vq, z, np.ones(20, bool)).latents, z, rtol=1e-3)


def test_stages_of_residual_start_on_what_is_left():
    rng = np.random.default_rng(0)
    z = (100 + rng.normal(size=(512, DIM))).astype(np.float32)
    keep = np.ones(512, bool)
    q = Residual(VQ(16, DIM, key=jax.random.key(0), start=KMeansStart(), book=Gradient()), 2)
    for _ in range(10):
        q = UPDATE(q, CALL(q, z, keep).statistics)
    error = np.mean(np.sum((z - np.asarray(CALL(q, z, keep).latents)) ** 2, -1))
    # 256 points in place of 16, of a Gaussian of variance 3.
    assert error < 0.35 * k_means(z.astype(np.float64), 16, 0)


def test_what_cannot_be_a_stage_of_residual():
    with pytest.raises(NotImplementedError, match="VQ with cosine cannot be a stage"):
        Residual(VQ(4, 2, key=jax.random.key(0), cosine=True), 2)
    with pytest.raises(NotImplementedError, match="VQ has the estimator RotationTrick"):
        Residual(VQ(4, 2, key=jax.random.key(0), estimator=RotationTrick()), 2)


def test_defaults_are_those_of_the_class():
    """Model folders leave out what is equal to it."""
    vq = VQ(4, 2, key=jax.random.key(0))
    for name in ("book", "cosine", "start", "estimator", "started"):
        assert getattr(vq, name) == getattr(VQ, name)
