"""Criteria against plain Python arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from elastictok.inference import L1, MSE, PSNR, AbstractCriterion, Criterion

PIXELS = npst.arrays(np.uint8, (1, 2, 2, 3))


def differences(truth, reconstruction):
    """In units of [-1, 1], without NumPy arithmetic on 8-bit numbers."""
    pairs = zip(truth.reshape(-1).tolist(), reconstruction.reshape(-1).tolist(), strict=True)
    return [(a / 127.5 - 1) - (b / 127.5 - 1) for a, b in pairs]


@given(PIXELS, PIXELS)
def test_losses(truth, reconstruction):
    d = differences(truth, reconstruction)
    mse = math.fsum(x * x for x in d) / len(d)
    assert MSE(1)(truth, reconstruction) == pytest.approx(mse, rel=1e-12, abs=1e-12)
    l1 = math.fsum(abs(x) for x in d) / len(d)
    assert L1(1)(truth, reconstruction) == pytest.approx(l1, rel=1e-12, abs=1e-12)
    psnr = 10 * math.log10(4 / mse) if mse > 1e-12 else math.inf
    assert PSNR(30)(truth, reconstruction) == pytest.approx(-psnr, rel=1e-9)


def test_extremes():
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert MSE(1)(black, white) == 4
    assert L1(1)(white, black) == 2
    assert PSNR(1)(white, black) == 0
    assert PSNR(99)(white, white) == -math.inf
    assert PSNR(99).meets(-math.inf)


@given(st.floats(0, 10), st.floats())
def test_meets(threshold, loss):
    for criterion in (MSE(threshold), L1(threshold), Criterion(lambda a, b: 0.0, threshold)):
        expected = not math.isnan(loss) and loss < math.inf and loss <= threshold
        assert criterion.meets(loss) is expected


@pytest.mark.parametrize("criterion", [MSE(math.inf), L1(math.inf), PSNR(-math.inf)])
def test_nothing_meets_when_not_a_number(criterion):
    assert criterion.meets(1e300)
    assert not criterion.meets(math.nan)
    assert not criterion.meets(math.inf)


def test_psnr_threshold_is_a_loss():
    truth = np.full((1, 2, 2, 3), 100, np.uint8)
    off_by_one = truth + np.uint8(1)
    decibels = 10 * math.log10(4 * 127.5**2)
    assert PSNR(decibels - 0.01).meets(PSNR(0)(truth, off_by_one))
    assert not PSNR(decibels + 0.01).meets(PSNR(0)(truth, off_by_one))


def test_any_callable():
    worst = Criterion(lambda a, b: np.abs(a.astype(int) - b).max(), 3)
    assert isinstance(worst, AbstractCriterion)
    a = np.zeros((1, 2, 2, 3), np.uint8)
    loss = worst(a, a + np.uint8(4))
    assert loss == 4.0
    assert type(loss) is float
    assert not worst.meets(loss)


@pytest.mark.parametrize("make", [MSE, L1, lambda x: Criterion(max, x), PSNR])
def test_nan_threshold(make):
    with pytest.raises(ValueError, match="nan"):
        make(math.nan)


@pytest.mark.parametrize("make", [MSE, L1])
def test_negative_threshold(make):
    with pytest.raises(ValueError, match=r"-0\.1"):
        make(-0.1)


def test_frames_that_were_not_fitted():
    with pytest.raises(ValueError, match="fit"):
        MSE(1)(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))
