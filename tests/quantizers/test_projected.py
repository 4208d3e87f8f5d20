"""A quantizer between two linear maps, against NumPy float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastictok.quantizers import (
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    GaussianVAE,
    Identity,
    Projected,
    Residual,
)

TOKENS, IN, OUT = 40, 11, 13
KEEP = np.arange(TOKENS) % 3 > 0
KEY = jax.random.key(0)
INNER: dict[str, AbstractDiscreteQuantizer] = {
    "fsq": FSQ((8, 6, 5)),
    "lfq": LFQ(4),
    "vq": VQ(32, 4, key=KEY),
    "residual": Residual(VQ(8, 4, key=KEY), 2),
}
every = pytest.mark.parametrize("name", INNER)
call = eqx.filter_jit(lambda q, z, keep: q(z, keep))
to_codes = eqx.filter_jit(lambda q, latents: q.to_codes(latents))
from_codes = eqx.filter_jit(lambda q, codes: q.from_codes(codes))


def make(name: str, out_dim: int = OUT) -> Projected:
    return Projected(IN, INNER[name], out_dim, key=jax.random.key(1))


def latents(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TOKENS, IN)).astype(np.float32)


@every
def test_it_is_map_quantizer_map(name):
    quantizer, z = make(name), latents()
    inner = INNER[name]
    mapped = (z.astype(np.float64) @ np.asarray(quantizer.w_in, np.float64)).astype(np.float32)
    out, within = call(quantizer, z, KEEP), call(inner, mapped, KEEP)
    np.testing.assert_array_equal(np.asarray(out.codes)[KEEP], np.asarray(within.codes)[KEEP])
    expected = np.asarray(within.latents, np.float64) @ np.asarray(quantizer.w_out, np.float64)
    np.testing.assert_allclose(out.latents, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.loss, within.loss, rtol=1e-4)
    for a, b in zip(
        jax.tree.leaves(out.statistics), jax.tree.leaves(within.statistics), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        quantizer.batch_loss(out.statistics), inner.batch_loss(within.statistics), rtol=1e-3
    )


def test_sizes():
    quantizer = make("fsq")
    assert (quantizer.input_dim, quantizer.latent_dim) == (IN, OUT)
    assert (quantizer.codebook_size, quantizer.streams) == (240, 1)
    assert quantizer.bits_per_token == INNER["fsq"].bits_per_token
    assert make("residual").streams == 2


@pytest.mark.parametrize(("inner", "out_dim"), [(64, 96), (6, 192)])
def test_the_map_out_has_the_same_bits_for_any_number_of_tokens(inner, out_dim):
    """A matrix product has not: it sums in an order that depends on the shape, and a compiler that
    knows the factors has yet another.
    """
    quantizer = Projected(IN, VQ(50, inner, key=KEY), out_dim, key=jax.random.key(1))
    codes = jnp.arange(1000, dtype=jnp.int32) % 50
    together = np.asarray(from_codes(quantizer, codes))
    for part in (slice(0, 1), slice(3, 6), slice(20, 37), slice(0, 300)):
        np.testing.assert_array_equal(from_codes(quantizer, codes[part]), together[part])
        np.testing.assert_array_equal(quantizer.from_codes(codes[part]), together[part])
    batched = jax.vmap(lambda c: quantizer.from_codes(c))(codes.reshape(100, 10))
    np.testing.assert_array_equal(batched.reshape(1000, -1), together)
    constant = jax.jit(lambda i: quantizer.from_codes(codes)[i])(jnp.arange(1000))
    np.testing.assert_array_equal(constant, together)


def test_the_map_out_is_as_exact_as_float32():
    """Also where the points are wide and of very different sizes."""
    size = np.float32(10.0) ** np.random.default_rng(3).uniform(-6, 6, (50, 1)).astype(np.float32)
    book = size * np.random.default_rng(4).normal(size=(50, 40)).astype(np.float32)
    vq = eqx.tree_at(lambda q: q.codebook, VQ(50, 40, key=KEY), jnp.asarray(book))
    quantizer = Projected(IN, vq, 64, key=KEY)
    w_out = np.asarray(quantizer.w_out, np.float64)
    points = from_codes(quantizer, np.arange(50, dtype=np.int32))
    scale = np.abs(book.astype(np.float64)) @ np.abs(w_out)
    assert (np.abs(points - book.astype(np.float64) @ w_out) <= 1e-6 * scale).all()


@every
@pytest.mark.parametrize("out_dim", [4, 64])
def test_codes_are_read_back_after_training_has_changed_the_maps(name, out_dim):
    quantizer = make(name, out_dim)
    noise = jax.random.normal(KEY, quantizer.w_out.shape) * 0.1
    quantizer = eqx.tree_at(lambda q: q.w_out, quantizer, quantizer.w_out + noise)
    out = call(quantizer, latents(), KEEP)
    for dtype in (jnp.float32, jnp.bfloat16) if out_dim == 64 else (jnp.float32,):
        again = to_codes(quantizer, out.latents.astype(dtype))
        np.testing.assert_array_equal(np.asarray(again)[KEEP], np.asarray(out.codes)[KEEP])


@every
def test_gradients_of_the_maps(name):
    """True ones: (inner latents)^T cotangent for the map out; for the map in straight-through."""
    quantizer, z = make(name), latents()
    cotangent = np.random.default_rng(1).normal(size=(TOKENS, OUT))

    def objective(maps):
        q = eqx.tree_at(lambda q: (q.w_in, q.w_out), quantizer, maps)
        return jnp.sum(q(jnp.asarray(z), jnp.asarray(KEEP)).latents * cotangent)

    of_in, of_out = jax.jit(jax.grad(objective))((quantizer.w_in, quantizer.w_out))
    kept, c = (
        np.where(KEEP[:, None], z.astype(np.float64), 0),
        np.where(KEEP[:, None], cotangent, 0),
    )
    codes = call(quantizer, z, KEEP).codes
    points = np.where(KEEP[:, None], np.asarray(INNER[name].from_codes(codes), np.float64), 0)
    np.testing.assert_allclose(of_out, points.T @ c, rtol=1e-4, atol=1e-4)
    mapped = jnp.asarray(kept @ np.asarray(quantizer.w_in, np.float64), jnp.float32)
    _, pull = jax.vjp(INNER[name].bound, mapped)
    inside = pull(jnp.asarray(c @ np.asarray(quantizer.w_out, np.float64).T, jnp.float32))[0]
    np.testing.assert_allclose(of_in, kept.T @ np.asarray(inside), rtol=1e-4, atol=1e-4)


def test_trainable_are_the_maps_and_what_the_quantizer_says():
    marks = make("vq").trainable()
    assert marks.w_in is True
    assert marks.w_out is True
    assert not any(jax.tree.leaves(marks.quantizer))
    quantizer = make("vq")
    statistics = call(quantizer, latents(), KEEP).statistics
    updated = quantizer.update(statistics)
    assert isinstance(updated, Projected)
    for a, b in zip(
        jax.tree.leaves(updated.quantizer),
        jax.tree.leaves(INNER["vq"].update(statistics)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(updated.w_in, quantizer.w_in)


def test_maps_keep_the_mean_square():
    quantizer = Projected(400, VQ(64, 50, key=KEY), 300, key=jax.random.key(2))
    z = jax.random.normal(KEY, (200, 400))
    for x, w in ((z, quantizer.w_in), (jax.random.normal(KEY, (200, 50)), quantizer.w_out)):
        assert float(jnp.mean((x @ w) ** 2)) == pytest.approx(1, rel=0.1)
    gram = np.asarray(quantizer.w_out @ quantizer.w_out.T)
    np.testing.assert_allclose(gram, np.eye(50) * 300 / 50, atol=1e-4)


def test_training_the_maps_reconstructs_latents_on_a_plane():
    """Latents of 11 dimensions that have only 3."""
    basis = np.random.default_rng(5).normal(size=(3, IN)).astype(np.float32)
    z = jnp.asarray(np.random.default_rng(6).uniform(-1, 1, (TOKENS, 3)).astype(np.float32) @ basis)
    keep = jnp.ones(TOKENS, bool)
    quantizer = Projected(IN, FSQ((15, 15, 15)), IN, key=KEY)

    def error(maps):
        q = eqx.tree_at(lambda q: (q.w_in, q.w_out), quantizer, maps)
        return jnp.mean((q(z, keep).latents - z) ** 2)

    @jax.jit
    def step(maps):
        gradient = jax.grad(error)(maps)
        return jax.tree.map(lambda w, g: w - 0.2 * g, maps, gradient)

    maps = (quantizer.w_in, quantizer.w_out)
    before = float(error(maps))
    for _ in range(300):
        maps = step(maps)
    assert float(error(maps)) < before / 10


def test_bad_arguments():
    for continuous in (GaussianVAE(3), Identity(3)):
        message = f"{type(continuous).__name__} is continuous: give a discrete quantizer. The enc"
        with pytest.raises(ValueError, match=message):
            Projected(IN, continuous, OUT, key=KEY)
    with pytest.raises(ValueError, match="in_dim is 0"):
        Projected(0, LFQ(4), OUT, key=KEY)
    with pytest.raises(
        ValueError, match=r"out_dim is 3 and the latents of LFQ are 4 wide.*4 or more"
    ):
        Projected(IN, LFQ(4), 3, key=KEY)
    with pytest.raises(NotImplementedError, match="Projected cannot be a stage of Residual"):
        Residual(make("fsq"), 1)
