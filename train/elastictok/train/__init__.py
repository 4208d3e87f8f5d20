"""Losses, optimizers, one compiled training step, the loop, checkpoints and trackers."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.train", "beartype.beartype")

from ._checkpoints import latest_step
from ._chips import CHIPS, Chip
from ._devices import CompiledStep
from ._errors import (
    CheckpointError,
    DataError,
    NonFiniteError,
    RecompilationError,
    RunFolderError,
)
from ._fit import Stage, default_optimizer, default_quantizer_weight, fit, fit_stages
from ._losses import L1, MSE, AbstractLoss, Sum, mean_over_valid
from ._optimizers import Constant, Cosine, adamw, matrices, muon
from ._perceptual import Perceptual
from ._pictures import Pictures
from ._plan import Plan, blocks_of, plan, topology_devices
from ._scorer import ScoreTarget, fit_scorer, score_targets
from ._sharding import (
    RULES,
    OneDevice,
    Sharded,
    data_mesh,
    data_share,
    gather,
    init_sharded,
    make_mesh,
    parse_mesh,
    shardings,
)
from ._step import Average, DeviceBatch, TrainState, init_state, train_step
from ._trackers import AbstractTracker, TensorBoard, WeightsAndBiases
from ._validation import Validation

__all__ = [
    "CHIPS",
    "L1",
    "MSE",
    "RULES",
    "AbstractLoss",
    "AbstractTracker",
    "Average",
    "CheckpointError",
    "Chip",
    "CompiledStep",
    "Constant",
    "Cosine",
    "DataError",
    "DeviceBatch",
    "NonFiniteError",
    "OneDevice",
    "Perceptual",
    "Pictures",
    "Plan",
    "RecompilationError",
    "RunFolderError",
    "ScoreTarget",
    "Sharded",
    "Stage",
    "Sum",
    "TensorBoard",
    "TrainState",
    "Validation",
    "WeightsAndBiases",
    "adamw",
    "blocks_of",
    "data_mesh",
    "data_share",
    "default_optimizer",
    "default_quantizer_weight",
    "fit",
    "fit_scorer",
    "fit_stages",
    "gather",
    "init_sharded",
    "init_state",
    "latest_step",
    "make_mesh",
    "matrices",
    "mean_over_valid",
    "muon",
    "parse_mesh",
    "plan",
    "score_targets",
    "shardings",
    "topology_devices",
    "train_step",
]
