"""Patching, token order, transformers, tail-drop, ElasticTok, presets, weights in and out."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.models", "beartype.beartype")

from . import presets
from ._card import model_card
from ._cells import Cells
from ._describe import ModelFileError, fingerprint
from ._elastictok import (
    Cache,
    Decoder,
    ElasticTok,
    ElasticTokOutput,
    Encoder,
    trainable,
    with_compute_dtype,
)
from ._execution import LOCAL, AbstractExecution, Local
from ._folder import load, load_shapes, push, save
from ._official import OFFICIAL_FSQ, OFFICIAL_VAE, OfficialConfig, file_sha256, load_official
from ._order import AbstractOrder, CoarseToFine, Raster
from ._patching import Patching
from ._place import PlaceEmbedding
from ._preset import Preset
from ._rope import AbstractRotary, CellRotary, RankRotary, rotary, rotate
from ._taildrop import (
    AbstractTailDrop,
    ConditionDropout,
    FixedDrop,
    LogUniformDrop,
    UniformDrop,
    WithFull,
)
from ._transformer import KVCache, Linear, RMSNorm, SwiGLU, Transformer, count_parameters

__all__ = [
    "LOCAL",
    "OFFICIAL_FSQ",
    "OFFICIAL_VAE",
    "AbstractExecution",
    "AbstractOrder",
    "AbstractRotary",
    "AbstractTailDrop",
    "Cache",
    "CellRotary",
    "Cells",
    "CoarseToFine",
    "ConditionDropout",
    "Decoder",
    "ElasticTok",
    "ElasticTokOutput",
    "Encoder",
    "FixedDrop",
    "KVCache",
    "Linear",
    "Local",
    "LogUniformDrop",
    "ModelFileError",
    "OfficialConfig",
    "Patching",
    "PlaceEmbedding",
    "Preset",
    "RMSNorm",
    "RankRotary",
    "Raster",
    "SwiGLU",
    "Transformer",
    "UniformDrop",
    "WithFull",
    "count_parameters",
    "file_sha256",
    "fingerprint",
    "load",
    "load_official",
    "load_shapes",
    "model_card",
    "presets",
    "push",
    "rotary",
    "rotate",
    "save",
    "trainable",
    "with_compute_dtype",
]
