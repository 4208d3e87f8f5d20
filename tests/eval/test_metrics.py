"""Metrics against scikit-image and against loops written out here."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import (
    mean_squared_error,
    peak_signal_noise_ratio,
    structural_similarity,
)

from elastictok.eval import (
    SSIMLoss,
    mse,
    mse_per_frame,
    psnr,
    psnr_dataset,
    psnr_per_clip,
    psnr_per_frame,
    requirement,
    ssim_gaussian,
    ssim_gaussian_per_frame,
    ssim_uniform,
    ssim_uniform_per_frame,
)
from elastictok.inference import L1, MSE, PSNR, Criterion


@st.composite
def pairs(draw, smallest: int = 1, largest: int = 20):
    """A clip and another of its shape: random, nearly equal, flat, or saturated."""
    shape = (
        draw(st.integers(1, 3)),
        draw(st.integers(smallest, largest)),
        draw(st.integers(smallest, largest)),
        draw(st.sampled_from([1, 3])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    truth = rng.integers(0, 256, shape, dtype=np.uint8)
    kind = draw(st.sampled_from(["random", "near", "flat", "saturated", "equal"]))
    if kind == "random":
        return truth, rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "near":
        noise = rng.integers(-3, 4, shape)
        return truth, np.clip(truth + noise, 0, 255).astype(np.uint8)
    if kind == "flat":
        return np.full_like(truth, 7), np.full_like(truth, 250)
    if kind == "saturated":
        return np.where(truth > 127, np.uint8(255), np.uint8(0)), truth
    return truth, truth.copy()


def unit(pixels):
    return (pixels / 127.5 - 1).astype(np.float32)


@given(pairs())
def test_mse_is_that_of_a_loop_over_pixels(pair):
    truth, other = pair
    frames = []
    for a, b in zip(truth, other, strict=True):
        errors = [
            (float(x) / 127.5 - float(y) / 127.5) ** 2 for x, y in zip(a.flat, b.flat, strict=True)
        ]
        frames.append(sum(errors) / len(errors))
    np.testing.assert_allclose(mse_per_frame(truth, other), frames, rtol=1e-12, atol=1e-15)
    assert mse(truth, other) == pytest.approx(sum(frames) / len(frames), rel=1e-12, abs=1e-15)


@given(pairs())
def test_mse_and_psnr_are_those_of_scikit_image_on_uint8(pair):
    truth, other = pair
    assert mse(truth, other) == pytest.approx(
        mean_squared_error(truth, other) * (2 / 255) ** 2, rel=1e-9, abs=1e-15
    )
    if not np.array_equal(truth, other):
        expected = peak_signal_noise_ratio(truth, other, data_range=255)
        assert psnr_per_clip(truth, other) == pytest.approx(expected, abs=1e-9)


@given(pairs(smallest=11))
def test_floats_are_the_same_pixels(pair):
    truth, other = pair
    floats = unit(truth), unit(other)
    assert mse(*floats) == pytest.approx(mse(truth, other), rel=1e-4, abs=1e-12)
    for metric in (ssim_gaussian, ssim_uniform):
        assert metric(*floats) == pytest.approx(metric(truth, other), abs=1e-4)
        assert metric(truth, floats[1]) == pytest.approx(metric(truth, other), abs=1e-4)


@given(pairs(smallest=11))
def test_ssim_gaussian_is_scikit_images(pair):
    truth, other = pair
    expected = [
        structural_similarity(
            a,
            b,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(truth, other, strict=True)
    ]
    np.testing.assert_allclose(ssim_gaussian_per_frame(truth, other), expected, atol=1e-6)
    assert ssim_gaussian(truth, other) == pytest.approx(np.mean(expected), abs=1e-6)


@given(pairs(smallest=7))
def test_ssim_uniform_is_scikit_images_default(pair):
    truth, other = pair
    expected = [
        structural_similarity(a, b, channel_axis=-1) for a, b in zip(truth, other, strict=True)
    ]
    np.testing.assert_allclose(ssim_uniform_per_frame(truth, other), expected, atol=1e-6)
    assert ssim_uniform(truth, other) == pytest.approx(np.mean(expected), abs=1e-6)


@given(pairs(smallest=11))
def test_ssim_is_symmetric_and_one_for_equal_pictures(pair):
    truth, other = pair
    assert ssim_gaussian(truth, other) == pytest.approx(ssim_gaussian(other, truth), abs=1e-9)
    assert ssim_gaussian(truth, truth) == pytest.approx(1, abs=1e-9)
    assert ssim_uniform(truth, truth) == pytest.approx(1, abs=1e-9)


def clip(*errors):
    """A black clip, and one that is off by so many grey levels in each frame."""
    truth = np.zeros((len(errors), 2, 2, 3), np.uint8)
    other = np.stack([np.full((2, 2, 3), error, np.uint8) for error in errors])
    return truth, other


def decibels(*squares):
    """10 log10(255^2 / mean), the way a paper writes it."""
    return 10 * math.log10(255**2 / (sum(squares) / len(squares)))


def test_the_three_psnrs_differ_and_are_what_they_are_called():
    first, second = clip(10, 50), clip(100)
    per_frame = np.concatenate([psnr_per_frame(*first), psnr_per_frame(*second)])
    np.testing.assert_allclose(per_frame, [decibels(100), decibels(2500), decibels(10000)])
    per_clip = [psnr_per_clip(*first), psnr_per_clip(*second)]
    np.testing.assert_allclose(per_clip, [decibels(100, 2500), decibels(10000)])
    whole = psnr_dataset([first, second])
    assert whole == pytest.approx(decibels(100, 2500, 10000))
    assert per_frame.mean() > np.mean(per_clip) > whole


def test_the_data_set_counts_pixels_not_items():
    small = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 10, np.uint8)
    large = np.zeros((1, 4, 6, 3), np.uint8), np.full((1, 4, 6, 3), 20, np.uint8)
    expected = decibels(*[100] * 12, *[400] * 72)
    # Several times: run-time types look at one item of a list, a random one.
    for _ in range(5):
        assert psnr_dataset([small, large]) == pytest.approx(expected)
    assert psnr_dataset(iter([small, large])) == pytest.approx(expected)


@given(pairs())
def test_averaging_decibels_never_gives_less_than_the_clip(pair):
    truth, other = pair
    assert psnr_per_frame(truth, other).mean() >= psnr_per_clip(truth, other) - 1e-9


def test_psnr_values():
    assert psnr(4) == 0
    assert psnr(0.015) == pytest.approx(24.26, abs=0.01)
    assert psnr(0.001) == pytest.approx(36.02, abs=0.01)
    assert psnr(0) == math.inf
    with pytest.raises(ValueError, match="not negative"):
        psnr(-0.1)
    with pytest.raises(ValueError, match="at least one pair"):
        psnr_dataset([])


def test_wrong_input_says_what_is_wrong():
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="not one whole window fits"):
        ssim_gaussian(picture[:, :10], picture[:, :10])
    with pytest.raises(ValueError, match=r"at least 7x7 pixels, got 16x6"):
        ssim_uniform(picture[:, :, :6], picture[:, :, :6])
    assert ssim_gaussian(picture[:, :11, :11], picture[:, :11, :11]) == pytest.approx(1)
    assert ssim_uniform(picture[:, :7, :7], picture[:, :7, :7]) == pytest.approx(1)


def test_ssim_as_a_criterion():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    near = np.clip(truth + rng.integers(-9, 10, truth.shape), 0, 255).astype(np.uint8)
    criterion = SSIMLoss(0.1)
    assert criterion.threshold == 0.1
    assert criterion(truth, truth) == pytest.approx(0, abs=1e-9)
    assert criterion(truth, near) == pytest.approx(1 - ssim_gaussian(truth, near))
    assert 0 < criterion(truth, near) < criterion(truth, 255 - truth)
    assert criterion.meets(criterion(truth, near))
    assert not criterion.meets(criterion(truth, 255 - truth))
    for threshold in (-0.1, 2.1, math.nan):
        with pytest.raises(ValueError, match=r"lies in 0\.\.2"):
            SSIMLoss(threshold)


def test_requirements_in_words():
    assert requirement(MSE(0.003)) == "MSE ≤ 0.003"
    assert requirement(L1(0.1)) == "L1 ≤ 0.1"
    assert requirement(PSNR(30)) == "PSNR ≥ 30 dB"
    assert requirement(SSIMLoss(0.1)) == "SSIM ≥ 0.9"
    assert requirement(Criterion(mse, 0.5)) == "mse ≤ 0.5"
