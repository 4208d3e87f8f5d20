"""The tokens of a picture or clip, what was measured when they were made, and their files."""

import dataclasses
import itertools
import operator
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np
from jaxtyping import Int64

from elastictok.models import ElasticTok

from ._codec import Codes, ElasticCodec, Latents
from ._container import Container, TokenFileError, smallest_unsigned, write
from ._elastictok_codec import as_codec
from ._frames import multiple
from ._index import LIMITS, TokenIndex, check_values, join_indices, read_only
from ._index import check_rate as check_rate

_PER_BLOCK = (
    "losses",
    "met",
    "monotone",
    "measured",
    "encoder_evaluations",
    "decoder_evaluations",
)
# Facts of a file and the types that JSON may give them.
_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(LIMITS, (int,)),
    "fps": (float, type(None)),
    "kind": (str,),
    "codebook_size": (int, type(None)),
    "bits_per_token": (float, type(None)),
    "fingerprint": (str,),
}
_VALUES = {"codes": np.int32, "latents": np.float32}
_INDEX = tuple(field.name for field in dataclasses.fields(TokenIndex) if field.name != "row")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """Tokens of one picture or clip, kept ones only, block after block.

    Arrays are read-only. Two `Tokens` are equal if everything but `seconds` is (a NaN equals a
    NaN). Made by `Tokenizer.encode`; `truncate`, `select`, `join`, `save` and `load` make others.

    - `codes`: `i32[kept]`, or `i32[kept streams]` if the quantizer gives a row of codes per token;
      None for latents that are not quantized.
    - `latents`: `f32[kept dim]` if they are not quantized, else None.
    - `lengths`: `i32[blocks]`, tokens kept of each block; they sum to `kept`.
    - `losses`: `f64[blocks]`, of exactly the pixels that decoding gives; NaN if not measured.
    - `met`: `bool[blocks]`, whether a block's loss meets the criterion it was encoded for.
    - `monotone`: `bool[blocks]`, whether, over the lengths that were probed, the loss never rose
      with the length.
    - `measured`: `bool[blocks]`, whether a block's loss was measured on the pixels that decoding
      gives at its very length. Where it was not, `losses` are NaN, and `met` and `monotone` false.
      (A loss that was measured may be NaN, too.)
    - `encoder_evaluations`, `decoder_evaluations`: `i32[blocks]`, network passes spent on a block;
      perhaps none.
    - `seconds`: `f64[blocks]`, spent on each block; None if not known. Not written to files.
    - `frames`, `height`, `width`: of what decoding gives.
    - `original_height`, `original_width`: of the frames before they were fitted to the model.
    - `fps`: frames per second, if known.
    - `picture`: one frame, and not a clip.
    - `tokens_per_block`: all tokens of a block at this size.
    - `frames_per_block`, `min_tokens`, `codebook_size`, `bits_per_token`, `fingerprint`: the
      codec's; `codebook_size` and `bits_per_token` are None for latents.
    - `window`: how many blocks, the current one included, a block sees; decoding uses the same.
    - `first_block`: which block of its stream the first one is; 0 unless these tokens are of a part
      of a stream.
    """

    # Types and shapes are checked below, not by annotations: what is wrong with a file has to be a
    # TokenFileError whether or not run-time type checks are on.
    codes: np.ndarray | None
    latents: np.ndarray | None
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
        if (self.codes is None) == (self.latents is None):
            raise ValueError("give codes or latents: one of them, and not both")
        if (self.codes is None) != (self.codebook_size is None):
            raise ValueError("codebook_size goes with codes and must be None for latents")
        for name, dtype in _VALUES.items():
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, read_only(name, given, dtype))
        if not self.values.ndim or 0 in self.values.shape:
            raise ValueError(
                f"tokens of shape {self.values.shape}; give (kept,) or (kept, streams or dim)"
            )
        index = self.index
        for name in _INDEX:
            object.__setattr__(self, name, getattr(index, name))
        check_values(index.kind, self.values)
        _check_kept(index, len(self.values))

    @property
    def values(self) -> np.ndarray:
        """The codes or the latents, whichever there are; one row per kept token."""
        values = self.latents if self.codes is None else self.codes
        assert values is not None  # checked when made
        return values

    @property
    def index(self) -> TokenIndex:
        """All but the codes or latents."""
        fields = {name: getattr(self, name) for name in _INDEX}
        return TokenIndex(row=self.values.shape[1:], **fields)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.lengths)

    @property
    def kind(self) -> Codes | Latents:
        """What a token is."""
        return self.index.kind

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
        return self.index.bits

    def block(self, index: int) -> np.ndarray:
        """The kept tokens of one block, as in `codes` or `latents`."""
        index = range(self.blocks)[index]
        start = int(self.lengths[:index].sum(dtype=np.int64))
        return self.values[start : start + int(self.lengths[index])]

    def truncate(self, length: int) -> "Tokens":
        """Keeps at most `length` tokens of each block, and at least the codec's `min_tokens`.

        From the first block that loses tokens on, nothing was measured: `losses` are NaN, `met`,
        `monotone` and `measured` false (later blocks see earlier ones, so their pixels change too).
        Blocks before it keep their measurements.

        **Raises:** `ValueError` if `length` is below 1.
        """
        length = operator.index(length)
        if length < 1:
            raise ValueError(f"cannot keep {length} tokens of a block; give 1 or more")
        lengths = np.minimum(self.lengths, max(length, self.shortest))
        if np.array_equal(lengths, self.lengths):
            return self
        changed = int(np.argmax(lengths != self.lengths))
        same = np.arange(self.blocks) < changed
        values = self.values[_places(self.lengths) < np.repeat(lengths, self.lengths)]
        return dataclasses.replace(
            self,
            codes=None if self.codes is None else values,
            latents=None if self.latents is None else values,
            lengths=lengths,
            losses=np.where(same, self.losses, np.nan),
            met=self.met & same,
            monotone=self.monotone & same,
            measured=self.measured & same,
        )

    def select(self, start: int, stop: int) -> "Tokens":
        """The blocks from `start` on and before `stop`, counted from 0 in these tokens.

        They say which part of the stream they are by `first_block`; `join` puts parts together
        again. A decoder needs what comes before them for the pixels that they stand for.

        **Raises:** `ValueError` unless `0 <= start < stop <= blocks`.
        """
        index = self.index
        part = index.select(start, stop)
        return _tokens(part, self.values[index.ends[start] : index.ends[stop]])

    @staticmethod
    def join(parts: Iterable["Tokens"]) -> "Tokens":
        """Consecutive parts of one stream as one.

        **Arguments:**

        - `parts`: at least one, in order, each beginning with the block after the last one of the
          part before.

        **Raises:** `ValueError` if they are not consecutive or not of one stream.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("no parts were given; give at least one")
        index = join_indices([part.index for part in parts])
        return _tokens(index, np.concatenate([part.values for part in parts]))

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
            name, values = "latents", self.values
        else:
            name, values = "codes", self.values.astype(smallest_unsigned(self.codebook_size - 1))
        arrays[name] = values
        arrays["checksums"] = _checksums(values, self.index.ends)
        write(Path(path), facts, arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Tokens":
        """Reads a whole token file; [`TokenFile`][] reads single blocks.

        Nothing in it is executed, and no size in it is trusted.

        **Raises:** `TokenFileError` if the file is damaged, cut short, not a token file or of a
        newer version; `OSError` if it cannot be opened.
        """
        with TokenFile(path) as file:
            return file.tokens()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        names = [f.name for f in dataclasses.fields(self) if f.name != "seconds"]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)


@final
class TokenFile:
    """A token file of which single blocks are read, whatever its size.

    Opening it reads what is known of the blocks, and no codes or latents; its memory and time are
    those of a few numbers for each block.

    ```python
    with TokenFile("clip.safetensors") as file:
        file.index.lengths, file.index.fps  # all but the tokens themselves
        file.block(1000)  # i32[length]: codes of one block
        part = file.select(1000, 1016)  # Tokens
    ```

    **Arguments:**

    - `path`: of the file, which stays open until `close` or the end of a `with` statement.

    **Raises:** `TokenFileError` if the file is damaged, cut short, not a token file or of a newer
    version; `OSError` if it cannot be opened.
    """

    def __init__(self, path: str | Path):
        self._container = Container(Path(path))
        try:
            self._name, self._index, self._checks = _open(self._container)
        except BaseException:
            self.close()
            raise
        self._ends = self._index.ends

    @property
    def index(self) -> TokenIndex:
        """All that is known of the blocks, without their tokens."""
        return self._index

    def __len__(self) -> int:
        """Number of blocks."""
        return self._index.blocks

    def block(self, index: int) -> np.ndarray:
        """The kept tokens of one block, as in `codes` or `latents`.

        **Raises:** `IndexError` if there is no such block; `TokenFileError` if it is damaged.
        """
        index = range(len(self))[index]
        return self._convert(self._read(index, index + 1))

    def select(self, start: int, stop: int) -> Tokens:
        """The blocks from `start` on and before `stop`, counted from 0 in this file.

        **Raises:** `ValueError` unless `0 <= start < stop <= len(file)`; `TokenFileError` if one of
        them is damaged.
        """
        part = self._index.select(start, stop)
        return _tokens(part, self._convert(self._read(start, stop)))

    def tokens(self) -> Tokens:
        """Everything in the file, which is checked as a whole.

        **Raises:** `TokenFileError` if something is damaged.
        """
        stored = self._read(0, len(self))
        self._container.check_all({self._name: stored})
        return _tokens(self._index, self._convert(stored))

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Codes or latents as they are stored, with the right checksums."""
        ends = self._ends[start : stop + 1]
        stored = self._container.rows(self._name, int(ends[0]), int(ends[-1]))
        wrong = _checksums(stored, ends - ends[0]) != self._checks[start:stop]
        if wrong.any():
            raise TokenFileError(
                f"{self._container.path} is damaged: block {start + int(np.argmax(wrong))} does "
                "not have the checksum that it was written with; copy or encode it again"
            )
        return stored

    def _convert(self, stored: np.ndarray) -> np.ndarray:
        try:
            check_values(self._index.kind, stored)
            return read_only(self._name, stored, _VALUES[self._name])
        except ValueError as error:
            raise _contradiction(self._container.path, error) from error


def _open(container: Container) -> tuple[str, TokenIndex, np.ndarray]:
    """Which values a file has, what it says of them, and the blocks' checksums."""
    path, facts, layouts = container.path, dict(container.facts), container.layouts
    name = "latents" if "latents" in layouts else "codes"
    _check_names(path, "facts", facts.keys(), _FACTS.keys())
    _check_names(path, "arrays", layouts.keys(), {*_PER_BLOCK, "lengths", "checksums", name})
    for fact, types in _FACTS.items():
        if type(facts[fact]) not in types:
            raise TokenFileError(f"{path} is foreign: its {fact} is {facts[fact]!r}")
    kind = facts.pop("kind")
    if kind not in ("picture", "clip"):
        raise TokenFileError(f"{path} holds a {kind!r}; this elastictok knows picture and clip")
    arrays = dict(container.arrays)
    checks, values = arrays.pop("checksums"), layouts[name]
    fields: dict[str, Any] = {**facts, **arrays}
    try:
        _check_stored(name, values.dtype, facts["codebook_size"])
        index = TokenIndex(row=values.shape[1:], picture=kind == "picture", **fields)
        _check_kept(index, values.shape[0])
        if checks.dtype != np.uint32 or checks.shape != index.lengths.shape:
            raise ValueError(f"checksums of type {checks.dtype} have shape {checks.shape}")
    except ValueError as error:
        raise _contradiction(path, error) from error
    return name, index, checks


def _contradiction(path: Path, error: ValueError) -> TokenFileError:
    return TokenFileError(f"{path} contradicts itself: {error}")


def _check_stored(name: str, dtype: np.dtype, codebook_size: int | None) -> None:
    if (name == "codes") != (codebook_size is not None):
        raise ValueError("codebook_size goes with codes and must be None for latents")
    if dtype.kind != "u" if name == "codes" else dtype != np.float32:
        raise ValueError(f"{name} of type {dtype}; they are unsigned integers, or float32 latents")


def _check_kept(index: TokenIndex, kept: int) -> None:
    if index.kept != kept:
        raise ValueError(f"lengths sum to {index.kept}, but {kept} tokens are there")


def _tokens(index: TokenIndex, values: np.ndarray) -> Tokens:
    fields = {name: getattr(index, name) for name in _INDEX}
    continuous = index.codebook_size is None
    return Tokens(
        codes=None if continuous else values, latents=values if continuous else None, **fields
    )


def _checksums(stored: np.ndarray, ends: Int64[np.ndarray, "ends"]) -> np.ndarray:
    """`u32[blocks]`, CRC-32 of the bytes of each block; `ends` as of [`TokenIndex`][]."""
    raw = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
    row = len(raw) // len(stored)
    bounds = (ends * row).tolist()
    checks = [zlib.crc32(raw[a:b]) for a, b in itertools.pairwise(bounds)]
    return np.array(checks, np.uint32)


def _places(lengths: np.ndarray) -> np.ndarray:
    """For each token its place in its block."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.arange(lengths.sum(dtype=np.int64)) - np.repeat(starts, lengths)


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
