"""Losses, optimizers, one compiled training step, the loop, checkpoints and trackers."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.train", "beartype.beartype")

from ._checkpoints import latest_step
from ._devices import CompiledStep, data_mesh
from ._errors import (
    CheckpointError,
    DataError,
    NonFiniteError,
    RecompilationError,
    RunFolderError,
)
from ._fit import default_optimizer, default_quantizer_weight, fit
from ._losses import L1, MSE, AbstractLoss, mean_over_valid
from ._optimizers import Constant, Cosine, adamw, matrices, muon
from ._step import DeviceBatch, TrainState, init_state, train_step
from ._trackers import AbstractTracker, TensorBoard, WeightsAndBiases

__all__ = [
    "L1",
    "MSE",
    "AbstractLoss",
    "AbstractTracker",
    "CheckpointError",
    "CompiledStep",
    "Constant",
    "Cosine",
    "DataError",
    "DeviceBatch",
    "NonFiniteError",
    "RecompilationError",
    "RunFolderError",
    "TensorBoard",
    "TrainState",
    "WeightsAndBiases",
    "adamw",
    "data_mesh",
    "default_optimizer",
    "default_quantizer_weight",
    "fit",
    "init_state",
    "latest_step",
    "matrices",
    "mean_over_valid",
    "muon",
    "train_step",
]
