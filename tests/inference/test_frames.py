"""Fitting any 8-bit frames, against loops over pixels."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from elastictok.inference._frames import fitted_size, multiple, pad, resize, to_rgb


@given(npst.arrays(np.uint8, st.tuples(*[st.integers(1, 2)] * 3, st.integers(1, 4))))
def test_to_rgb(frames):
    out = to_rgb(frames)
    assert out.shape == (*frames.shape[:3], 3)
    assert out.dtype == np.uint8
    for index in np.ndindex(frames.shape[:3]):
        pixel = frames[index].tolist()
        alpha = Fraction(pixel.pop(), 255) if len(pixel) in (2, 4) else Fraction(1)
        pixel = pixel * 3 if len(pixel) == 1 else pixel
        for got, value in zip(out[index].tolist(), pixel, strict=True):
            exact = value * alpha + 255 * (1 - alpha)
            assert abs(got - exact) <= Fraction(1, 2)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 512))
def test_fitted_size(height, width, short):
    fitted = fitted_size(height, width, short)
    assert min(fitted) == short
    assert fitted_size(width, height, short) == fitted[::-1]
    exact = Fraction(max(height, width) * short, min(height, width))
    assert abs(max(fitted) - exact) <= Fraction(1, 2)
    assert fitted_size(*fitted, short) == fitted


def test_resize_averages_when_it_shrinks():
    stripes = np.zeros((2, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    out = resize(stripes, 8, 8)
    assert out.shape == (2, 8, 8, 3)
    assert np.all(np.abs(out.astype(int) - 127) < 12)


def test_resize_is_pillow_per_frame_and_nothing_at_the_same_size():
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 3), np.uint8)
    assert resize(frames, 9, 12) is frames
    for frame, got in zip(frames, resize(frames, 6, 8), strict=True):
        wanted = Image.fromarray(frame).resize((8, 6), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(got, np.asarray(wanted))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.tuples(*[st.integers(0, 3)] * 3))
def test_pad(count, height, width, extra):
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    size = (count + extra[0], height + extra[1], width + extra[2])
    out = pad(frames, *size)
    assert out.shape == (*size, 3)
    for f, y, x in np.ndindex(size):
        source = frames[min(f, count - 1), min(y, height - 1), min(x, width - 1)]
        assert np.array_equal(out[f, y, x], source)


@given(st.integers(1, 100), st.integers(1, 20))
def test_multiple(value, divisor):
    out = multiple(value, divisor)
    assert out % divisor == 0
    assert 0 <= out - value < divisor
