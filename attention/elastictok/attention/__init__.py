"""Block-causal attention: masks as data, one function, exchangeable backends."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.attention", "beartype.beartype")

from elastictok.attention._attention import attention
from elastictok.attention._backend import AbstractBackend
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
from elastictok.attention._reference import Reference
from elastictok.attention._registry import backends, register
from elastictok.attention._tile_sizes import TileSizes
from elastictok.attention._xla import XLA

__all__ = [
    "XLA",
    "AbstractBackend",
    "AbstractMask",
    "And",
    "BlockCausal",
    "Causal",
    "Full",
    "KeyValid",
    "Reference",
    "Segments",
    "SlidingBlocks",
    "TileSizes",
    "attention",
    "backends",
    "register",
]
