"""Block-causal attention: masks as data, one function, exchangeable backends."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.attention", "beartype.beartype")

from elastictok.attention._attention import attention
from elastictok.attention._backend import AbstractBackend
from elastictok.attention._cudnn import CuDNN
from elastictok.attention._masks import (
    AbstractMask,
    And,
    BlockCausal,
    Causal,
    Full,
    KeyValid,
    Segments,
    SlidingBlocks,
)
from elastictok.attention._pallas_tpu import PallasTPU
from elastictok.attention._reference import Reference
from elastictok.attention._registry import backends, register
from elastictok.attention._ring import AbstractLayout, Contiguous, Ring, ZigZag
from elastictok.attention._tile_sizes import (
    TPU_CHIPS,
    TileEntry,
    TileKey,
    TileSizes,
    TPUTileSizes,
    XLATileSizes,
    read_tiles,
    tile_sizes,
    write_tiles,
)
from elastictok.attention._tiled import AbstractTiled
from elastictok.attention._xla import XLA

__all__ = [
    "TPU_CHIPS",
    "XLA",
    "AbstractBackend",
    "AbstractLayout",
    "AbstractMask",
    "AbstractTiled",
    "And",
    "BlockCausal",
    "Causal",
    "Contiguous",
    "CuDNN",
    "Full",
    "KeyValid",
    "PallasTPU",
    "Reference",
    "Ring",
    "Segments",
    "SlidingBlocks",
    "TPUTileSizes",
    "TileEntry",
    "TileKey",
    "TileSizes",
    "XLATileSizes",
    "ZigZag",
    "attention",
    "backends",
    "read_tiles",
    "register",
    "tile_sizes",
    "write_tiles",
]
