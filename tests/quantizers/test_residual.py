"""Residual quantization: stages refine, and can be read back off their sum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.quantizers import (
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    GaussianVAE,
    Residual,
    RotationTrick,
    SimVQ,
    UniformGrid,
)

TOKENS = 256
KEEP = jnp.ones(TOKENS, bool)
INNER = {
    "fsq": FSQ((8, 5, 6)),
    "lfq": LFQ(3),
    "vq": VQ(32, 3, key=jax.random.key(0)),
}


def uniform(width: float, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (TOKENS, 3), minval=-width, maxval=width)


call = eqx.filter_jit(lambda quantizer, z, keep: quantizer(z, keep))
to_codes = eqx.filter_jit(lambda quantizer, latents: quantizer.to_codes(latents))
from_codes = eqx.filter_jit(lambda quantizer, codes: quantizer.from_codes(codes))


@eqx.filter_jit
def error(quantizer: Residual, z: jax.Array) -> jax.Array:
    """Mean squared error against the bounded latents."""
    return jnp.mean((quantizer(z, KEEP).latents - quantizer.bound(z)) ** 2)


@pytest.mark.parametrize(("name", "width"), [("fsq", 2.0), ("fsq", 0.5), ("lfq", 2.0), ("vq", 2.0)])
def test_error_falls_with_every_stage(name, width):
    errors = [float(error(Residual(INNER[name], n), uniform(width))) for n in range(1, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


DEEP = {
    (levels, n): (FSQ(levels), jax.jit(Residual(FSQ(levels), n).__call__))
    for levels, n in [((2, 4, 6), 1), ((2, 4, 6), 3), ((8, 5, 3), 3)]
}


@pytest.mark.parametrize(("levels", "n"), DEEP)
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([0.1, 1.0, 20.0]))
def test_fsq_is_within_half_a_step_of_the_last_stage(levels, n, seed, width):
    inner, call = DEEP[levels, n]
    z = uniform(width, seed)
    half_step = 0.5 / (np.array(levels) // 2) / np.array(levels) ** (n - 1.0)
    errors = np.abs(call(z, KEEP).latents - inner.bound(z))
    assert (errors <= half_step * (1 + 1e-4) + 1e-6).all()


def test_lfq_is_within_the_last_scale():
    z = uniform(2.0)
    for n in (1, 2, 5):
        latents = call(Residual(LFQ(3), n), z, KEEP).latents
        assert np.abs(latents - z).max() <= 2.0 ** (1 - n) + 1e-6


def test_sums_of_nested_stages_make_one_even_grid():
    for inner, n, step in [(FSQ((6,)), 3, 1 / 3 / 36), (FSQ((5,)), 2, 1 / 10), (LFQ(1), 4, 0.25)]:
        residual = Residual(inner, n)
        size = inner.codebook_size
        codes = np.stack(np.unravel_index(np.arange(size**n), (size,) * n), -1).astype(np.int32)
        sums = np.asarray(from_codes(residual, codes))[:, 0]
        assert (np.diff(sums) > 0).all(), "the sums are ordered as the codes are"
        np.testing.assert_allclose(np.diff(sums), step, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", INNER)
def test_first_codes_are_those_of_the_inner_quantizer(name):
    z = uniform(1.5)
    alone, three, two = (
        call(q, z, KEEP) for q in (INNER[name], Residual(INNER[name], 3), Residual(INNER[name], 2))
    )
    np.testing.assert_array_equal(three.codes[:, 0], alone.codes)
    np.testing.assert_array_equal(three.codes[:, :2], two.codes)
    np.testing.assert_array_equal(call(Residual(INNER[name], 1), z, KEEP).latents, alone.latents)


@pytest.mark.parametrize("name", INNER)
def test_the_first_columns_decode_to_the_coarser_result(name):
    z = uniform(1.5)
    fine, coarse = Residual(INNER[name], 4), Residual(INNER[name], 2)
    codes = call(fine, z, KEEP).codes
    np.testing.assert_array_equal(from_codes(fine, codes[:, :2]), call(coarse, z, KEEP).latents)
    with pytest.raises(ValueError, match=r"4 codes per token for 2 stages: give 1 \.\. 2"):
        coarse.from_codes(codes)


def test_vq_stages_against_a_loop():
    """Stages of greedy nearest neighbours, the loss and the statistics, in NumPy."""
    residual, z = Residual(INNER["vq"], 3), uniform(1.5)
    keep = np.arange(TOKENS) % 3 > 0
    out = call(residual, z, keep)
    rest, loss = np.asarray(z, np.float64), 0.0
    for i, stage in enumerate(residual.stages):
        assert isinstance(stage, VQ)
        book = np.asarray(stage.codebook, np.float64)
        codes = np.sum((rest[:, None] - book[None]) ** 2, -1).argmin(-1)
        np.testing.assert_array_equal(np.asarray(out.codes)[keep, i], codes[keep])
        counts = np.bincount(codes[keep], minlength=32)
        np.testing.assert_array_equal(out.statistics[i].counts, counts)
        sums = np.stack([rest[keep & (codes == c)].sum(0) for c in range(32)])
        np.testing.assert_allclose(out.statistics[i].sums, sums, rtol=1e-4, atol=1e-4)
        rest = rest - book[codes]
        loss += 0.25 * np.sum(rest[keep] ** 2)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-4)


def test_losses_of_later_stages_reach_the_latents():
    residual, z = Residual(INNER["vq"], 3), uniform(1.5)
    gradient = jax.grad(lambda x: call(residual, x, KEEP).loss)(z)
    rest, expected = np.asarray(z), np.zeros((TOKENS, 3))
    codes = np.asarray(call(residual, z, KEEP).codes)
    for i, stage in enumerate(residual.stages):
        rest = rest - np.asarray(stage.from_codes(jnp.asarray(codes[:, i])))
        expected += 0.5 * rest
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_books_of_stages_differ():
    stages = Residual(VQ(16, 3, key=jax.random.key(0)), 3).stages
    books = [np.asarray(stage.codebook) for stage in stages if isinstance(stage, VQ)]
    assert len(books) == 3
    for a in range(3):
        for b in range(a):
            assert not np.isclose(books[a][:, None], books[b][None]).all(-1).any()


def test_each_stage_is_updated_with_its_own_statistics():
    residual = Residual(INNER["vq"], 2)
    statistics = call(residual, uniform(1.5), KEEP).statistics
    updated = residual.update(statistics)
    for stage, s, new in zip(residual.stages, statistics, updated.stages, strict=True):
        expected = stage.update(s)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not any(jax.tree.leaves(residual.trainable()))


def test_training_keeps_refining():
    """Stages that follow their averages beat the books that they started from."""
    residual = Residual(VQ(16, 3, key=jax.random.key(0), decay=0.8), 3)
    before = error(residual, uniform(1.0))
    step = eqx.filter_jit(lambda q, z: q.update(q(z, KEEP).statistics))
    for i in range(100):
        residual = step(residual, uniform(1.0, seed=i + 1))
    assert error(residual, uniform(1.0)) < before / 3


def test_batch_loss_is_the_sum_of_the_stages():
    residual = Residual(LFQ(3), 3)
    statistics = call(residual, uniform(2.0), KEEP).statistics
    expected = sum(s.batch_loss(x) for s, x in zip(residual.stages, statistics, strict=True))
    np.testing.assert_allclose(residual.batch_loss(statistics), expected, rtol=1e-6)
    assert expected != 0


def test_lfq_stages_are_the_same_problem_at_half_the_size():
    inner = LFQ(3, temperature=0.8, commitment=1.0)
    fine = inner.refined()
    z = uniform(1.0)
    whole, half = call(inner, z, KEEP), call(fine, z / 2, KEEP)
    np.testing.assert_array_equal(half.latents, whole.latents / 2)
    np.testing.assert_allclose(half.statistics.entropy, whole.statistics.entropy, rtol=1e-5)


def test_a_greedy_guess_is_near_when_the_books_are_too_large_to_enumerate():
    residual = Residual(VQ(300, 3, key=jax.random.key(0)), 2)
    latents = call(residual, uniform(1.5), KEEP).latents
    again = from_codes(residual, to_codes(residual, latents))
    assert float(jnp.mean((again - latents) ** 2)) < 0.02


class Deep(AbstractDiscreteQuantizer):
    """Two codes per token, and no finer stage."""

    n: int = eqx.field(static=True)

    @property
    def latent_dim(self) -> int:
        return 1

    @property
    def codebook_size(self) -> int:
        return 2

    @property
    def streams(self) -> int:
        return self.n

    def to_codes(self, latents):
        return jnp.zeros((len(latents), self.n), jnp.int32)

    def from_codes(self, codes):
        return jnp.zeros((len(codes), 1))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"n is 0: there can be 1 \.\. 16 stages"):
        Residual(LFQ(3), 0)
    with pytest.raises(ValueError, match="n is 17"):
        Residual(LFQ(3), 17)
    with pytest.raises(ValueError, match="Deep writes 2 codes per token"):
        Residual(Deep(2), 2)
    with pytest.raises(NotImplementedError, match=r"Deep cannot be a stage of Residual: define"):
        Residual(Deep(1), 2)
    with pytest.raises(ValueError, match="use fewer residual stages"):
        Residual(FSQ((1001,)), 3)
    with pytest.raises(Exception, match="GaussianVAE"):
        Residual(GaussianVAE(3), 2)


def test_deepest_stages_still_round_trip():
    codes = jax.random.randint(jax.random.key(0), (500, 16), 0, 2)
    for residual in (Residual(FSQ((2,)), 16), Residual(LFQ(1), 16)):
        np.testing.assert_array_equal(to_codes(residual, from_codes(residual, codes)), codes)


def test_stages_of_fsq():
    stages = Residual(FSQ((8, 5)), 3).stages
    assert stages[1:] == (UniformGrid((8, 5), (64, 20)), UniformGrid((8, 5), (512, 100)))


@pytest.mark.parametrize("n", [1, 2])
def test_an_estimator_that_would_be_ignored_is_refused(n):
    for inner in (
        VQ(4, 2, key=jax.random.key(0), estimator=RotationTrick()),
        SimVQ(4, 2, key=jax.random.key(0), estimator=RotationTrick()),
    ):
        with pytest.raises(NotImplementedError, match="has the estimator RotationTrick"):
            Residual(inner, n)
