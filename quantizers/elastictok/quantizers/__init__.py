"""Bottlenecks of a tokenizer behind one abstract class: scalar, binary and vector quantizers, ways
to combine them, and continuous ones.
"""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.quantizers", "beartype.beartype")

from ._base import (
    AbstractDiscreteQuantizer,
    AbstractQuantizer,
    QuantizerOutput,
    keep_rows,
    straight_through,
)
from ._bits import LFQStatistics
from ._bsq import BSQ
from ._estimators import AbstractEstimator, RotationTrick, StraightThrough
from ._fsq import FSQ, UniformGrid
from ._grouped import Grouped
from ._identity import Identity
from ._lfq import LFQ
from ._projected import Projected
from ._residual import Residual
from ._simvq import SimVQ
from ._vae import GaussianVAE
from ._vq import VQ, AbstractBook, Gradient, KMeansStart, MovingAverage, VQStatistics

__all__ = [
    "BSQ",
    "FSQ",
    "LFQ",
    "VQ",
    "AbstractBook",
    "AbstractDiscreteQuantizer",
    "AbstractEstimator",
    "AbstractQuantizer",
    "GaussianVAE",
    "Gradient",
    "Grouped",
    "Identity",
    "KMeansStart",
    "LFQStatistics",
    "MovingAverage",
    "Projected",
    "QuantizerOutput",
    "Residual",
    "RotationTrick",
    "SimVQ",
    "StraightThrough",
    "UniformGrid",
    "VQStatistics",
    "keep_rows",
    "straight_through",
]
