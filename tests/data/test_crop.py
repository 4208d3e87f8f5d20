"""Windows lie inside their frames and have the aspect asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.data import CentreCrop, Geometry, RandomCrop, Window, WorkingSize

SIDES = st.integers(1, 300)
SIZES = st.tuples(st.integers(1, 80), st.integers(1, 80))
SCALES = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted)


def full(height, width, size):
    """Sides of the largest window, before rounding, by scaling `size` until it touches."""
    factor = min(height / size[0], width / size[1])
    return size[0] * factor, size[1] * factor


@given(height=SIDES, width=SIDES, size=SIZES, scales=SCALES, seed=st.integers(0, 2**32))
def test_random_windows(height, width, size, scales, seed):
    crop = RandomCrop(scales[0], scales[1])
    window = crop.window(height, width, size, np.random.default_rng(seed))
    assert 0 <= window.top <= window.top + window.height <= height
    assert 0 <= window.left <= window.left + window.width <= width
    high, wide = full(height, width, size)
    for side, whole in ((window.height, high), (window.width, wide)):
        assert side >= 1
        assert scales[0] * whole - 1.01 <= side <= max(1, scales[1] * whole + 1.01)
    again = crop.window(height, width, size, np.random.default_rng(seed))
    assert window == again


@given(height=SIDES, width=SIDES, size=SIZES)
def test_centre_windows(height, width, size):
    window = CentreCrop().window(height, width, size, np.random.default_rng(0))
    high, wide = full(height, width, size)
    assert abs(window.height - high) <= 1
    assert abs(window.width - wide) <= 1
    assert abs(window.top - (height - window.height - window.top)) <= 1
    assert abs(window.left - (width - window.width - window.left)) <= 1
    assert not window.flip


def test_every_place_and_both_reflections_are_drawn():
    rng = np.random.default_rng(0)
    windows = {RandomCrop(1.0, 1.0).window(5, 9, (5, 5), rng) for _ in range(400)}
    assert windows == {Window(0, left, 5, 5, flip) for left in range(5) for flip in (False, True)}
    windows = {RandomCrop(1.0, 1.0, flip=False).window(7, 5, (5, 5), rng) for _ in range(100)}
    assert windows == {Window(top, 0, 5, 5, False) for top in range(3)}


@given(height=SIDES, width=SIDES, size=SIZES, smallest=st.floats(0.05, 1))
def test_working_size_is_just_large_enough_for_the_smallest_window(height, width, size, smallest):
    high, wide = WorkingSize((size,), smallest)(height, width)
    assert 1 <= high <= height
    assert 1 <= wide <= width
    needed = [side * smallest for side in full(high, wide, size)]
    possible = [side * smallest for side in full(height, width, size)]
    if min(possible[0] - size[0], possible[1] - size[1]) < 0:
        assert (high, wide) == (height, width) or min(needed[0] - size[0], needed[1] - size[1]) < 2
        return
    assert needed[0] >= size[0] - 1
    assert needed[1] >= size[1] - 1
    # No more than that: one row and column less would not do, up to rounding.
    smaller = [side * smallest for side in full(max(1, high - 3), max(1, wide - 3), size)]
    assert high <= 4 or wide <= 4 or smaller[0] < size[0] + 1 or smaller[1] < size[1] + 1


def test_a_window_of_the_right_size_is_a_copy():
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3)).astype(np.uint8)
    shown = Window(2, 3, 5, 6).show(frames, (5, 6))
    assert (shown == frames[:, 2:7, 3:9]).all()
    assert not np.shares_memory(shown, frames)
    flipped = Window(2, 3, 5, 6, flip=True).show(frames, (5, 6))
    assert (flipped == frames[:, 2:7, 8:2:-1]).all()


def test_a_window_is_scaled_with_antialiasing():
    rows, columns = np.mgrid[:120, :160]
    wave = 127 + 100 * np.sin(rows / 17) * np.cos(columns / 13)
    frames = np.stack([wave, 255 - wave])[..., None].repeat(3, 3).astype(np.uint8)
    means = frames[:, 20:100, 40:140].reshape(2, 16, 5, 20, 5, 3).mean((2, 4))
    shown = Window(20, 40, 80, 100).show(frames, (16, 20))
    assert np.abs(shown - means).mean() < 1.5
    flipped = Window(20, 40, 80, 100, flip=True).show(frames, (16, 20))
    assert (flipped == shown[:, :, ::-1]).all()
    # A pattern too fine for the result becomes its mean and does not turn into another one.
    fine = np.where((rows + columns) % 2, 255, 0)[None, ..., None].repeat(3, 3).astype(np.uint8)
    assert np.abs(Window(0, 0, 120, 160).show(fine, (12, 16)).astype(int) - 127).max() < 3


@pytest.mark.parametrize("scales", [(0.0, 1.0), (0.6, 0.5), (0.5, 1.1), (-1.0, 1.0)])
def test_scales_that_cannot_be(scales):
    with pytest.raises(ValueError, match="smallest <= largest"):
        RandomCrop(*scales)


def test_geometry_that_cannot_be():
    for arguments in [((0, 4), 1), ((4, 4), 0), ((4, 4), 1, 0), ((4, 4), 1, 1, 0.0)]:
        with pytest.raises(ValueError, match=r"size|frames_per_block|blocks|fps"):
            Geometry(*arguments)
    assert Geometry((4, 6), 3, 5).frames == 15
