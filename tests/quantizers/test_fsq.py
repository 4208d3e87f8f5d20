"""FSQ against the formula in NumPy float64, and its code book's arithmetic."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elastictok.quantizers import FSQ, UniformGrid

TOKENS = 64
LEVELS = [(8, 8, 8, 5, 5, 5), (6, 7, 11), (2, 3, 4), (1000, 999), (513, 9, 10)]


def bounded(z: np.ndarray, level: int) -> np.ndarray:
    """The bounding function of one dimension, before rounding, in float64."""
    half = (level - 1) * (1 - 1e-3) / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    shift = np.tan(offset / half)
    return np.tanh(z + shift) * half - offset


def oracle(z: np.ndarray, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, codes, and whether float32 can be expected to round the same way."""
    latents, codes, clear = np.zeros(z.shape), np.zeros(len(z), int), np.ones(len(z), bool)
    for token in range(len(z)):
        place = 1
        for i, level in enumerate(levels):
            value = bounded(float(z[token, i]), level)
            whole = round(value)
            clear[token] &= abs(abs(value - np.floor(value)) - 0.5) > 3e-7 * level
            latents[token, i] = whole / (level // 2)
            codes[token] += (whole + level // 2) * place
            place *= level
    return latents, codes, clear


call = eqx.filter_jit(lambda quantizer, z, keep: quantizer(z, keep))
COMPILED = {levels: jax.jit(FSQ(levels).__call__) for levels in LEVELS}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([0.3, 2.0, 8.0]))
def test_equals_the_formula(levels, dtype, seed, width):
    drawn = np.random.default_rng(seed).uniform(-width, width, (TOKENS, len(levels)))
    z = jnp.asarray(drawn, dtype)
    latents, codes, clear = oracle(np.asarray(z, np.float64), levels)
    out = COMPILED[levels](z, np.ones(TOKENS, bool))
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(out.codes)[clear], codes[clear])
    np.testing.assert_allclose(np.asarray(out.latents)[clear], latents[clear], rtol=0, atol=2e-7)


# Excerpt of what the official Flax implementation of ElasticTok computes on CPU in float32 with
# random weights: latents before the bottleneck, and code indices.
OFFICIAL = [
    ([-0.6281, 0.6285, -2.5730, -0.3199, -0.2090, -0.8231], 18482),
    ([0.5100, -1.2217, -3.3164, -2.6117, 1.3295, -1.3773], 10254),
    ([-1.3918, 0.8148, -1.0404, 1.6815, -1.7547, 1.8009], 53361),
    ([-0.7004, 0.3131, -0.6053, 0.7719, 1.4334, 1.0756], 63146),
    ([-1.2802, -2.2680, -0.6556, -1.4226, -0.1864, -1.1019], 5249),
    ([1.2925, 0.6396, -1.5667, -0.5081, 3.2863, -0.1745], 36407),
    ([-3.7617, 1.2708, -1.7881, -1.4861, -0.3121, 0.6379], 41016),
    ([-0.3321, -3.2010, -1.1848, -0.6327, 0.0115, -0.3412], 18499),
]


def test_codes_of_the_official_model():
    fsq = FSQ((8, 8, 8, 5, 5, 5))
    z, codes = (np.array(column) for column in zip(*OFFICIAL, strict=True))
    out = call(fsq, z.astype(np.float32), np.ones(len(z), bool))
    np.testing.assert_array_equal(out.codes, codes)


def test_code_of_zero_is_the_official_one():
    fsq = FSQ((8, 8, 8, 5, 5, 5))
    assert fsq.to_codes(jnp.zeros((1, 6))) == 32036
    dropped = call(fsq, np.full((3, 6), np.nan, np.float32), np.zeros(3, bool))
    np.testing.assert_array_equal(dropped.codes, [32036] * 3)


def test_first_level_varies_fastest():
    fsq = FSQ((3, 4))
    expected = [[i - 1, (j - 2) / 2] for j in range(4) for i in range(3)]
    np.testing.assert_array_equal(fsq.from_codes(jnp.arange(12)), expected)


@pytest.mark.parametrize("level", [2, 3, 8, 999, 1000])
def test_every_level_is_reached(level):
    fsq = FSQ((level,))
    z = np.concatenate([np.linspace(-4, 4, 20 * level), [-1e9, 1e9]]).astype(np.float32)[:, None]
    out = call(fsq, z, np.ones(len(z), bool))
    assert set(np.asarray(out.codes).tolist()) == set(range(level))


@given(
    z=hnp.arrays(
        np.float32, (TOKENS, 6), elements=st.floats(-9, 9, width=32, allow_subnormal=False)
    )
)
def test_codes_survive_bfloat16_latents(z):
    fsq = FSQ((8, 8, 8, 5, 5, 5))
    out = COMPILED[fsq.levels](z, np.ones(TOKENS, bool))
    for dtype in (jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(fsq.to_codes(out.latents.astype(dtype)), out.codes)


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (512, 2), (511, 7), (6, 7, 11)])
def test_whole_codebook_survives_bfloat16(levels):
    fsq = FSQ(levels)
    codes = np.arange(fsq.codebook_size, dtype=np.int32)
    again = jax.jit(lambda c: fsq.to_codes(fsq.from_codes(c).astype(jnp.bfloat16)))(codes)
    np.testing.assert_array_equal(again, codes)


def test_bounding_twice_is_what_to_codes_must_not_do():
    fsq = FSQ((8, 8))
    latents = fsq.from_codes(jnp.arange(64))
    again = call(fsq, latents, np.ones(64, bool))
    assert (again.codes != fsq.to_codes(latents)).any()


def test_loss_and_statistics_are_empty():
    out = FSQ((4, 4))(jnp.ones((5, 2)), jnp.ones(5, bool))
    assert out.loss == 0
    assert out.statistics == ()


def test_grid_points_are_evenly_spaced():
    grid = UniformGrid((4, 3), (6, 5))
    points = np.asarray(grid.from_codes(jnp.arange(12)))
    expected = [[x, y] for y in (-2 / 5, 0, 2 / 5) for x in (-3 / 6, -1 / 6, 1 / 6, 3 / 6)]
    np.testing.assert_allclose(points, expected, rtol=0, atol=2e-7)
    far = jnp.array([[-9.0, 9.0], [9.0, -9.0]])
    np.testing.assert_array_equal(grid.to_codes(far), [0 + 4 * 2, 3 + 4 * 0])


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "levels is empty"),
        ((8, 1), "level of 1 is outside 2 .. 1001"),
        ((1002,), "level of 1002 is outside"),
        ((1001, 1001, 1001, 3), "int32 cannot hold"),
        ((2,) * 31, "2147483648 codes"),
    ],
)
def test_bad_levels(levels, message):
    with pytest.raises(ValueError, match=message):
        FSQ(levels)
    with pytest.raises(ValueError, match=message):
        UniformGrid(levels, (4,) * len(levels))


def test_largest_codebook():
    fsq = FSQ((2,) * 30)
    assert fsq.codebook_size == 2**30
    FSQ((2**10 - 24,) * 3)


@pytest.mark.parametrize(
    ("denominators", "message"),
    [((4,), "1 denominators for 2 levels"), ((4, 0), "of 0 is outside"), ((4, 2**21), "2097152")],
)
def test_bad_denominators(denominators, message):
    with pytest.raises(ValueError, match=message):
        UniformGrid((3, 3), denominators)
