"""Data sets of tokens: pictures and clips as they came out of a model, to train another one on.

A folder with `tokens.json`, which names the shards (ArrayRecord files of single records) and the
model; `tokens.index`, an array of fixed rows; and `tokens.keys`, the keys one after the other.

A record is a JSON object of at most 64 KiB, its length as four bytes, little-endian, before it, and
after it the lengths of all blocks (`u4`), their losses (`f8`), and the tokens: codes in the
smallest of `u1`, `u2`, `u4` that holds any, or latents (`f4`).
"""

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from elastictok.data._errors import MediaError
from elastictok.data._shards import Index, Shards, check_shards, expect, is_count

if TYPE_CHECKING:
    import grain

TOKENS = "tokens.json"
FORMAT = "elastictok-token-data"
VERSION = 1
KIND = "tokens"
AGAIN = "tokenize again"
TOKEN_INDEX = np.dtype(
    [("kept", "<u8"), ("key_end", "<u8"), ("blocks", "<u4"), ("frames", "<u4"), ("fps", "<f8")]
)
"""What the index says of a record: how many tokens it has, where its key ends, how many blocks and
frames, and frames per second, 0 where there are none."""

_MOST_HEADER = 2**16
_MOST = 2**31
_COUNTS = (
    "frames",
    "height",
    "width",
    "original_height",
    "original_width",
    "tokens_per_block",
    "frames_per_block",
    "window",
)
_HEADER = ("key", "kind", *_COUNTS, "fps", "missing", "codebook_size", "row", "fingerprint")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRecord:
    """The tokens of a picture or clip in a data set.

    **Arguments:**

    - `key`: unique in the data set: the name of the folder given, and the path below it.
    - `kind`: what it is.
    - `codes`: `int32[kept]` or `int32[kept streams]`, block after block; `None` for latents.
    - `latents`: `float32[kept dim]` if the tokens are not quantized, else `None`.
    - `lengths`: `int32[blocks]`, tokens kept of each block.
    - `losses`: `float64[blocks]`, of what decoding gives; NaN where it was not measured.
    - `frames`, `height`, `width`: of what decoding gives.
    - `original_height`, `original_width`: before it was fitted to the model.
    - `tokens_per_block`, `frames_per_block`: all tokens, and frames, of a block.
    - `window`: how many blocks, itself included, a block sees.
    - `fps`: frames per second of a clip; `None` for a picture.
    - `missing`: frames that the container promised, at least, and that could not be decoded.
    - `codebook_size`: how many codes there are; `None` for latents.
    - `fingerprint`: of the model.

    **Raises:** `ValueError` where the fields contradict each other.
    """

    key: str
    kind: Literal["picture", "clip"]
    codes: np.ndarray | None = dataclasses.field(repr=False)
    latents: np.ndarray | None = dataclasses.field(repr=False)
    lengths: np.ndarray = dataclasses.field(repr=False)
    losses: np.ndarray = dataclasses.field(repr=False)
    frames: int
    height: int
    width: int
    original_height: int
    original_width: int
    tokens_per_block: int
    frames_per_block: int
    window: int
    fps: float | int | None
    missing: int
    codebook_size: int | None
    fingerprint: str

    def __post_init__(self):
        _check_facts({name: getattr(self, name) for name in _HEADER if name != "row"})
        if (self.codes is None) == (self.latents is None):
            raise ValueError("give codes or latents: one of them, and not both")
        if (self.codes is None) != (self.codebook_size is None):
            raise ValueError("codebook_size goes with codes and must be None for latents")
        blocks = -(-self.frames // self.frames_per_block)
        if self.lengths.shape != (blocks,) or self.losses.shape != (blocks,):
            raise ValueError(
                f"lengths {self.lengths.shape} and losses {self.losses.shape} for {blocks} blocks"
            )
        if self.lengths.min() < 1 or self.lengths.max() > self.tokens_per_block:
            raise ValueError(
                f"lengths from {self.lengths.min()} to {self.lengths.max()}; a block has 1 to "
                f"{self.tokens_per_block} tokens"
            )
        kept = int(self.lengths.sum(dtype=np.int64))
        if len(self.values) != kept or self.values.ndim > 2 or 0 in self.values.shape:
            raise ValueError(f"tokens of shape {self.values.shape}, and lengths that sum to {kept}")
        self._check_values()

    def _check_values(self) -> None:
        if self.codebook_size is None:
            if self.values.dtype != np.float32 or self.values.ndim != 2:
                raise ValueError(
                    f"latents are {self.values.dtype}{list(self.values.shape)}; they must be "
                    "float32[kept dim]"
                )
            if not np.isfinite(self.values).all():
                raise ValueError("latents are not finite")
        elif self.values.dtype.kind not in "iu":
            raise ValueError(f"codes are {self.values.dtype}; they must be integers")
        elif self.values.min() < 0 or self.values.max() >= self.codebook_size:
            raise ValueError(
                f"codes from {self.values.min()} to {self.values.max()} for a code book of "
                f"{self.codebook_size}"
            )

    @property
    def values(self) -> np.ndarray:
        """The codes or the latents, whichever there are."""
        values = self.latents if self.codes is None else self.codes
        assert values is not None  # checked when made
        return values

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.lengths)

    def block(self, index: int) -> np.ndarray:
        """The tokens of one block."""
        index = range(self.blocks)[index]
        start = int(self.lengths[:index].sum(dtype=np.int64))
        return self.values[start : start + int(self.lengths[index])]

    def to_bytes(self) -> bytes:
        """As it is stored.

        **Raises:** `MediaError` if its key is too long.
        """
        facts = {name: getattr(self, name) for name in _HEADER if name != "row"}
        facts["fps"] = None if self.fps is None else float(self.fps)
        facts["row"] = self.values.shape[1:]
        header = json.dumps({name: facts[name] for name in _HEADER}).encode()
        if len(header) > _MOST_HEADER:
            raise MediaError(self.key, f"its key takes {len(header)} bytes; shorten it")
        values = self.values.astype(_stored_type(self.codebook_size))
        return b"".join(
            [
                struct.pack("<I", len(header)),
                header,
                self.lengths.astype("<u4").tobytes(),
                self.losses.astype("<f8").tobytes(),
                values.tobytes(),
            ]
        )

    @classmethod
    def from_bytes(cls, stored: bytes, name: str) -> "TokenRecord":
        """Reads what `to_bytes` wrote. No size that it states is trusted.

        **Raises:** `MediaError`, which speaks of `name`, if it is anything else.
        """
        size = struct.unpack("<I", stored[:4])[0] if len(stored) >= 4 else -1
        if not 0 <= size <= min(_MOST_HEADER, len(stored) - 4):
            raise MediaError(name, "not a record of a data set of tokens")
        try:
            facts = json.loads(stored[4 : 4 + size])
            if set(facts) != set(_HEADER):
                raise ValueError("its description has other entries")
            _check_facts(facts)
            return cls(**_fields(facts, memoryview(stored)[4 + size :]))
        except (ValueError, TypeError, RecursionError) as error:
            raise MediaError(name, f"its record is damaged ({error})") from error


def _check_facts(facts: dict[str, Any]) -> None:
    for name in ("key", "fingerprint"):
        if not isinstance(facts[name], str):
            raise ValueError(f"{name} is {facts[name]!r}, no text")
    if facts["kind"] not in ("picture", "clip"):
        raise ValueError(f"kind is {facts['kind']!r}, neither picture nor clip")
    for name in (*_COUNTS, "missing"):
        least = 0 if name == "missing" else 1
        if type(facts[name]) is not int or not least <= facts[name] < _MOST:
            raise ValueError(f"{name} is {facts[name]!r}; it must be {least} to {_MOST - 1}")
    size = facts["codebook_size"]
    if size is not None and (type(size) is not int or not 1 <= size <= _MOST):
        raise ValueError(f"codebook_size is {size!r}; it must be 1 to {_MOST}, or None")
    fps = facts["fps"]
    if fps is not None and (type(fps) not in (int, float) or not 0 < fps < math.inf):
        raise ValueError(f"fps is {fps!r}; it must be a positive number, or None")
    if (facts["kind"] == "picture") != (fps is None):
        raise ValueError(f"a {facts['kind']} with fps = {fps}; clips have it, pictures do not")


def _fields(facts: dict[str, Any], body: memoryview) -> dict[str, Any]:
    row = facts.pop("row")
    codebook_size: int | None = facts["codebook_size"]
    ranks = (1,) if codebook_size is None else (0, 1)
    if not isinstance(row, list) or len(row) not in ranks:
        raise ValueError(f"a token has the shape {row!r}")
    if any(type(n) is not int or not 1 <= n < _MOST for n in row):
        raise ValueError(f"a token has the shape {row!r}")
    blocks = -(-facts["frames"] // facts["frames_per_block"])
    if 12 * blocks > len(body):
        raise ValueError(f"{blocks} blocks in {len(body)} bytes")
    lengths = np.frombuffer(body[: 4 * blocks], "<u4")
    losses = np.frombuffer(body[4 * blocks : 12 * blocks], "<f8")
    kept, dtype = int(lengths.sum(dtype=np.uint64)), _stored_type(codebook_size)
    expected = kept * math.prod(row) * dtype.itemsize
    if lengths.max() >= _MOST or expected != len(body) - 12 * blocks:
        raise ValueError(f"{kept} tokens in {len(body) - 12 * blocks} bytes")
    values = np.frombuffer(body[12 * blocks :], dtype).reshape(kept, *row)
    # Before they are made signed, in which the largest would be below 0.
    if codebook_size is not None and int(values.max()) >= codebook_size:
        raise ValueError(f"the code {values.max()} of a code book of {codebook_size}")
    continuous = codebook_size is None
    return facts | {
        "lengths": lengths.astype(np.int32),
        "losses": losses.astype(np.float64),
        "codes": None if continuous else values.astype(np.int32),
        "latents": values.astype(np.float32) if continuous else None,
    }


def _stored_type(codebook_size: int | None) -> np.dtype:
    """The smallest type that holds any token."""
    if codebook_size is None:
        return np.dtype("<f4")
    most = codebook_size - 1
    return np.dtype("u1" if most < 2**8 else "<u2" if most < 2**16 else "<u4")


def token_index_row(record: TokenRecord) -> tuple[int, int, int, int, float]:
    """The row of a record, with the end of its key still open."""
    return len(record.values), 0, record.blocks, record.frames, float(record.fps or 0.0)


class TokenDataset:
    """A data set of tokens, by number. Reading a record leaves the others alone.

    Memory does not grow with the number of records: the index is mapped, and no more than some
    shards are open at once.

    **Arguments:**

    - `folder`: that `elastictok data tokenize` made.

    **Raises:** `MediaError` if it is not complete, or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.description = read_tokens_description(self.folder)
        shards = self.description["shards"]
        self._files = Shards(self.folder, KIND, shards, AGAIN)
        self._index = Index(self.folder, KIND, TOKEN_INDEX, len(self), AGAIN)
        self.index = self._index.rows

    def __reduce__(self):
        # Files are opened anew in a worker.
        return TokenDataset, (self.folder,)

    def __repr__(self) -> str:
        return f"TokenDataset({os.fspath(self.folder)!r})"

    def __len__(self) -> int:
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        """Of the model that made the tokens."""
        return self.description["settings"]["model"]

    def key(self, index: int) -> str:
        """The key of a record."""
        return self._index.key(range(len(self))[index])

    def __getitem__(self, index: int) -> TokenRecord:
        """Reads a record.

        **Raises:** `IndexError`; `MediaError` if it is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} {KIND}")
        stored = self._files.read(index)
        name = f"{self.folder}:{self.key(index)}"
        if stored is None:
            raise MediaError(name, f"its record is damaged; {AGAIN}")
        return TokenRecord.from_bytes(stored, name)

    def close(self) -> None:
        """Closes all shards; they are opened again when needed."""
        self._files.close()


def load_tokens(folder: str | os.PathLike[str]) -> "grain.MapDataset[TokenRecord]":
    """A data set of tokens as a Grain dataset, to be shuffled, repeated, sliced and mapped.

    Grain decides the order and keeps the state of an iterator; this reads single records.

    **Arguments:**

    - `folder`: see [`TokenDataset`][].

    **Returns:** a `grain.MapDataset` of [`TokenRecord`][]s.

    **Raises:** as [`TokenDataset`][] does.
    """
    dataset = TokenDataset(folder)
    # Not at the top: it takes a second or two, and brings jax along where that is installed.
    import grain

    return grain.MapDataset.source(dataset)


def read_tokens_description(folder: Path) -> dict[str, Any]:
    """What `tokens.json` says.

    **Raises:** `MediaError` if it is not there, damaged, or of another version.
    """
    path = folder / TOKENS
    if not path.exists():
        reason = "not a data set of tokens; make one by `elastictok data tokenize DATA TOKENS`"
        if (folder / "build" / "plan").exists():
            reason = "it is not complete; run the same `elastictok data tokenize` to go on"
        raise MediaError(folder, reason)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        expect(content["format"] == FORMAT)
        version = content["version"]
        expect(type(version) is int)
        if version == VERSION:
            expect(isinstance(content["settings"]["model"], str))
            counts = ("tasks", "records", "tokens", "rejected", "damaged")
            expect(all(is_count(content[name]) for name in counts))
            expect(content["records"] == check_shards(content["shards"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MediaError(path, "damaged, or not written by elastictok") from error
    if version != VERSION:
        raise MediaError(
            path, f"of version {version}, and this elastictok reads {VERSION}; {AGAIN}"
        )
    return content
