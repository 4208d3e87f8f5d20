"""How far a reconstruction is from the truth: NumPy, float64, every variant named.

Two kinds of pixel are understood: `uint8`, where 0..255 stands for [-1, 1], and floats, which are
in [-1, 1] already. Errors are in those units, so the range is 2 and PSNR = 10 log10(4 / MSE).
"""

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

Pixels: TypeAlias = (
    UInt8[np.ndarray, "frames height width channels"]
    | Float[np.ndarray, "frames height width channels"]
)

# In a sequence, sizes may differ from one to the next.
AnyPixels: TypeAlias = UInt8[np.ndarray, "_ _ _ _"] | Float[np.ndarray, "_ _ _ _"]

# Wang, Bovik, Sheikh and Simoncelli 2004, section III.B, as scikit-image has it.
_K1, _K2 = 0.01, 0.03
_SSIM_RANGE = 255.0
_GAUSSIAN_RADIUS, _GAUSSIAN_SIGMA = 5, 1.5
_UNIFORM_SIZE = 7


def _as_unit(pixels: np.ndarray) -> np.ndarray:
    """The pixels as float64 in [-1, 1]."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float64) / 127.5 - 1.0
    if np.issubdtype(pixels.dtype, np.floating):
        return pixels.astype(np.float64)
    raise TypeError(
        f"pixels are uint8 (0..255) or floats in [-1, 1], not {pixels.dtype}: convert them first"
    )


def _check(truth: np.ndarray, reconstruction: np.ndarray) -> None:
    if truth.shape != reconstruction.shape:
        raise ValueError(
            f"truth is {truth.shape} and reconstruction {reconstruction.shape} (frames, height, "
            "width, channels): resize or crop one to the other before measuring"
        )
    if truth.ndim != 4 or truth.size == 0:
        raise ValueError(
            f"expected [frames height width channels] with at least one pixel, got {truth.shape}; "
            "give a single picture as picture[None]"
        )


def mse_per_frame(truth: Pixels, reconstruction: Pixels) -> Float[np.ndarray, "frames"]:
    """Mean squared error of each frame, over its pixels and channels, in units of [-1, 1] squared.

    **Arguments:**

    - `truth`, `reconstruction`: `[frames height width channels]`, `uint8` or floats in [-1, 1].

    **Returns:**

    One float64 per frame.

    **Raises:**

    `ValueError` if the shapes differ, `TypeError` for any other type of number.
    """
    _check(truth, reconstruction)
    # Frame by frame, so that a long clip is never held in float64.
    pairs = zip(truth, reconstruction, strict=True)
    return np.array([np.mean(np.square(_as_unit(a) - _as_unit(b))) for a, b in pairs])


def mse(truth: Pixels, reconstruction: Pixels) -> float:
    """Mean squared error over all frames, pixels and channels, in units of [-1, 1] squared."""
    return float(np.mean(mse_per_frame(truth, reconstruction)))


def psnr(mean_squared_error: float | int) -> float:
    """PSNR in dB of a mean squared error in [-1, 1] pixels: `10 log10(4 / MSE)`; infinite for 0."""
    if mean_squared_error < 0:
        raise ValueError(f"a mean squared error is not negative, got {mean_squared_error}")
    if mean_squared_error == 0:
        return float("inf")
    return float(10.0 * np.log10(4.0 / mean_squared_error))


def psnr_per_frame(truth: Pixels, reconstruction: Pixels) -> Float[np.ndarray, "frames"]:
    """PSNR of each frame in dB, infinite where a frame is exact.

    The *per-frame* variant of a clip is the mean of these: decibels are averaged. By convexity it
    is at least the clip's `psnr_per_clip`.
    """
    return np.array([psnr(float(error)) for error in mse_per_frame(truth, reconstruction)])


def psnr_per_clip(truth: Pixels, reconstruction: Pixels) -> float:
    """PSNR of a clip in dB: the squared error is averaged over the whole clip, then turned into dB.

    Over several clips, this variant is the mean of the clips' PSNRs.
    """
    return psnr(mse(truth, reconstruction))


def psnr_dataset(pairs: Iterable[tuple[AnyPixels, AnyPixels]]) -> float:
    """PSNR of a data set in dB: all squared errors are pooled, then turned into dB once.

    Every pixel counts the same, so large or long items weigh more. Of the three variants it is the
    one that a single bad item pulls down most.

    **Arguments:**

    - `pairs`: `(truth, reconstruction)`, sizes may differ from pair to pair.

    **Raises:**

    `ValueError` if there is no pair.
    """
    total, count = 0.0, 0
    for truth, reconstruction in pairs:
        total += mse(truth, reconstruction) * truth.size
        count += truth.size
    if count == 0:
        raise ValueError("the PSNR of an empty data set is not defined: give at least one pair")
    return psnr(total / count)


def _filter_rows(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of `len(weights)` neighbours along the first axis, whole windows only."""
    length = image.shape[0] - len(weights) + 1
    out = np.zeros((length, *image.shape[1:]))
    for start, weight in enumerate(weights):
        out += weight * image[start : start + length]
    return out


def _valid_filter(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Filter `image [height width channels]` along height and width, whole windows only."""
    rows = _filter_rows(image, weights)
    return np.swapaxes(_filter_rows(np.swapaxes(rows, 0, 1), weights), 0, 1)


def _ssim_frame(
    truth: np.ndarray, reconstruction: np.ndarray, weights: np.ndarray, covariance_norm: float
) -> float:
    """Mean over channels and whole windows of the index of Wang et al. 2004, equation 13."""
    x = (_as_unit(truth) + 1.0) * 127.5
    y = (_as_unit(reconstruction) + 1.0) * 127.5
    mean_x, mean_y = _valid_filter(x, weights), _valid_filter(y, weights)
    var_x = covariance_norm * (_valid_filter(x * x, weights) - mean_x * mean_x)
    var_y = covariance_norm * (_valid_filter(y * y, weights) - mean_y * mean_y)
    covariance = covariance_norm * (_valid_filter(x * y, weights) - mean_x * mean_y)
    c1, c2 = (_K1 * _SSIM_RANGE) ** 2, (_K2 * _SSIM_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def _ssim_per_frame(
    truth: np.ndarray,
    reconstruction: np.ndarray,
    name: str,
    weights: np.ndarray,
    covariance_norm: float,
) -> np.ndarray:
    _check(truth, reconstruction)
    smallest = min(truth.shape[1:3])
    if smallest < len(weights):
        raise ValueError(
            f"{name} needs pictures of at least {len(weights)}x{len(weights)} pixels, got "
            f"{truth.shape[1]}x{truth.shape[2]}: not one whole window fits"
        )
    pairs = zip(truth, reconstruction, strict=True)
    return np.array([_ssim_frame(a, b, weights, covariance_norm) for a, b in pairs])


def ssim_gaussian_per_frame(truth: Pixels, reconstruction: Pixels) -> Float[np.ndarray, "frames"]:
    """Structural similarity of each frame with the 11x11 Gaussian window of sigma 1.5.

    The variant of Wang, Bovik, Sheikh and Simoncelli (2004), and that of most papers; equal to
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255)`. Computed per channel on the 0..255 scale (floats
    in [-1, 1] are brought there: the index depends on the offset), averaged over the channels and
    over all positions where the whole window lies inside the frame.

    **Arguments:**

    - `truth`, `reconstruction`: `[frames height width channels]`, `uint8` or floats in [-1, 1].

    **Returns:**

    One float64 per frame, at most 1.

    **Raises:**

    `ValueError` if the shapes differ or a side is shorter than 11 pixels.
    """
    offsets = np.arange(-_GAUSSIAN_RADIUS, _GAUSSIAN_RADIUS + 1)
    weights = np.exp(-0.5 * np.square(offsets / _GAUSSIAN_SIGMA))
    return _ssim_per_frame(
        truth, reconstruction, "ssim_gaussian", weights / weights.sum(), covariance_norm=1.0
    )


def ssim_uniform_per_frame(truth: Pixels, reconstruction: Pixels) -> Float[np.ndarray, "frames"]:
    """Structural similarity of each frame with a 7x7 uniform window and sample covariance.

    Equal to scikit-image's `structural_similarity(data_range=255)` with its default settings, under
    which numbers of many repositories were computed. Everything else as `ssim_gaussian_per_frame`;
    the shortest side allowed is 7 pixels.
    """
    window = _UNIFORM_SIZE**2
    weights = np.full(_UNIFORM_SIZE, 1.0 / _UNIFORM_SIZE)
    return _ssim_per_frame(
        truth, reconstruction, "ssim_uniform", weights, covariance_norm=window / (window - 1)
    )


def ssim_gaussian(truth: Pixels, reconstruction: Pixels) -> float:
    """Mean over the frames of `ssim_gaussian_per_frame`."""
    return float(np.mean(ssim_gaussian_per_frame(truth, reconstruction)))


def ssim_uniform(truth: Pixels, reconstruction: Pixels) -> float:
    """Mean over the frames of `ssim_uniform_per_frame`."""
    return float(np.mean(ssim_uniform_per_frame(truth, reconstruction)))
