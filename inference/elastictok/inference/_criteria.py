"""What "good enough" means for a block: a loss on its pixels, lower is better, and a threshold."""

import abc
import math
from collections.abc import Callable
from typing import final

import equinox as eqx
import numpy as np
from jaxtyping import Float64, UInt8

# 8-bit values are 127.5 to a unit of the range [-1, 1], which is what networks see.
_PER_UNIT = 127.5


class AbstractCriterion(eqx.Module):
    """A loss and the threshold that it has to meet.

    Calling it compares a block's pixels with their reconstruction, both NumPy
    `u8[frames height width 3]` without padding, and gives a float, lower is better. It runs on the
    host, so any code will do.
    """

    threshold: eqx.AbstractVar[float]

    @abc.abstractmethod
    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "_ _ _ 3"],
    ) -> float:
        """The loss of a reconstruction."""

    def meets(self, loss: float) -> bool:
        """Whether a loss is good enough.

        NaN and plus infinity never are, whatever the threshold. Minus infinity, the `PSNR` loss of
        a perfect reconstruction, is.
        """
        return bool(loss <= self.threshold and loss < math.inf)


@final
class MSE(AbstractCriterion):
    """Mean squared error of pixels in [-1, 1], over the whole block (arXiv 2410.08368, table 1).

    **Arguments:**

    - `threshold`: 0.001 looks near perfect, 0.015 rough; `math.inf` asks for nothing.
    """

    threshold: float = eqx.field(converter=float)

    def __check_init__(self) -> None:
        _check_error_threshold("MSE", self.threshold)

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "_ _ _ 3"],
    ) -> float:
        return float(np.mean(np.square(_difference(truth, reconstruction))))


@final
class L1(AbstractCriterion):
    """Mean absolute error of pixels in [-1, 1], over the whole block.

    **Arguments:**

    - `threshold`: in units of [-1, 1]; `math.inf` asks for nothing.
    """

    threshold: float = eqx.field(converter=float)

    def __check_init__(self) -> None:
        _check_error_threshold("L1", self.threshold)

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "_ _ _ 3"],
    ) -> float:
        return float(np.mean(np.abs(_difference(truth, reconstruction))))


@final
class PSNR(AbstractCriterion):
    """At least so many decibels of peak signal-to-noise ratio over the block.

    The loss is minus the ratio, so that lower is better: `10 log10(MSE / 4)` on pixels in [-1, 1],
    minus infinity for a perfect reconstruction; `threshold` is `-decibels`. (MSE is averaged over
    the block's frames before the logarithm.)
    """

    threshold: float

    def __init__(self, decibels: float | int):
        """**Arguments:**

        - `decibels`: 24.3 dB is an MSE of 0.015, 36 dB one of 0.001.
        """
        if math.isnan(decibels):
            raise ValueError("PSNR of nan dB can never be met; give a number such as 30.0")
        self.threshold = -float(decibels)

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "_ _ _ 3"],
    ) -> float:
        mse = float(np.mean(np.square(_difference(truth, reconstruction))))
        return 10 * math.log10(mse / 4) if mse > 0 else -math.inf


@final
class Criterion(AbstractCriterion):
    """Any function of (truth, reconstruction) as a criterion.

    **Arguments:**

    - `function`: takes two `u8[frames height width 3]` arrays, gives a number, lower is better.
    - `threshold`: what the number may be at most.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    threshold: float = eqx.field(converter=float)

    def __check_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("a threshold of nan can never be met; give a number")

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "_ _ _ 3"],
    ) -> float:
        return float(self.function(truth, reconstruction))


def _difference(
    truth: np.ndarray, reconstruction: np.ndarray
) -> Float64[np.ndarray, "frames height width 3"]:
    if truth.shape != reconstruction.shape:
        raise ValueError(
            f"truth has shape {truth.shape} and the reconstruction {reconstruction.shape}; "
            "compare a decoded clip with Tokenizer.fit(frames), not with the frames before fitting"
        )
    return (truth.astype(np.float64) - reconstruction.astype(np.float64)) / _PER_UNIT


def _check_error_threshold(name: str, threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(
            f"{name} threshold is {threshold}; no error is that small: give 0 or more, in units of "
            "pixels in [-1, 1] (0.003 is usual)"
        )
