"""All that is known of tokens but the tokens themselves."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from ._codec import Codes, Latents

# Sizes come from files of unknown origin: each has a bound, far above what anyone has.
LIMITS = {
    "frames": 2**40,
    "height": 2**20,
    "width": 2**20,
    "original_height": 2**20,
    "original_width": 2**20,
    "tokens_per_block": 2**30,
    "frames_per_block": 2**20,
    "min_tokens": 2**30,
    "window": 2**30,
    "first_block": 2**40,
}
# All others are at least 1.
_LEAST = {"first_block": 0}
_ARRAYS = {
    "lengths": np.int32,
    "losses": np.float64,
    "met": np.bool_,
    "monotone": np.bool_,
    "measured": np.bool_,
    "encoder_evaluations": np.int32,
    "decoder_evaluations": np.int32,
    "seconds": np.float64,
}
# What the parts of one stream have in common.
_OF_STREAM = (
    *(name for name in LIMITS if name not in ("frames", "first_block")),
    "fps",
    "codebook_size",
    "bits_per_token",
    "fingerprint",
    "kind",
)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class TokenIndex:
    """What `Tokens` say of a picture or clip and of each block, without codes or latents.

    A token file is opened for as much, whatever its size. Fields are those of `Tokens`, and

    - `row`: the shape of one token: `()` or `(streams,)` for codes, `(dim,)` for latents.
    """

    # Types and shapes are checked below, not by annotations: what is wrong with a file has to be a
    # TokenFileError whether or not run-time type checks are on.
    row: tuple
    lengths: np.ndarray
    losses: np.ndarray
    met: np.ndarray
    monotone: np.ndarray
    measured: np.ndarray
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
    bits_per_token: float | int | None
    window: int
    fingerprint: str
    first_block: int = 0
    seconds: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            _replace(self, name, lambda value, n=name, d=dtype: read_only(n, value, d))
        for name in (*LIMITS, "codebook_size"):
            _replace(self, name, operator.index)
        for name in ("fps", "bits_per_token"):
            _replace(self, name, float)
        _check_facts(self)
        _check_blocks(self)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.lengths)

    @property
    def kept(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def kind(self) -> Codes | Latents:
        """What a token is."""
        if self.codebook_size is None:
            return Latents(*self.row)
        return Codes(self.codebook_size, *self.row)

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
        """As in `Tokens`."""
        if self.bits_per_token is None:
            return None
        per_length = (self.tokens_per_block - self.shortest).bit_length()
        return self.kept * self.bits_per_token + self.blocks * per_length

    @property
    def ends(self) -> Int64[np.ndarray, "ends"]:
        """Where the blocks' tokens begin, and the last one's end."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def select(self, start: int, stop: int) -> "TokenIndex":
        """As in `Tokens`."""
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start < stop <= self.blocks:
            raise ValueError(
                f"cannot select the blocks {start} to {stop} of {self.blocks}; give "
                f"0 <= start < stop <= {self.blocks}"
            )
        frames = min(self.frames, stop * self.frames_per_block) - start * self.frames_per_block
        per_block = {
            name: array[start:stop]
            for name in _ARRAYS
            if (array := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            self, frames=frames, first_block=self.first_block + start, **per_block
        )


def join_indices(parts: list[TokenIndex]) -> TokenIndex:
    """Of consecutive parts of one stream.

    **Raises:** `ValueError` if they are not.
    """
    for before, after in itertools.pairwise(parts):
        _check_follows(before, after)
    arrays = {name: [getattr(part, name) for part in parts] for name in _ARRAYS}
    per_block = {
        name: None if any(part is None for part in each) else np.concatenate(each)
        for name, each in arrays.items()
    }
    frames = sum(part.frames for part in parts)
    return dataclasses.replace(parts[0], frames=frames, **per_block)


def check_rate(fps: float | int | None) -> None:
    """**Raises:** `ValueError` if there cannot be so many frames per second."""
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; it must be a positive number, or None if unknown")


def read_only(name: str, value: Any, dtype: type[np.generic]) -> np.ndarray:
    """A copy of a type, which cannot be changed.

    **Raises:** `ValueError` if the values do not fit into it.
    """
    given = np.asarray(value)
    fits = np.can_cast(given.dtype, dtype, "same_kind")
    array = given.astype(dtype if fits else given.dtype)
    if not fits or (np.issubdtype(dtype, np.integer) and not np.array_equal(array, given)):
        raise ValueError(f"{name} of type {given.dtype} does not fit into {np.dtype(dtype)}")
    array.flags.writeable = False
    return array


def check_values(kind: Codes | Latents, values: np.ndarray) -> None:
    """**Raises:** `ValueError` if these are no tokens of that kind."""
    if isinstance(kind, Latents):
        if not np.isfinite(values).all():
            raise ValueError("latents are not finite; the model or its input holds NaN or infinity")
    elif values.min() < 0 or values.max() >= kind.codebook_size:
        raise ValueError(
            f"codes from {values.min()} to {values.max()} for a code book of {kind.codebook_size}"
        )


def _replace(index: TokenIndex, name: str, convert: Callable[[Any], Any]) -> None:
    value = getattr(index, name)
    if value is not None:
        object.__setattr__(index, name, convert(value))


def _check_facts(index: TokenIndex) -> None:
    for name, most in LIMITS.items():
        value, least = getattr(index, name), _LEAST.get(name, 1)
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}; it must be {least} to {most}")
    check_rate(index.fps)
    if index.bits_per_token is not None and not 0 <= index.bits_per_token < math.inf:
        raise ValueError(f"bits_per_token is {index.bits_per_token}; it must be 0 or more")
    if (index.codebook_size is None) != (index.bits_per_token is None):
        raise ValueError("bits_per_token goes with codes and must be None for latents")
    if index.picture and index.frames != 1:
        raise ValueError(f"a picture has 1 frame; {index.frames} were given")
    if not index.fingerprint:
        raise ValueError("fingerprint is empty; it must name the model that made the tokens")
    ranks = (1,) if index.codebook_size is None else (0, 1)
    if len(index.row) not in ranks or 0 in index.row:
        raise ValueError(
            f"tokens of shape {('kept', *index.row)}; give (kept,) or (kept, streams or dim)"
        )
    _ = index.kind  # checks its numbers


def _check_blocks(index: TokenIndex) -> None:
    lengths = index.lengths
    blocks = -(-index.frames // index.frames_per_block)
    for name in _ARRAYS:
        array = getattr(index, name)
        if array is not None and array.shape != (blocks,):
            raise ValueError(
                f"{name} has shape {array.shape}; {index.frames} frames in blocks of "
                f"{index.frames_per_block} are {blocks} blocks"
            )
    if lengths.min() < index.shortest or lengths.max() > index.tokens_per_block:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}; these blocks allow "
            f"{index.shortest} to {index.tokens_per_block}"
        )
    for name in ("encoder_evaluations", "decoder_evaluations"):
        if getattr(index, name).min() < 0:
            raise ValueError(f"{name} are negative: {getattr(index, name).min()}")
    _check_measured(index)
    if np.any(index.met & ~(index.losses < math.inf)):
        raise ValueError("a loss that is NaN or infinite cannot have met its threshold")


def _check_measured(index: TokenIndex) -> None:
    claims = {"met": index.met, "monotone": index.monotone, "losses": ~np.isnan(index.losses)}
    for name, claimed in claims.items():
        wrong = claimed & ~index.measured
        if wrong.any():
            block = int(np.argmax(wrong))
            raise ValueError(
                f"block {block} was not measured, but {name} is {getattr(index, name)[block]}; "
                "blocks that were not have NaN losses, and are neither met nor monotone"
            )


def _check_follows(before: TokenIndex, after: TokenIndex) -> None:
    if before.picture or after.picture:
        raise ValueError("a picture is a whole and no part of a stream; leave it out of the parts")
    for name in _OF_STREAM:
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in one part and {theirs} in the next; join parts of one stream"
            )
    expected = before.first_block + before.blocks
    if after.first_block != expected:
        raise ValueError(
            f"a part that begins with block {after.first_block} of the stream follows one that "
            f"ends before block {expected}; join parts in order and without gaps"
        )
    if before.frames % before.frames_per_block:
        raise ValueError(
            f"a part of {before.frames} frames in blocks of {before.frames_per_block} ends within "
            "a block, and another part follows; only the last one may"
        )
