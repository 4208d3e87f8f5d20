"""From pixels to tokens and back: criteria, allocation strategies, `Tokenizer`, token files."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.inference", "beartype.beartype")

from ._codec import Codes, ElasticCodec, Latents
from ._container import TokenFileError
from ._criteria import L1, MSE, PSNR, AbstractCriterion, Criterion
from ._elastictok_codec import ElasticTokCodec
from ._strategies import (
    AbstractStrategy,
    Allocation,
    Binary,
    Block,
    FixedLength,
    Full,
    Search,
    allocate,
)
from ._tokenizer import Tokenizer
from ._tokens import Tokens

__all__ = [
    "L1",
    "MSE",
    "PSNR",
    "AbstractCriterion",
    "AbstractStrategy",
    "Allocation",
    "Binary",
    "Block",
    "Codes",
    "Criterion",
    "ElasticCodec",
    "ElasticTokCodec",
    "FixedLength",
    "Full",
    "Latents",
    "Search",
    "TokenFileError",
    "Tokenizer",
    "Tokens",
    "allocate",
]
