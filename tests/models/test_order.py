import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.models import CoarseToFine, Raster

grids = st.tuples(st.integers(1, 5), st.integers(1, 17), st.integers(1, 17))


@given(grid=grids, order=st.sampled_from([Raster(), CoarseToFine()]))
def test_every_order_is_a_permutation_and_ranks_is_its_inverse(grid, order):
    cells = order.cells(grid)
    assert sorted(cells) == list(range(np.prod(grid)))
    np.testing.assert_array_equal(order.ranks(grid)[cells], np.arange(len(cells)))
    np.testing.assert_array_equal(cells[order.ranks(grid)], np.arange(len(cells)))


@given(grid=grids)
def test_for_every_power_of_two_the_cells_divisible_by_it_form_a_prefix(grid):
    cells = CoarseToFine().cells(grid)
    for j in range(6):
        step = 2**j
        divisible = {
            (t * grid[1] + h) * grid[2] + w
            for t in range(0, grid[0], step)
            for h in range(0, grid[1], step)
            for w in range(0, grid[2], step)
        }
        assert set(cells[: len(divisible)]) == divisible


def test_the_first_tokens_of_a_square_picture_spread_over_it():
    cells = CoarseToFine().cells((1, 4, 4))
    assert [divmod(int(c), 4) for c in cells[:4]] == [(0, 0), (0, 2), (2, 0), (2, 2)]


def test_raster_counts_up():
    np.testing.assert_array_equal(Raster().cells((2, 2, 3)), np.arange(12))


def test_a_cached_order_cannot_be_changed_by_its_user():
    with pytest.raises(ValueError, match="read-only"):
        CoarseToFine().cells((1, 4, 4))[0] = 3
