"""Bits and code-book use against counts by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.eval import bits_per_pixel, bpp16, codebook_usage


def test_bits_per_pixel_counts_pixels_not_colours():
    assert bits_per_pixel(1024, 1, 64, 64) == 0.25
    assert bits_per_pixel(1024, 4, 64, 64) == 0.0625
    assert bits_per_pixel(None, 4, 64, 64) is None
    with pytest.raises(ValueError, match="no pixels"):
        bits_per_pixel(1, 0, 64, 64)


def test_bpp16_is_the_convention():
    # 17 frames of 256x256 as 1280 tokens of 64,000 codes.
    expected = 16 * 1280 * math.log2(64000) / (17 * 256 * 256)
    assert bpp16(1280, math.log2(64000), 17, 256, 256) == pytest.approx(expected)
    assert bpp16(10, None, 1, 8, 8) is None
    with pytest.raises(ValueError, match="not negative"):
        bpp16(-1, 1.0, 1, 8, 8)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(10, 1000),
)
def test_usage_is_a_count(codes, size):
    usage = codebook_usage(np.array(codes, np.int32), size)
    counts = Counter(codes)
    entropy = -sum(n / len(codes) * math.log2(n / len(codes)) for n in counts.values())
    assert usage.codebook_size == size
    assert usage.tokens == len(codes)
    (stream,) = usage.streams
    assert stream.used == len(counts)
    assert stream.share == pytest.approx(len(counts) / size)
    assert stream.perplexity == pytest.approx(2**entropy)
    assert 1 - 1e-9 <= stream.perplexity <= stream.used + 1e-9


def test_usage_by_hand_stream_by_stream():
    codes = np.array([[0, 5], [1, 5], [2, 5], [3, 7]], np.int32)
    usage = codebook_usage(codes, 8)
    assert usage.tokens == 4
    first, second = usage.streams
    assert (first.used, first.share, first.perplexity) == (4, 0.5, pytest.approx(4))
    # Entropy of (3/4, 1/4) is 0.8113 bits.
    assert (second.used, second.perplexity) == (2, pytest.approx(2**0.8112781, rel=1e-6))


def test_a_large_code_book_is_never_laid_out():
    usage = codebook_usage(np.array([0, 2**31 - 1], np.int64), 2**31)
    assert usage.streams[0].used == 2


@pytest.mark.parametrize("codes", [[-1, 0], [0, 8]])
def test_codes_outside_the_book_are_refused(codes):
    with pytest.raises(ValueError, match="outside the code book"):
        codebook_usage(np.array(codes, np.int32), 8)


def test_no_codes_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        codebook_usage(np.zeros(0, np.int32), 8)
