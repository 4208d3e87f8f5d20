"""Product quantization: each part of the latent is quantized as if it were alone."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    GaussianVAE,
    Grouped,
    QuantizerOutput,
    Residual,
)

TOKENS, N = 40, 3
KEEP = np.arange(TOKENS) % 3 > 0
KEY = jax.random.key(0)
INNER = {
    "fsq": FSQ((8, 5)),
    "lfq": LFQ(2),
    "bsq": BSQ(2),
    "vq": VQ(16, 2, key=KEY),
    "residual": Residual(VQ(8, 2, key=KEY), 2),
    "one_stage": Residual(LFQ(2), 1),
    "grouped": Grouped(LFQ(1), 2),
}
call = eqx.filter_jit(lambda q, z, keep, key=None: q(z, keep, key=key))


def latents(width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TOKENS, width)).astype(np.float32)


def columns(codes) -> np.ndarray:
    return np.asarray(codes).reshape(TOKENS, -1)


@pytest.mark.parametrize("name", INNER)
def test_each_part_is_as_if_it_were_alone(name):
    inner, z = INNER[name], latents(2 * N)
    out = call(Grouped(inner, N), z, KEEP)
    alone = [call(inner, part, KEEP) for part in np.split(z, N, axis=-1)]
    np.testing.assert_array_equal(out.latents, np.concatenate([o.latents for o in alone], -1))
    codes = np.concatenate([columns(o.codes) for o in alone], -1)
    np.testing.assert_array_equal(out.codes, codes)
    np.testing.assert_allclose(out.loss, sum(o.loss for o in alone), rtol=1e-5)
    assert len(out.statistics) == N
    for ours, theirs in zip(
        jax.tree.leaves(out.statistics),
        jax.tree.leaves([o.statistics for o in alone]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    loss = sum(inner.batch_loss(o.statistics) for o in alone)
    np.testing.assert_allclose(Grouped(inner, N).batch_loss(out.statistics), loss, rtol=1e-4)


@pytest.mark.parametrize("name", INNER)
def test_sizes(name):
    inner = INNER[name]
    grouped = Grouped(inner, N)
    assert (grouped.input_dim, grouped.latent_dim) == (2 * N, 2 * N)
    assert grouped.streams == N * inner.streams
    assert grouped.codebook_size == inner.codebook_size
    assert inner.bits_per_token is not None
    assert grouped.bits_per_token == pytest.approx(N * inner.bits_per_token)
    assert call(Grouped(inner, 1), latents(2), KEEP).codes.shape == (TOKENS, inner.streams)


def test_equal_books_part_with_the_first_update():
    grouped = Grouped(VQ(16, 2, key=KEY, decay=0.5), N)
    out = call(grouped, latents(2 * N), KEEP)
    updated = grouped.update(out.statistics)
    assert isinstance(updated, Grouped)
    books = []
    for part, statistics, new in zip(grouped.parts, out.statistics, updated.parts, strict=True):
        assert isinstance(part, VQ)
        assert isinstance(new, VQ)
        np.testing.assert_array_equal(part.codebook, grouped.parts[0].codebook)
        np.testing.assert_array_equal(new.codebook, part.update(statistics).codebook)
        books.append(np.asarray(new.codebook))
    assert all(np.abs(books[i] - books[j]).max() > 0.1 for i, j in [(0, 1), (0, 2), (1, 2)])


def test_training_makes_the_books_different_and_better():
    """Parts whose latents lie in different places."""
    places = np.array([3, 3, -3, 0, 0, 5], np.float32)

    def error(q):
        z = latents(2 * N, seed=99) + places
        return float(np.mean((np.asarray(call(q, z, np.ones(TOKENS, bool)).latents) - z) ** 2))

    grouped = Grouped(VQ(8, 2, key=KEY, decay=0.8), N)
    before = error(grouped)
    for i in range(60):
        z = latents(2 * N, seed=i) + places
        grouped = grouped.update(call(grouped, z, np.ones(TOKENS, bool)).statistics)
    assert error(grouped) < before / 3


def test_no_two_parts_share_memory():
    grouped = Grouped(INNER["vq"], 2)
    buffers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(eqx.filter(part, eqx.is_array))}
        for part in (*grouped.parts, INNER["vq"])
    ]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert not buffers[i] & buffers[j]


class Noisy(AbstractDiscreteQuantizer):
    """Two codes, drawn with the key."""

    drawn: bool = eqx.field(static=True, default=True)

    @property
    def latent_dim(self):
        return 1

    @property
    def codebook_size(self):
        return 2

    def to_codes(self, latents):
        return (latents[:, 0] > 0.5).astype(jnp.int32)

    def from_codes(self, codes):
        return codes[:, None].astype(jnp.float32)

    def quantize(self, bounded, keep, *, key=None):
        codes = jax.random.randint(key, len(bounded), 0, 2, jnp.int32)
        return QuantizerOutput(self.from_codes(codes), codes, jnp.zeros(()), ())


def test_parts_draw_differently():
    codes = np.asarray(call(Grouped(Noisy(), 2), latents(2), KEEP, jax.random.key(0)).codes)
    assert 0 < np.mean(codes[:, 0] == codes[:, 1]) < 1


def test_marks_are_those_of_the_parts():
    grouped = Grouped(INNER["vq"], 2)
    assert grouped.trainable().parts == (INNER["vq"].trainable(),) * 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="n is 0: at least 1 part"):
        Grouped(LFQ(3), 0)
    with pytest.raises(
        ValueError, match="There are 3 codes per token: give 4, 2 for each of 2 parts"
    ):
        Grouped(Residual(LFQ(3), 2), 2).from_codes(jnp.zeros((5, 3), jnp.int32))
    with pytest.raises(ValueError, match="Grouped writes 2 codes per token"):
        Residual(Grouped(LFQ(3), 2), 2)
    with pytest.raises(Exception, match="GaussianVAE"):
        Grouped(GaussianVAE(3), 2)


@pytest.mark.parametrize(
    ("levels", "size"),
    [
        ((8, 6, 5), 240),
        ((8, 5, 5, 5), 1000),
        ((7, 5, 5, 5, 5), 4375),
        ((8, 8, 8, 6, 5), 15360),
        ((8, 8, 8, 5, 5, 5), 64000),
    ],
)
def test_sizes_of_the_levels_that_fsq_recommends(levels, size):
    """Table 1 of arXiv 2309.15505, for 2**8 to 2**16; also in groups of two."""
    assert FSQ(levels).codebook_size == size
    assert FSQ(levels).bits_per_token == pytest.approx(math.log2(size))
    assert Grouped(FSQ(levels), 2).bits_per_token == pytest.approx(2 * math.log2(size))
