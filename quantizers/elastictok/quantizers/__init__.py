"""Bottlenecks of a tokenizer behind one abstract class: FSQ, Gaussian VAE, VQ, LFQ, residual."""

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
from ._fsq import FSQ, UniformGrid
from ._lfq import LFQ, LFQStatistics
from ._residual import Residual
from ._vae import GaussianVAE
from ._vq import VQ, VQStatistics

__all__ = [
    "FSQ",
    "LFQ",
    "VQ",
    "AbstractDiscreteQuantizer",
    "AbstractQuantizer",
    "GaussianVAE",
    "LFQStatistics",
    "QuantizerOutput",
    "Residual",
    "UniformGrid",
    "VQStatistics",
    "keep_rows",
    "straight_through",
]
