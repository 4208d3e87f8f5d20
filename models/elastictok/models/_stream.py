"""The byte format of the official checkpoints: where each tensor lies in the file.

The file is a run of msgpack objects `[key, value]`, one per tensor, without header or index. A key
is an array of strings. A value is a byte string that holds a msgpack extension of type 1, whose
payload is the array `[shape, dtype name, bytes]`, little-endian in C order; or, for large arrays, a
map of such extensions to be joined.

Only the few bytes between tensors are read here. Every length is compared with what encloses it,
and with the file's size, before anything is read or reserved by it. Nothing is unpickled.
"""

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._describe import ModelFileError

Name = tuple[str, ...]

_DTYPES = {
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float32": np.dtype("<f4"),
    "int32": np.dtype("<i4"),
}
_CHUNKED = "__msgpack_chunked_array__"
# Longest key and dtype names, largest rank and number of chunks that a sane file has.
_MOST = 4096


class StoredArray(NamedTuple):
    """An array in a file, not read yet: `(offset, bytes)` of each of its parts, in order."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]

    def read(self) -> np.ndarray:
        """Its values.

        **Raises:** `ModelFileError` if the file has become shorter.
        """
        values = np.empty(math.prod(self.shape), self.dtype)
        view = values.view(np.uint8).data
        with open(self.path, "rb") as file:
            for offset, size in self.parts:
                file.seek(offset)
                if file.readinto(view[:size]) != size:
                    raise ModelFileError(f"{self.path} became shorter while it was read")
                view = view[size:]
        return values.reshape(self.shape)


class Contents(NamedTuple):
    """What a file holds.

    - `arrays`: by key, in the file's order.
    - `fault`: what is wrong with the file after them; None if nothing is.
    """

    arrays: dict[Name, StoredArray]
    fault: str | None


def scan(path: Path, wanted: Callable[[Name], bool]) -> Contents:
    """The arrays of a file whose keys are wanted; the values of others are passed over unseen.

    **Raises:** `OSError` if the file cannot be read.
    """
    arrays: dict[Name, StoredArray] = {}
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            reader = _Reader(file, at, size)
            key: Name | None = None
            try:
                reader.array_of(2, "a pair of key and value")
                key = _key(reader)
                length = reader.binary(f"the value of {'/'.join(key)}")
                end = reader.at + length
                if wanted(key):
                    if key in arrays:
                        raise _Fault("this key comes twice")
                    arrays[key] = _array(path, _Reader(file, reader.at, end))
                at = end
            except _Fault as fault:
                where = f", in {'/'.join(key)}" if key else ""
                return Contents(arrays, f"at byte {reader.at} of {size}{where}: {fault}")
    return Contents(arrays, None)


class _Fault(ValueError):
    """The bytes are no checkpoint."""


class _Reader:
    """Reads msgpack's heads from `at`; nothing reaches beyond `end`."""

    def __init__(self, file: BinaryIO, at: int, end: int):
        self._file, self.at, self._end = file, at, end

    def take(self, count: int, what: str) -> bytes:
        if count > self._end - self.at:
            raise _Fault(f"{what} is cut short")
        self._file.seek(self.at)
        found = self._file.read(count)
        if len(found) != count:
            raise _Fault(f"{what} is cut short")
        self.at += count
        return found

    def room(self, count: int, what: str) -> int:
        """A length that was read, if so many bytes are left."""
        if count > self._end - self.at:
            raise _Fault(
                f"{what} has {count} bytes, of which {self._end - self.at} are there: the file is "
                "cut short or damaged"
            )
        return count

    def skip(self, count: int) -> None:
        self.at += count

    def done(self, what: str) -> None:
        if self.at != self._end:
            raise _Fault(f"{what} is followed by {self._end - self.at} bytes too many")

    def integer(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def length(self, what: str, small: tuple[int, int] | None, codes: dict[int, str]) -> int:
        """The length in a head: in its own low bits, or in the bytes after it."""
        head = self.take(1, what)[0]
        if small is not None and small[0] <= head < small[0] + small[1]:
            return head - small[0]
        if head not in codes:
            raise _Fault(f"byte {head:#04x} where {what} should begin")
        return self.integer(codes[head], what)

    def array_of(self, count: int | None, what: str) -> int:
        found = self.length(what, (0x90, 16), {0xDC: ">H", 0xDD: ">I"})
        if count is not None and found != count:
            raise _Fault(f"{what} has {found} parts")
        if found > _MOST:
            raise _Fault(f"{what} has {found} parts; {_MOST} at most are read")
        return found

    def map_of(self, what: str) -> int:
        found = self.length(what, (0x80, 16), {0xDE: ">H", 0xDF: ">I"})
        if found > _MOST:
            raise _Fault(f"{what} has {found} entries; {_MOST} at most are read")
        return found

    def text(self, what: str) -> str:
        found = self.length(what, (0xA0, 32), {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"})
        if found > _MOST:
            raise _Fault(f"{what} has {found} bytes; {_MOST} at most are read")
        try:
            return self.take(found, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Fault(f"{what} is not text ({error.reason})") from error

    def binary(self, what: str) -> int:
        """The length of a byte string, which begins at `at` now."""
        return self.room(self.length(what, None, {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}), what)

    def whole_number(self, what: str) -> int:
        head = self.take(1, what)[0]
        if head < 0x80:
            return head
        codes = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
        if head not in codes:
            raise _Fault(f"byte {head:#04x} where {what} should begin")
        return self.integer(codes[head], what)

    def extension(self, what: str) -> "_Reader":
        """A reader of the payload of an extension of type 1; this one goes on behind it."""
        head = self.take(1, what)[0]
        codes = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
        fixed = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
        if head not in codes and head not in fixed:
            raise _Fault(f"byte {head:#04x} where {what} should begin")
        size = fixed[head] if head in fixed else self.integer(codes[head], what)
        kind = self.take(1, what)[0]
        if kind != 1:
            raise _Fault(f"{what} is an extension of type {kind}; arrays are of type 1")
        inner = _Reader(self._file, self.at, self.at + self.room(size, what))
        self.skip(size)
        return inner

    def head(self) -> int:
        """The next byte, not taken."""
        found = self.take(1, "a value")
        self.at -= 1
        return found[0]


def _key(reader: _Reader) -> Name:
    return tuple(reader.text("a key") for _ in range(reader.array_of(None, "a key")))


def _array(path: Path, reader: _Reader) -> StoredArray:
    head = reader.head()
    chunked = 0x80 <= head < 0x90 or head in (0xDE, 0xDF)
    found = _chunks(path, reader) if chunked else _ndarray(path, reader.extension("an array"))
    reader.done("the array")
    return found


def _ndarray(path: Path, reader: _Reader) -> StoredArray:
    reader.array_of(3, "an array's [shape, type, bytes]")
    rank = reader.array_of(None, "a shape")
    shape = tuple(reader.whole_number("a shape") for _ in range(rank))
    name = reader.text("a type")
    if name not in _DTYPES:
        raise _Fault(f"an array of type {name!r}; {', '.join(_DTYPES)} are read")
    dtype = _DTYPES[name]
    size = reader.binary("an array")
    if math.prod(shape) * dtype.itemsize != size:
        raise _Fault(f"{size} bytes for an array {name}{list(shape)}")
    at = reader.at
    reader.skip(size)
    reader.done("an array's [shape, type, bytes]")
    return StoredArray(path, dtype, shape, ((at, size),))


def _chunks(path: Path, reader: _Reader) -> StoredArray:
    """An array in several parts: `{marker: true, "shape": {"0": n}, "chunks": {"0": part}}`."""
    shape: list[int] | None = None
    parts: list[StoredArray] | None = None
    marked = False
    for _ in range(reader.map_of("an array in parts")):
        name = reader.text("a name in an array in parts")
        if name == _CHUNKED:
            marked = reader.take(1, "the mark of an array in parts") == b"\xc3"
        elif name == "shape":
            shape = _numbered(reader, lambda: reader.whole_number("a shape"))
        elif name == "chunks":
            parts = _numbered(reader, lambda: _ndarray(path, reader.extension("a part")))
        else:
            raise _Fault(f"{name!r} in an array in parts")
    if not marked or shape is None or not parts:
        raise _Fault("an array in parts lacks its mark, shape or parts")
    dtype = parts[0].dtype
    total = sum(math.prod(part.shape) for part in parts)
    if any(part.dtype != dtype for part in parts) or total != math.prod(shape):
        raise _Fault(f"parts of {total} values in all for an array {dtype}{shape}")
    return StoredArray(path, dtype, tuple(shape), tuple(part.parts[0] for part in parts))


def _numbered(reader: _Reader, read: Callable[[], object]) -> list:
    """The values of a map with the keys "0", "1" and so on, in any order."""
    count = reader.map_of("a numbered list")
    found = {reader.text("a number"): read() for _ in range(count)}
    if set(found) != {str(i) for i in range(count)}:
        raise _Fault(f"a list numbered {sorted(found)[:5]}")
    return [found[str(i)] for i in range(count)]
