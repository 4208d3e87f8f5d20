"""Criteria for searches that are too particular for `elastictok.inference`."""

from typing import final

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, UInt8

from elastictok.inference import PSNR, AbstractCriterion, Criterion

from ._lpips import LPIPS
from ._metrics import ssim_gaussian


@final
class SSIMLoss(AbstractCriterion):
    """One minus the structural similarity of a block (`ssim_gaussian`, mean over its frames).

    **Arguments:**

    - `threshold`: 0.1 asks for a similarity of at least 0.9; from 0 to 2.

    Frames need at least 11 pixels a side.
    """

    threshold: float = eqx.field(converter=float)

    def __check_init__(self) -> None:
        if not 0 <= self.threshold <= 2:
            raise ValueError(
                f"SSIMLoss threshold is {self.threshold}; 1 - SSIM lies in 0..2: for an SSIM of at "
                "least 0.9 give 0.1"
            )

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "frames height width 3"],
    ) -> float:
        return 1.0 - ssim_gaussian(truth, reconstruction)


@final
class LPIPSLoss(AbstractCriterion):
    """The learned perceptual distance of a block (`LPIPS`, mean over its frames).

    **Arguments:**

    - `lpips`: from `load_lpips`.
    - `threshold`: 0 or more; 0.1 is a difference that is seen at a second look.
    """

    lpips: LPIPS
    threshold: float = eqx.field(converter=float)

    def __check_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(
                f"LPIPSLoss threshold is {self.threshold}; no distance is below 0: 0.1 is usual"
            )

    def __call__(
        self,
        truth: UInt8[np.ndarray, "frames height width 3"],
        reconstruction: UInt8[np.ndarray, "frames height width 3"],
    ) -> float:
        # Frame by frame: one compilation for any number of frames, and the memory of one.
        pairs = zip(truth, reconstruction, strict=True)
        return float(np.mean([float(_distance(self.lpips, *pair)) for pair in pairs]))


@eqx.filter_jit
def _distance(
    lpips: LPIPS, a: UInt8[Array, "height width 3"], b: UInt8[Array, "height width 3"]
) -> Float[Array, ""]:
    return lpips(a / 127.5 - 1.0, b / 127.5 - 1.0)


def loss_name(criterion: AbstractCriterion) -> str:
    """A name for what a criterion measures."""
    if isinstance(criterion, Criterion):
        return getattr(criterion.function, "__name__", type(criterion.function).__name__)
    return type(criterion).__name__


def requirement(criterion: AbstractCriterion) -> str:
    """What a criterion asks for, in words: `MSE ≤ 0.02`, `PSNR ≥ 30 dB`, `SSIM ≥ 0.9`."""
    if isinstance(criterion, PSNR):
        return f"PSNR ≥ {-criterion.threshold:g} dB"
    if isinstance(criterion, SSIMLoss):
        return f"SSIM ≥ {1 - criterion.threshold:g}"
    if isinstance(criterion, LPIPSLoss):
        return f"LPIPS ≤ {criterion.threshold:g}"
    return f"{loss_name(criterion)} ≤ {criterion.threshold:g}"
