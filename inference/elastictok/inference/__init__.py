"""From pixels to tokens and back: criteria, allocation strategies, `Tokenizer`, token files."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.inference", "beartype.beartype")

from . import ragged
from ._allocate import Allocation, allocate
from ._budget import Budget, split
from ._calibrate import calibrate
from ._codec import Codes, ElasticCodec, Latents
from ._conformal import MARGINS, Calibration, least_clips
from ._container import TokenFileError
from ._criteria import L1, MSE, PSNR, AbstractCriterion, Criterion
from ._elastictok_codec import ElasticTokCodec
from ._function_codec import FunctionCodec
from ._index import TokenIndex
from ._regressor import CALIBRATION_FILE, SCORER_FILE, Regressor
from ._scorer import SCORE_SHARES, AbstractScorer, Scorer, criterion_name
from ._scorer_file import ScorerFileError
from ._state_file import (
    StateFileError,
    load_decoder_state,
    load_encoder_state,
    save_decoder_state,
    save_encoder_state,
)
from ._strategies import (
    AbstractStrategy,
    Binary,
    Binned,
    Block,
    EncodeOnce,
    FixedLength,
    Full,
    KAry,
    Search,
    Secant,
    WarmStart,
    linear_spaced,
    log_spaced,
)
from ._streams import DecoderState, EncoderState, FrameStream, TokenStream
from ._tokenizer import Tokenizer
from ._tokens import TokenFile, Tokens

__all__ = [
    "CALIBRATION_FILE",
    "L1",
    "MARGINS",
    "MSE",
    "PSNR",
    "SCORER_FILE",
    "SCORE_SHARES",
    "AbstractCriterion",
    "AbstractScorer",
    "AbstractStrategy",
    "Allocation",
    "Binary",
    "Binned",
    "Block",
    "Budget",
    "Calibration",
    "Codes",
    "Criterion",
    "DecoderState",
    "ElasticCodec",
    "ElasticTokCodec",
    "EncodeOnce",
    "EncoderState",
    "FixedLength",
    "FrameStream",
    "Full",
    "FunctionCodec",
    "KAry",
    "Latents",
    "Regressor",
    "Scorer",
    "ScorerFileError",
    "Search",
    "Secant",
    "StateFileError",
    "TokenFile",
    "TokenFileError",
    "TokenIndex",
    "TokenStream",
    "Tokenizer",
    "Tokens",
    "WarmStart",
    "allocate",
    "calibrate",
    "criterion_name",
    "least_clips",
    "linear_spaced",
    "load_decoder_state",
    "load_encoder_state",
    "log_spaced",
    "ragged",
    "save_decoder_state",
    "save_encoder_state",
    "split",
]
