"""Patching, token order, transformers, tail-drop, ElasticTok, presets, weights in and out."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.models", "beartype.beartype")

from . import presets
from ._card import model_card
from ._cells import Cells
from ._coordinates import CoordDecoder, LatentCache
from ._decoder import AbstractDecoder, Decoder
from ._describe import ModelFileError, fingerprint
from ._elastictok import (
    Cache,
    ElasticTok,
    ElasticTokOutput,
    Reconstruction,
    trainable,
    with_compute_dtype,
)
from ._encoder import AbstractEncoder, Encoder
from ._execution import LOCAL, AbstractExecution, Local
from ._folder import load, load_shapes, push, save
from ._official import OFFICIAL_FSQ, OFFICIAL_VAE, OfficialConfig, file_sha256, load_official
from ._order import AbstractOrder, CoarseToFine, Raster
from ._patching import Patching
from ._place import PlaceEmbedding
from ._preset import Preset
from ._registers import RegisterDecoder, RegisterEncoder
from ._rope import AbstractRotary, CellRotary, RankRotary, rotary, rotate
from ._sample import Asked, PatchSample
from ._taildrop import (
    AbstractTailDrop,
    ConditionDropout,
    FixedDrop,
    InformationDrop,
    LogUniformDrop,
    PowerOfTwoDrop,
    UniformDrop,
    WithFull,
)
from ._transformer import (
    CrossTransformer,
    KVCache,
    Linear,
    RMSNorm,
    SwiGLU,
    Transformer,
    count_parameters,
)
from ._visibility import AbstractVisibility, EarlierBlocks, RecentBlocks

__all__ = [
    "LOCAL",
    "OFFICIAL_FSQ",
    "OFFICIAL_VAE",
    "AbstractDecoder",
    "AbstractEncoder",
    "AbstractExecution",
    "AbstractOrder",
    "AbstractRotary",
    "AbstractTailDrop",
    "AbstractVisibility",
    "Asked",
    "Cache",
    "CellRotary",
    "Cells",
    "CoarseToFine",
    "ConditionDropout",
    "CoordDecoder",
    "CrossTransformer",
    "Decoder",
    "EarlierBlocks",
    "ElasticTok",
    "ElasticTokOutput",
    "Encoder",
    "FixedDrop",
    "InformationDrop",
    "KVCache",
    "LatentCache",
    "Linear",
    "Local",
    "LogUniformDrop",
    "ModelFileError",
    "OfficialConfig",
    "PatchSample",
    "Patching",
    "PlaceEmbedding",
    "PowerOfTwoDrop",
    "Preset",
    "RMSNorm",
    "RankRotary",
    "Raster",
    "RecentBlocks",
    "Reconstruction",
    "RegisterDecoder",
    "RegisterEncoder",
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
