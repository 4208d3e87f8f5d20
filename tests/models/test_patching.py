import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictok.models import Patching

sizes = st.tuples(*[st.integers(1, 3)] * 3)


@settings(max_examples=8)
@given(patch=sizes, grid=sizes)
def test_patches_are_the_cells_and_unpatch_restores_them(patch, grid):
    patching = Patching(*patch)
    frames, height, width = (p * g for p, g in zip(patch, grid, strict=True))
    pixels = np.arange(frames * height * width * 3, dtype=np.float32)
    pixels = pixels.reshape(frames, height, width, 3)
    patches = np.asarray(patching.patch(jnp.asarray(pixels)))
    t, h, w = patch
    cells = [
        pixels[i * t : (i + 1) * t, j * h : (j + 1) * h, k * w : (k + 1) * w].reshape(-1)
        for i in range(grid[0])
        for j in range(grid[1])
        for k in range(grid[2])
    ]
    np.testing.assert_array_equal(patches, np.stack(cells))
    back = patching.unpatch(jnp.asarray(patches), frames, height, width)
    np.testing.assert_array_equal(back, pixels)


def test_sizes_that_do_not_fit_are_named():
    patching = Patching(2, 8, 8)
    with pytest.raises(ValueError, match=r"height is 60, which the patch's 8 does not divide"):
        patching.grid(2, 60, 64)
    with pytest.raises(ValueError, match=r"frames is 3"):
        patching.patch(jnp.zeros((3, 8, 8, 3)))
    with pytest.raises(ValueError, match="patch width is 0"):
        Patching(1, 8, 0)
