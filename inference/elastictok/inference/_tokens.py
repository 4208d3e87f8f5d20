"""The tokens of a picture or clip, and what was measured when they were made."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from elastictok.models import ElasticTok

from ._codec import Codes, ElasticCodec, Latents
from ._container import TokenFileError, read, smallest_unsigned, write
from ._elastictok_codec import as_codec
from ._frames import multiple

# Sizes come from files of unknown origin: each has a bound, far above what anyone has.
_LIMITS = {
    "frames": 2**40,
    "height": 2**20,
    "width": 2**20,
    "original_height": 2**20,
    "original_width": 2**20,
    "tokens_per_block": 2**30,
    "frames_per_block": 2**20,
    "min_tokens": 2**30,
    "window": 2**30,
}
_ARRAYS = {
    "codes": np.int32,
    "latents": np.float32,
    "lengths": np.int32,
    "losses": np.float64,
    "met": np.bool_,
    "monotone": np.bool_,
    "encoder_evaluations": np.int32,
    "decoder_evaluations": np.int32,
    "seconds": np.float64,
}
_PER_BLOCK = ("losses", "met", "monotone", "encoder_evaluations", "decoder_evaluations")
# Facts of a file and the types that JSON may give them.
_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_LIMITS, (int,)),
    "fps": (float, type(None)),
    "kind": (str,),
    "codebook_size": (int, type(None)),
    "bits_per_token": (float, type(None)),
    "fingerprint": (str,),
}


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """Tokens of one picture or clip, kept ones only, block after block.

    Arrays are read-only. Two `Tokens` are equal if everything but `seconds` is (a NaN equals a
    NaN). Made by `Tokenizer.encode`; `truncate`, `save` and `load` make others.

    - `codes`: `i32[kept]`, or `i32[kept streams]` if the quantizer gives a row of codes per token;
      None for latents that are not quantized.
    - `latents`: `f32[kept dim]` if they are not quantized, else None.
    - `lengths`: `i32[blocks]`, tokens kept of each block; they sum to `kept`.
    - `losses`: `f64[blocks]`, of exactly the pixels that decoding gives; NaN if not measured.
    - `met`: `bool[blocks]`, whether a block's loss meets the criterion it was encoded for.
    - `monotone`: `bool[blocks]`, whether, over the lengths that were probed, the loss never rose
      with the length.
    - `encoder_evaluations`, `decoder_evaluations`: `i32[blocks]`, network passes spent on a block.
    - `seconds`: `f64[blocks]`, spent on each block; None if not known. Not written to files.
    - `frames`, `height`, `width`: of what decoding gives.
    - `original_height`, `original_width`: of the frames before they were fitted to the model.
    - `fps`: frames per second, if known.
    - `picture`: one frame, and not a clip.
    - `tokens_per_block`: all tokens of a block at this size.
    - `frames_per_block`, `min_tokens`, `codebook_size`, `bits_per_token`, `fingerprint`: the
      codec's; `codebook_size` and `bits_per_token` are None for latents.
    - `window`: how many blocks, the current one included, a block sees; decoding uses the same.
    """

    # Types and shapes are checked below, not by annotations: what is wrong with a file has to be a
    # TokenFileError whether or not run-time type checks are on.
    codes: np.ndarray | None
    latents: np.ndarray | None
    lengths: np.ndarray
    losses: np.ndarray
    met: np.ndarray
    monotone: np.ndarray
    encoder_evaluations: np.ndarray
    decoder_evaluations: np.ndarray
    frames: int
    height: int
    width: int
    original_height: int
    original_width: int
    fps: float | int | None
    picture: bool
    tokens_per_block: int
    frames_per_block: int
    min_tokens: int
    codebook_size: int | None
    bits_per_token: float | None
    window: int
    fingerprint: str
    seconds: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            _replace(self, name, lambda value, n=name, d=dtype: _read_only(n, value, d))
        for name in (*_LIMITS, "codebook_size"):
            _replace(self, name, operator.index)
        for name in ("fps", "bits_per_token"):
            _replace(self, name, float)
        _check_facts(self)
        _check_values(self)
        _check_blocks(self)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.lengths)

    @property
    def values(self) -> np.ndarray:
        """The codes or the latents, whichever there are; one row per kept token."""
        values = self.latents if self.codes is None else self.codes
        assert values is not None  # checked when made
        return values

    @property
    def kind(self) -> Codes | Latents:
        """What a token is."""
        if self.codebook_size is None:
            return Latents(self.values.shape[1])
        return Codes(self.codebook_size, None if self.values.ndim == 1 else self.values.shape[1])

    @property
    def shortest(self) -> int:
        """The fewest tokens that a block of this size may keep."""
        return min(self.min_tokens, self.tokens_per_block)

    @property
    def evaluations(self) -> Int64[np.ndarray, "blocks"]:
        """Network passes spent on each block, the encoder's and the decoder's together."""
        return self.encoder_evaluations.astype(np.int64) + self.decoder_evaluations

    @property
    def bits(self) -> float | None:
        """Information that a decoder needs: the kept tokens, and the blocks' lengths.

        A length costs `ceil(log2(number of lengths allowed))` bits. None for latents that are not
        quantized. (A file is larger: it also holds the geometry, the measurements, and codes in
        whole bytes.)
        """
        if self.bits_per_token is None:
            return None
        per_length = (self.tokens_per_block - self.shortest).bit_length()
        return len(self.values) * self.bits_per_token + self.blocks * per_length

    def block(self, index: int) -> np.ndarray:
        """The kept tokens of one block, as in `codes` or `latents`."""
        index = range(self.blocks)[index]
        start = int(self.lengths[:index].sum())
        return self.values[start : start + int(self.lengths[index])]

    def truncate(self, length: int) -> "Tokens":
        """Keeps at most `length` tokens of each block, and at least the codec's `min_tokens`.

        From the first block that loses tokens on, nothing was measured: `losses` are NaN, `met`
        and `monotone` false (later blocks see earlier ones, so their pixels change too). Blocks
        before it keep their measurements.

        **Raises:** `ValueError` if `length` is below 1.
        """
        length = operator.index(length)
        if length < 1:
            raise ValueError(f"cannot keep {length} tokens of a block; give 1 or more")
        lengths = np.minimum(self.lengths, max(length, self.shortest))
        if np.array_equal(lengths, self.lengths):
            return self
        changed = int(np.argmax(lengths != self.lengths))
        measured = np.arange(self.blocks) < changed
        values = np.concatenate([self.block(index)[:kept] for index, kept in enumerate(lengths)])
        return dataclasses.replace(
            self,
            codes=None if self.codes is None else values,
            latents=None if self.latents is None else values,
            lengths=lengths,
            losses=np.where(measured, self.losses, np.nan),
            met=self.met & measured,
            monotone=self.monotone & measured,
        )

    def check(self, model: ElasticTok | ElasticCodec) -> None:
        """**Raises:** `TokenFileError` if these tokens were not made by this model."""
        codec = as_codec(model)
        if self.fingerprint != codec.fingerprint:
            raise TokenFileError(
                f"the tokens were made by the model {self.fingerprint[:12]}..., and this one is "
                f"{codec.fingerprint[:12]}...; open them with the model that made them"
            )
        height, width = multiple(self.height, codec.patch[0]), multiple(self.width, codec.patch[1])
        for name, ours, theirs in (
            ("kind", self.kind, codec.kind),
            ("frames_per_block", self.frames_per_block, codec.frames_per_block),
            ("min_tokens", self.min_tokens, codec.min_tokens),
            ("bits_per_token", self.bits_per_token, codec.bits_per_token),
            ("tokens_per_block", self.tokens_per_block, codec.tokens_per_block(height, width)),
        ):
            if ours != theirs:
                raise TokenFileError(
                    f"{name} is {ours} in the tokens and {theirs} in the model, although they "
                    "name the same model; the tokens are damaged: encode again"
                )

    def save(self, path: str | Path) -> None:
        """Writes a token file (format: the package's README.md), all of it or nothing."""
        facts = {name: getattr(self, name) for name in _FACTS if name != "kind"}
        facts["kind"] = "picture" if self.picture else "clip"
        arrays = {name: getattr(self, name) for name in _PER_BLOCK}
        arrays["lengths"] = self.lengths.astype(smallest_unsigned(self.tokens_per_block))
        for name in ("encoder_evaluations", "decoder_evaluations"):
            arrays[name] = arrays[name].astype(smallest_unsigned(int(arrays[name].max())))
        if self.codebook_size is None:
            arrays["latents"] = self.values
        else:
            arrays["codes"] = self.values.astype(smallest_unsigned(self.codebook_size - 1))
        write(Path(path), facts, arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Reads a token file. Nothing in it is executed, and no size in it is trusted.

        **Raises:** `TokenFileError` if the file is damaged, cut short, not a token file or of a
        newer version; `OSError` if it cannot be opened.
        """
        facts, arrays = read(Path(path))
        wanted = {*_PER_BLOCK, "lengths", "latents" if "latents" in arrays else "codes"}
        _check_names(path, "facts", facts.keys(), _FACTS.keys())
        _check_names(path, "arrays", arrays.keys(), wanted)
        for name, types in _FACTS.items():
            if type(facts[name]) not in types:
                raise TokenFileError(f"{path} is foreign: its {name} is {facts[name]!r}")
        kind = facts.pop("kind")
        if kind not in ("picture", "clip"):
            raise TokenFileError(f"{path} holds a {kind!r}; this elastictok knows picture and clip")
        fields: dict[str, Any] = {"codes": None, "latents": None, **facts, **arrays}
        try:
            return cls(picture=kind == "picture", **fields)
        except ValueError as error:
            raise TokenFileError(f"{path} contradicts itself: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        names = [f.name for f in dataclasses.fields(self) if f.name != "seconds"]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)


def check_rate(fps: float | int | None) -> None:
    """**Raises:** `ValueError` if there cannot be so many frames per second."""
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; it must be a positive number, or None if unknown")


def _replace(tokens: Tokens, name: str, convert: Callable[[Any], Any]) -> None:
    value = getattr(tokens, name)
    if value is not None:
        object.__setattr__(tokens, name, convert(value))


def _read_only(name: str, value: Any, dtype: type[np.generic]) -> np.ndarray:
    given = np.asarray(value)
    fits = np.can_cast(given.dtype, dtype, "same_kind")
    array = given.astype(dtype if fits else given.dtype)
    if not fits or (np.issubdtype(dtype, np.integer) and not np.array_equal(array, given)):
        raise ValueError(f"{name} of type {given.dtype} does not fit into {np.dtype(dtype)}")
    array.flags.writeable = False
    return array


def _check_facts(tokens: Tokens) -> None:
    for name, most in _LIMITS.items():
        value = getattr(tokens, name)
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}; it must be 1 to {most}")
    check_rate(tokens.fps)
    if tokens.bits_per_token is not None and not 0 <= tokens.bits_per_token < math.inf:
        raise ValueError(f"bits_per_token is {tokens.bits_per_token}; it must be 0 or more")
    if tokens.picture and tokens.frames != 1:
        raise ValueError(f"a picture has 1 frame; {tokens.frames} were given")
    if not tokens.fingerprint:
        raise ValueError("fingerprint is empty; it must name the model that made the tokens")


def _check_values(tokens: Tokens) -> None:
    if (tokens.codes is None) == (tokens.latents is None):
        raise ValueError("give codes or latents: one of them, and not both")
    discrete = tokens.codes is not None
    if discrete != (tokens.codebook_size is not None):
        raise ValueError("codebook_size goes with codes and must be None for latents")
    if discrete != (tokens.bits_per_token is not None):
        raise ValueError("bits_per_token goes with codes and must be None for latents")
    values, ranks = tokens.values, (1, 2) if discrete else (2,)
    if values.ndim not in ranks or 0 in values.shape:
        raise ValueError(f"tokens of shape {values.shape}; give (kept,) or (kept, streams or dim)")
    kind = tokens.kind  # checks its numbers
    if isinstance(kind, Latents):
        if not np.isfinite(values).all():
            raise ValueError("latents are not finite; the model or its input holds NaN or infinity")
    elif values.min() < 0 or values.max() >= kind.codebook_size:
        raise ValueError(
            f"codes from {values.min()} to {values.max()} for a code book of {kind.codebook_size}"
        )


def _check_blocks(tokens: Tokens) -> None:
    lengths = tokens.lengths
    blocks = -(-tokens.frames // tokens.frames_per_block)
    for name in ("lengths", *_PER_BLOCK, "seconds"):
        array = getattr(tokens, name)
        if array is not None and array.shape != (blocks,):
            raise ValueError(
                f"{name} has shape {array.shape}; {tokens.frames} frames in blocks of "
                f"{tokens.frames_per_block} are {blocks} blocks"
            )
    if lengths.min() < tokens.shortest or lengths.max() > tokens.tokens_per_block:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}; these blocks allow "
            f"{tokens.shortest} to {tokens.tokens_per_block}"
        )
    if lengths.sum(dtype=np.int64) != len(tokens.values):
        raise ValueError(
            f"lengths sum to {lengths.sum(dtype=np.int64)}, but {len(tokens.values)} tokens are "
            "there"
        )
    for name in ("encoder_evaluations", "decoder_evaluations"):
        if getattr(tokens, name).min() < 0:
            raise ValueError(f"{name} are negative: {getattr(tokens, name).min()}")
    if np.any(tokens.met & ~(tokens.losses < math.inf)):
        raise ValueError("a loss that is NaN or infinite cannot have met its threshold")


def _check_names(path: str | Path, what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    missing, unknown = sorted({*wanted} - {*given}), sorted({*given} - {*wanted})
    if missing or unknown:
        raise TokenFileError(
            f"{path} is foreign: of its {what}, missing are {missing}, unknown {unknown}"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating))
    return type(a) is type(b) and a == b
