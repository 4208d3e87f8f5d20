import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.models import Cells, CoarseToFine, PlaceEmbedding, Raster

grids = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def coordinates_of(order, grid):
    return Cells(order, grid).coordinates(jnp.arange(int(np.prod(grid))))


@settings(max_examples=8)
@given(grid=grids, order=st.sampled_from([Raster(), CoarseToFine()]))
def test_coordinates_are_the_middles_of_the_cells_in_token_order(grid, order):
    coordinates = coordinates_of(order, grid)
    for token, cell in enumerate(order.cells(grid)):
        w = cell % grid[2]
        h = cell // grid[2] % grid[1]
        t = cell // (grid[1] * grid[2])
        expected = [(t + 0.5) / grid[0], (h + 0.5) / grid[1], (w + 0.5) / grid[2]]
        np.testing.assert_allclose(coordinates[token], expected, rtol=1e-6)


def test_as_many_frequencies_as_cells_tell_all_cells_apart():
    """The cosine basis of an 8x8 grid is complete: any function of the cell can be learned."""
    place = PlaceEmbedding(80, frequencies=8, std=1.0, key=jax.random.key(0))
    embedded = place(coordinates_of(Raster(), (1, 8, 8)))
    assert np.linalg.matrix_rank(np.asarray(embedded, np.float64)) == 64


def test_weights_serve_every_grid():
    """The same place of a coarser grid has the same embedding."""
    place = PlaceEmbedding(8, frequencies=4, std=1.0, key=jax.random.key(0))
    coarse = place(coordinates_of(Raster(), (1, 1, 3)))
    fine = place(coordinates_of(Raster(), (1, 1, 9)))
    np.testing.assert_allclose(coarse, fine[1::3], atol=1e-5)


def test_no_frequencies_is_refused():
    with pytest.raises(ValueError, match="frequencies is 0"):
        PlaceEmbedding(8, frequencies=0, std=1.0, key=jax.random.key(0))
