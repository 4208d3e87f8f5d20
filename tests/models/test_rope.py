import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.models import CellRotary, Cells, CoarseToFine, RankRotary, Raster, rotate


@pytest.mark.parametrize("theta", [1e4, 5e6, 5e7])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_angles_are_within_a_millionth_of_float64_up_to_a_million(theta, head_dim):
    positions = np.unique(
        np.concatenate(
            [
                np.arange(300),
                np.random.default_rng(0).integers(0, 1 << 20, 2000),
                np.array([4095, 4096, 65535, 65536, (1 << 20) - 1, 1 << 20]),
            ]
        )
    )
    cells = Cells(Raster(), (1, 4, 4))
    cos, sin = RankRotary(theta)(jnp.asarray(positions, jnp.int32), cells, head_dim)
    exponents = -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    angles = positions[:, None].astype(np.float64) * theta**exponents
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-6)


@given(shift=st.integers(0, 100_000), seed=st.integers(0, 9))
def test_scores_depend_on_the_distance_alone(shift, seed):
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.normal(size=(4, 1, 8)), jnp.float32) for _ in range(2))

    def scores(offset):
        cos, sin = RankRotary(100.0)(jnp.arange(4) + offset, Cells(Raster(), (1, 2, 2)), 8)
        return np.einsum("qhd,khd->qk", rotate(q, cos, sin), rotate(k, cos, sin))

    np.testing.assert_allclose(scores(shift), scores(0), atol=2e-5)


def test_rotation_turns_interleaved_pairs():
    x = jnp.asarray([[[1.0, 0.0, 0.0, 1.0]]])
    cos, sin = jnp.asarray([[0.0, 1.0]]), jnp.asarray([[1.0, 0.0]])
    np.testing.assert_array_equal(rotate(x, cos, sin), [[[0.0, 1.0, 0.0, 1.0]]])


def test_cells_rotate_by_their_distance_in_the_picture_whatever_the_order():
    """Scores between two cells are the same in raster and in coarse-to-fine order."""
    grid, head_dim = (1, 4, 6), 16
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, head_dim)), jnp.float32) for _ in range(2))
    scores = []
    for order in (Raster(), CoarseToFine()):
        positions = jnp.arange(48)  # two blocks
        cos, sin = CellRotary(30.0, 100.0)(positions, Cells(order, grid), head_dim)
        spread = jnp.repeat(q, 48, 0), jnp.repeat(k, 48, 0)
        turned = [rotate(x, cos, sin)[:, 0] for x in spread]
        by_cell = np.concatenate([order.ranks(grid), 24 + order.ranks(grid)])
        scores.append((turned[0] @ turned[1].T)[by_cell][:, by_cell])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    # Equal steps, equal scores: one row down, anywhere, also in the next block.
    steps = [scores[0][i, i + 6] for i in (0, 5, 10, 24, 30)]
    np.testing.assert_allclose(steps, steps[0], atol=1e-5)
    # And distances on the three axes are told apart.
    apart = [scores[0][0, 1], scores[0][0, 6], scores[0][0, 24]]
    assert min(abs(a - b) for a, b in zip(apart, np.roll(apart, 1), strict=True)) > 1e-3


def test_time_runs_on_from_block_to_block():
    cells = Cells(Raster(), (2, 3, 1))
    where = np.asarray(cells.indices(jnp.arange(12)))
    np.testing.assert_array_equal(where[:, 0], np.repeat([0, 1, 2, 3], 3))
    np.testing.assert_array_equal(where[:, 1], np.tile([0, 1, 2], 4))
