"""What every quantizer must do. Add yours to `CASES`."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import (
    FSQ,
    LFQ,
    VQ,
    AbstractDiscreteQuantizer,
    AbstractQuantizer,
    GaussianVAE,
    QuantizerOutput,
    Residual,
    UniformGrid,
)

TOKENS = 12
README = Path(__file__).parents[2] / "quantizers" / "README.md"


def readme_quantizer() -> AbstractDiscreteQuantizer:
    """The quantizer that the README tells users to write."""
    [block] = [
        b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class" in b
    ]
    names = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    return names["Ternary"](4)


def no_slope(z: np.ndarray) -> np.ndarray:
    return np.ones_like(z)


def fsq_slope(levels: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """The derivative of the bounding function, written out."""

    def slope(z):
        half = (np.array(levels) - 1) * 0.999 / 2
        offset = np.array([0.5 if level % 2 == 0 else 0.0 for level in levels])
        step = np.array([level // 2 for level in levels])
        return half / np.cosh(z + np.tan(offset / half)) ** 2 / step

    return slope


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A quantizer and what the suite cannot know about it.

    - `slope`: the gradient of the output latents, elementwise, in NumPy.
    - `whole`: whether `to_codes(from_codes(c)) == c` is claimed for all codes.
    - `keys`: what to pass as `key`; more than `None` for a quantizer that uses it.
    """

    quantizer: AbstractQuantizer
    slope: Callable[[np.ndarray], np.ndarray] = no_slope
    whole: bool = True
    keys: tuple[jax.Array | None, ...] = (None,)

    @functools.cached_property
    def call(self) -> Callable[..., QuantizerOutput]:
        return eqx.filter_jit(lambda z, keep, key=None: self.quantizer(z, keep, key=key))

    @functools.cached_property
    def to_codes(self) -> Callable:
        return eqx.filter_jit(lambda latents: self.quantizer.to_codes(latents))

    @functools.cached_property
    def from_codes(self) -> Callable:
        return eqx.filter_jit(lambda codes: self.quantizer.from_codes(codes))

    @functools.cached_property
    def batch(self) -> Callable:
        """What happens to the statistics once per step."""

        def both(statistics):
            return self.quantizer.batch_loss(statistics), self.quantizer.update(statistics)

        return eqx.filter_jit(both)

    @functools.cached_property
    def gradient(self) -> Callable:
        """The gradient of everything a trainer may differentiate."""

        def objective(z, keep, weights):
            out = self.quantizer(z, keep)
            sums = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out.statistics))
            total = jnp.sum(out.latents * weights) + out.loss + sums
            return total + self.quantizer.batch_loss(out.statistics)

        return eqx.filter_jit(jax.grad(objective))


KEY = jax.random.key(0)
CASES = {
    "fsq": Case(FSQ((8, 8, 8, 5, 5, 5)), fsq_slope((8, 8, 8, 5, 5, 5))),
    "fsq_odd": Case(FSQ((6, 7, 11)), fsq_slope((6, 7, 11))),
    "fsq_two": Case(FSQ((2, 2)), fsq_slope((2, 2))),
    "fsq_fine": Case(FSQ((1001, 3)), fsq_slope((1001, 3))),
    "grid": Case(UniformGrid((4, 5), (3, 7))),
    "vq": Case(VQ(64, 4, key=KEY)),
    "lfq": Case(LFQ(10)),
    "residual_fsq": Case(Residual(FSQ((6, 7)), 3), fsq_slope((6, 7))),
    "residual_fsq_fine": Case(Residual(FSQ((1001,)), 2), fsq_slope((1001,))),
    "residual_vq": Case(Residual(VQ(16, 4, key=KEY), 3)),
    "residual_vq_large": Case(Residual(VQ(300, 4, key=KEY), 2), whole=False),
    "residual_lfq": Case(Residual(LFQ(4), 4)),
    "vae": Case(GaussianVAE(3), keys=(None, jax.random.key(3))),
    "readme": Case(readme_quantizer(), lambda z: 1.5 / np.cosh(z) ** 2),
}
DISCRETE = [n for n, c in CASES.items() if isinstance(c.quantizer, AbstractDiscreteQuantizer)]

every = pytest.mark.parametrize("name", CASES)
every_discrete = pytest.mark.parametrize("name", DISCRETE)


def draw_latents(data: st.DataObject, case: Case, width: float = 4.0) -> np.ndarray:
    shape = (TOKENS, case.quantizer.input_dim)
    return data.draw(
        hnp.arrays(
            np.float32, shape, elements=st.floats(-width, width, width=32, allow_subnormal=False)
        )
    )


def draw_keep(data: st.DataObject) -> np.ndarray:
    return data.draw(hnp.arrays(np.bool_, TOKENS))


def assert_same(left, right):
    """Equal structure and equal bits; NaN equals NaN."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(left, right, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def discrete(name: str) -> AbstractDiscreteQuantizer:
    quantizer = CASES[name].quantizer
    assert isinstance(quantizer, AbstractDiscreteQuantizer)
    return quantizer


def all_codes(quantizer: AbstractDiscreteQuantizer, codes_shape: tuple[int, ...]) -> np.ndarray:
    """Every code, or every tuple of codes."""
    size = quantizer.codebook_size
    if len(codes_shape) == 1:
        return np.arange(size, dtype=np.int32)
    index = np.arange(size**quantizer.streams)
    return np.stack(np.unravel_index(index, (size,) * quantizer.streams), -1).astype(np.int32)


@pytest.mark.parametrize("name", [n for n in DISCRETE if CASES[n].whole])
def test_whole_codebook_round_trips(name):
    quantizer = discrete(name)
    shape = CASES[name].call(jnp.zeros((TOKENS, quantizer.input_dim)), jnp.ones(TOKENS, bool)).codes
    codes = all_codes(quantizer, shape.shape)
    assert len(codes) == quantizer.codebook_size**quantizer.streams
    latents = CASES[name].from_codes(codes)
    assert latents.dtype == jnp.float32
    assert latents.shape == (len(codes), quantizer.latent_dim)
    np.testing.assert_array_equal(CASES[name].to_codes(latents), codes)


@pytest.mark.parametrize("name", ["fsq_odd", "grid", "residual_fsq", "residual_vq"])
def test_whole_codebook_has_the_same_bits_in_every_program(name):
    quantizer = discrete(name)
    shape = CASES[name].call(jnp.zeros((TOKENS, quantizer.input_dim)), jnp.ones(TOKENS, bool)).codes
    codes = jnp.asarray(all_codes(quantizer, shape.shape))
    latents = CASES[name].from_codes(codes)
    np.testing.assert_array_equal(latents, quantizer.from_codes(codes))
    # An addition that the compiler may fuse with what comes before it.
    fused = jax.jit(lambda c: quantizer.from_codes(c) + 1)(codes)
    np.testing.assert_array_equal(fused, np.asarray(latents) + np.float32(1))


@every_discrete
@given(data=st.data())
def test_codes_name_the_latents(name, data):
    case, quantizer = CASES[name], discrete(name)
    z, keep = draw_latents(data, case), draw_keep(data)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = case.call(jnp.asarray(z, dtype), keep)
        assert out.latents.dtype == jnp.float32
        assert out.loss.dtype == jnp.float32
        codes = np.asarray(out.codes)
        assert np.issubdtype(codes.dtype, np.integer)
        assert codes.shape in {(TOKENS,), (TOKENS, quantizer.streams)}
        assert codes.min() >= 0
        assert codes.max() < quantizer.codebook_size
        latents = np.asarray(case.from_codes(out.codes))
        np.testing.assert_array_equal(np.asarray(out.latents)[keep], latents[keep])
        if case.whole:
            again = np.asarray(case.to_codes(out.latents))
            np.testing.assert_array_equal(again[keep], codes[keep])


@every_discrete
@given(data=st.data())
def test_codes_are_in_range_for_any_float(name, data):
    quantizer = discrete(name)
    shape = (TOKENS, quantizer.input_dim)
    z = data.draw(
        hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_subnormal=False))
    )
    for codes in (
        CASES[name].call(z, np.ones(TOKENS, bool)).codes,
        CASES[name].to_codes(z),
    ):
        assert np.min(codes) >= 0
        assert np.max(codes) < quantizer.codebook_size


@every
@given(data=st.data())
def test_a_nan_that_is_kept_is_seen(name, data):
    case = CASES[name]
    z = draw_latents(data, case)
    row = data.draw(st.integers(0, TOKENS - 1))
    z[row] = np.nan
    latents = np.asarray(case.call(z, np.ones(TOKENS, bool)).latents)
    assert np.isnan(latents[row]).all()
    assert np.isfinite(np.delete(latents, row, axis=0)).all()


@every
@given(data=st.data())
def test_dropped_tokens_contribute_nothing(name, data):
    case = CASES[name]
    z, keep = draw_latents(data, case), draw_keep(data)
    garbage = data.draw(
        hnp.arrays(
            np.float32, z.shape, elements=st.sampled_from([np.nan, np.inf, -np.inf, 3e38, 1])
        )
    )
    dirty = np.where(keep[:, None], z, garbage)
    clean = np.where(keep[:, None], z, np.float32(0))
    for key in case.keys:
        out = case.call(dirty, keep, key)
        assert_same(out, case.call(clean, keep, key))
        assert not np.asarray(out.latents)[~keep].any()
        for leaf in jax.tree.leaves(eqx.filter(out, eqx.is_inexact_array)):
            assert np.isfinite(leaf).all()
    weights = np.random.default_rng(0).normal(size=out.latents.shape).astype(np.float32)
    gradient = np.asarray(case.gradient(dirty, keep, weights))
    assert not gradient[~keep].any()
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient, case.gradient(clean, keep, weights))


@every
@given(data=st.data())
def test_tokens_do_not_see_each_other(name, data):
    """Tokens in another order, with other tokens dropped among them, give the same."""
    case = CASES[name]
    z, keep = draw_latents(data, case), draw_keep(data)
    order = np.array(data.draw(st.permutations(range(TOKENS))))
    others = np.where(keep[:, None], z, draw_latents(data, case))
    out, moved = case.call(z, keep), case.call(others[order], keep[order])
    np.testing.assert_array_equal(np.asarray(out.latents)[order], moved.latents)
    if out.codes is not None:
        kept = keep[order]
        np.testing.assert_array_equal(
            np.asarray(out.codes)[order][kept], np.asarray(moved.codes)[kept]
        )
    assert_close((out.loss, out.statistics), (moved.loss, moved.statistics))


@every_discrete
@given(data=st.data())
def test_gradient_is_straight_through(name, data):
    case = CASES[name]
    z, keep = draw_latents(data, case), draw_keep(data)
    cotangent = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    _, pull = jax.vjp(lambda x: case.call(x, keep).latents, jnp.asarray(z))
    expected = np.where(keep[:, None], cotangent * case.slope(z.astype(np.float64)), 0)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], expected, rtol=1e-4, atol=1e-5)


@every
@settings(max_examples=5)
@given(data=st.data())
def test_vmap_equals_a_loop(name, data):
    case = CASES[name]
    z = np.stack([draw_latents(data, case) for _ in range(3)])
    keep = np.stack([draw_keep(data) for _ in range(3)])
    for key in case.keys:
        keys = None if key is None else jax.random.split(key, 3)
        together = jax.vmap(case.call, in_axes=(0, 0, None if key is None else 0))(z, keep, keys)
        for i in range(3):
            one = case.call(z[i], keep[i], None if keys is None else keys[i])
            picked = jax.tree.map(lambda leaf, i=i: leaf[i], together)
            np.testing.assert_array_equal(picked.codes, one.codes)
            assert_close(picked, one)


@every
@settings(max_examples=5)
@given(data=st.data())
def test_jit_equals_eager(name, data):
    case = CASES[name]
    z, keep = draw_latents(data, case), draw_keep(data)
    for key in case.keys:
        eager, compiled = (
            case.quantizer(jnp.asarray(z), jnp.asarray(keep), key=key),
            case.call(z, keep, key),
        )
        if eager.codes is not None:
            np.testing.assert_array_equal(eager.codes, compiled.codes)
            np.testing.assert_array_equal(eager.latents, compiled.latents)
        assert_close(eager, compiled)


@every
@given(data=st.data())
def test_sums_are_additive_over_tokens(name, data):
    case = CASES[name]
    z, keep = draw_latents(data, case), draw_keep(data)
    first = data.draw(hnp.arrays(np.bool_, TOKENS))
    whole, a, b = (case.call(z, k) for k in (keep, keep & first, keep & ~first))
    added = jax.tree.map(lambda x, y: x + y, (a.loss, a.statistics), (b.loss, b.statistics))
    assert_close((whole.loss, whole.statistics), added)
    np.testing.assert_allclose(whole.latents, a.latents + b.latents, rtol=0, atol=1e-37)


@every
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e4, -1e4, 1e-40])
def test_constants_are_finite(name, value):
    case = CASES[name]
    z = np.full((TOKENS, case.quantizer.input_dim), value, np.float32)
    keep = np.arange(TOKENS) % 2 == 0
    out = case.call(z, keep)
    loss, updated = case.batch(out.statistics)
    gradient = case.gradient(z, keep, np.ones(out.latents.shape, np.float32))
    for leaf in jax.tree.leaves(eqx.filter((out, loss, updated, gradient), eqx.is_inexact_array)):
        assert np.isfinite(leaf).all()


@every
def test_a_batch_with_nothing_kept(name):
    case = CASES[name]
    z = np.full((TOKENS, case.quantizer.input_dim), np.nan, np.float32)
    keep = np.zeros(TOKENS, bool)
    out = case.call(z, keep)
    assert not np.asarray(out.latents).any()
    assert out.loss == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(out.statistics))
    loss, updated = case.batch(out.statistics)
    assert loss == 0
    assert_same(updated, case.quantizer)
    assert not np.asarray(case.gradient(z, keep, np.ones(out.latents.shape, np.float32))).any()


@every
def test_update_and_trainable_keep_the_structure(name):
    case = CASES[name]
    z = np.random.default_rng(2).normal(size=(TOKENS, case.quantizer.input_dim)).astype(np.float32)
    out = case.call(z, np.ones(TOKENS, bool))
    _, updated = case.batch(out.statistics)
    assert jax.tree.structure(updated) == jax.tree.structure(case.quantizer)
    for new, old in zip(jax.tree.leaves(updated), jax.tree.leaves(case.quantizer), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    marks = case.quantizer.trainable()
    assert jax.tree.structure(marks) == jax.tree.structure(case.quantizer)
    assert all(isinstance(mark, bool) for mark in jax.tree.leaves(marks))


@every
def test_no_gradient_reaches_what_is_not_trainable(name):
    case = CASES[name]
    quantizer = case.quantizer
    z = np.random.default_rng(4).normal(size=(TOKENS, quantizer.input_dim)).astype(np.float32)

    def objective(arrays, rest):
        q = eqx.combine(arrays, rest)
        out = q(jnp.asarray(z), jnp.ones(TOKENS, bool))
        return jnp.sum(out.latents) + out.loss + q.batch_loss(out.statistics)

    gradients = eqx.filter_jit(jax.grad(objective))(*eqx.partition(quantizer, eqx.is_inexact_array))
    _, frozen = eqx.partition(gradients, quantizer.trainable())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize(
    "name", [n for n in DISCRETE if not isinstance(CASES[n].quantizer, Residual)]
)
@settings(max_examples=10)
@given(data=st.data())
def test_codes_are_those_of_the_nearest_point(name, data):
    quantizer = discrete(name)
    points = np.asarray(
        CASES[name].from_codes(np.arange(quantizer.codebook_size, dtype=np.int32)), np.float64
    )
    z = draw_latents(data, CASES[name], width=2.0)
    codes = np.asarray(CASES[name].to_codes(z))
    for row, code in zip(z.astype(np.float64), codes, strict=True):
        distances = np.sum((points - row) ** 2, axis=-1)
        assert distances[code] <= distances.min() + 1e-5


@every_discrete
def test_bits_per_token(name):
    quantizer = discrete(name)
    combinations = quantizer.codebook_size**quantizer.streams
    assert quantizer.bits_per_token == pytest.approx(math.log2(combinations))


@every
def test_wrong_width_is_an_error(name):
    quantizer = CASES[name].quantizer
    width = quantizer.input_dim
    with pytest.raises(ValueError, match=rf"takes latents of width {width}, not {width + 1}"):
        quantizer(jnp.zeros((TOKENS, width + 1)), jnp.ones(TOKENS, bool))


def sizes_in(jaxpr) -> list[int]:
    """The number of elements of every value that a jaxpr computes, inner jaxprs included."""
    sizes = [math.prod(var.aval.shape) for eqn in jaxpr.eqns for var in eqn.outvars]
    params = jax.tree.leaves([eqn.params for eqn in jaxpr.eqns], is_leaf=is_jaxpr)
    for inner in filter(is_jaxpr, params):
        sizes += sizes_in(inner)
    return sizes


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")


@pytest.mark.parametrize(
    "quantizer",
    [
        FSQ((8, 8, 8, 5, 5, 5)),
        FSQ((1001, 1001, 1001)),
        LFQ(30),
        Residual(FSQ((8, 8, 8, 8)), 4),
        Residual(LFQ(30), 3),
    ],
    ids=["fsq", "fsq_large", "lfq", "residual_fsq", "residual_lfq"],
)
def test_nothing_as_large_as_the_codebook_exists(quantizer):
    """Training, the entropy penalty and codes both ways need a few numbers per latent."""

    def step(z, keep):
        out = quantizer(z, keep)
        round_trip = quantizer.from_codes(quantizer.to_codes(out.latents))
        return jnp.sum(round_trip) + jnp.sum(out.latents) + quantizer.batch_loss(out.statistics)

    z = jnp.zeros((TOKENS, quantizer.input_dim))
    jaxpr = jax.make_jaxpr(jax.value_and_grad(step))(z, jnp.ones(TOKENS, bool))
    sizes = sizes_in(jaxpr)
    assert len(sizes) > 20
    assert max(sizes) <= z.size * quantizer.streams


def test_sizes_in_sees_inner_values():
    inner = jax.jit(lambda x: jnp.sum(jnp.outer(x, x)))
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.map(inner, x))(jnp.zeros((3, 50)))
    assert max(sizes_in(jaxpr)) == 2500


LARGE = {
    "fsq": FSQ((512, 511, 510)),
    "fsq_fine": FSQ((1001, 1000, 999)),
    "lfq": LFQ(30),
    "grid": UniformGrid((1000, 1001), (2**20, 2**19 + 1)),
}
round_trip = eqx.filter_jit(lambda q, codes: q.to_codes(q.from_codes(codes)))


@pytest.mark.parametrize("name", LARGE)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_codes_of_large_books_round_trip(name, seed):
    size = LARGE[name].codebook_size
    codes = np.random.default_rng(seed).integers(0, size, 200).astype(np.int32)
    codes[:2] = 0, size - 1
    np.testing.assert_array_equal(round_trip(LARGE[name], codes), codes)
