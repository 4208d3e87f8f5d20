"""Token files as bytes: safetensors with one versioned, checksummed block of JSON facts.

A file is opened for its header alone; arrays and rows of arrays are read when asked for.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import safetensors.numpy

from ._sealed import write_bytes

FORMAT = "elastictok.tokens"
VERSION = 1
# Ours take about 2000 bytes; it is also what json.loads may take memory in proportion to.
MOST_HEADER = 2**20

# Everything that the format may hold, little-endian as safetensors has it. A closed table: a dtype
# that is not in it makes the file foreign.
_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_VALUES = ("codes", "latents")


class TokenFileError(ValueError):
    """A token file cannot be read, or does not belong to the model that should decode it."""


def smallest_unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds `largest`.

    **Raises:** `ValueError` if 32 bits do not.
    """
    for name in ("U8", "U16", "U32"):
        if 0 <= largest <= np.iinfo(_DTYPES[name]).max:
            return _DTYPES[name]
    raise ValueError(f"{largest} does not fit into an unsigned integer of 32 bits")


def write(path: Path, facts: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the new one.

    **Raises:** `ValueError` if the facts are too long.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    about = {
        "version": VERSION,
        "sha256": _checksum(facts, arrays, _layout(arrays)),
        "sha256_index": _checksum(facts, _without_values(arrays), _layout(arrays)),
        "facts": facts,
    }
    # One entry only: safetensors writes several in no particular order, and equal tokens should
    # make equal files.
    raw = safetensors.numpy.save(arrays, metadata={FORMAT: _canonical(about)})
    header = int.from_bytes(raw[:8], "little")
    if header > MOST_HEADER:
        raise ValueError(
            f"the facts of these tokens take {header} bytes, and {MOST_HEADER} are allowed; "
            "shorten the fingerprint"
        )
    write_bytes(path, raw)


@final
@dataclass(frozen=True)
class Layout:
    """Where an array lies.

    - `start`: its first byte in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Of one row along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@final
class Container:
    """An open file, of which the header has been read and `sha256_index` is right.

    - `facts`: as they were written, of any type.
    - `layouts`: of all arrays, by name.
    - `arrays`: all but the codes or latents.

    **Raises:** `TokenFileError` if it is damaged, foreign or of another version; `OSError` if it
    cannot be opened.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        # Unbuffered, so that no more is read than was asked for.
        self._file = path.open("rb", buffering=0)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header, self.layouts = _header(self.path, size, self._read)
        self._about = _about(self.path, header)
        self.facts: dict[str, Any] = self._about["facts"]
        self.arrays = {name: self.array(name) for name in self.layouts if name not in _VALUES}
        self._check("sha256_index", self.arrays)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def array(self, name: str) -> np.ndarray:
        """Reads a whole array."""
        layout = self.layouts[name]
        size = layout.row_bytes * layout.shape[0]
        array = np.frombuffer(self._read(layout.start, size), layout.dtype).reshape(layout.shape)
        if layout.dtype == np.bool_ and np.any(array.view(np.uint8) > 1):
            raise TokenFileError(
                f"{self.path} is damaged: {name} holds bytes that are neither 0 nor 1"
            )
        return array

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads rows of an array: bytes, which are to be checked by the caller."""
        layout = self.layouts[name]
        size = (stop - start) * layout.row_bytes
        raw = self._read(layout.start + start * layout.row_bytes, size)
        return np.frombuffer(raw, layout.dtype).reshape(stop - start, *layout.shape[1:])

    def check_all(self, values: Mapping[str, np.ndarray]) -> None:
        """**Raises:** `TokenFileError` if `sha256` is not that of the arrays with these values."""
        self._check("sha256", {**self.arrays, **values})

    def _check(self, which: str, arrays: Mapping[str, np.ndarray]) -> None:
        layout = [(n, at.dtype, at.shape) for n, at in sorted(self.layouts.items())]
        facts = self.facts
        if not isinstance(facts, dict) or self._about[which] != _checksum(facts, arrays, layout):
            raise TokenFileError(
                f"{self.path} is damaged: its content does not have the checksum that it was "
                "written with; copy or encode it again"
            )

    def _read(self, start: int, size: int) -> bytearray:
        """Bytes that the header has promised to be there."""
        raw = bytearray(size)
        rest = memoryview(raw)
        with self._lock:
            self._file.seek(start)
            while rest:
                count = self._file.readinto(rest)
                if not count:
                    raise TokenFileError(f"{self.path} is cut short; copy or encode it again")
                rest = rest[count:]
        return raw


def _header(path: Path, size: int, read: Any) -> tuple[dict[str, Any], dict[str, Layout]]:
    """The metadata, and where the arrays are: they fill the rest of the file, one after another."""
    try:
        _expect(size >= 8, "of less than 8 bytes")
        length = int.from_bytes(read(0, 8), "little")
        _expect(length <= size - 8, f"whose header should have {length} bytes")
        _expect(length <= MOST_HEADER, f"with a header of {length} bytes, above {MOST_HEADER}")
        header = json.loads(read(8, length).decode("utf-8"))
        _expect(isinstance(header, dict), "whose header is no object")
        metadata = header.pop("__metadata__", None) or {}
        _expect(isinstance(metadata, dict), "whose metadata is no object")
        layouts, end = {}, 0
        # By their places; of two arrays at one place, one must be empty.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            layouts[name], end = _layout_of(path, name, entry, end, 8 + length)
        _expect(8 + length + end == size, f"whose arrays end at {8 + length + end} of {size} bytes")
    except TokenFileError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TokenFileError(
            f"{path} is not a safetensors file, or is damaged or cut short ({error})"
        ) from error
    return metadata, layouts


def _layout_of(
    path: Path, name: str, entry: Mapping[str, Any], begin: int, body: int
) -> tuple[Layout, int]:
    """The layout of the array that begins at `begin`, and where it ends."""
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise TokenFileError(f"{path} is foreign or damaged: {name} is of type {entry['dtype']}")
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    _expect(all(type(n) is int and n >= 0 for n in (*shape, start, end)), f"with a broken {name}")
    _expect(1 <= len(shape) <= 2, f"whose {name} has the shape {shape}")
    _expect(start == begin, f"whose {name} does not begin where the array before it ends")
    _expect(end - start == math.prod(shape) * dtype.itemsize, f"whose {name} is not {shape}")
    return Layout(dtype, tuple(shape), body + start), end


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(f"a file {otherwise}")


def _about(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The format's entry in the metadata."""
    if FORMAT not in metadata:
        raise TokenFileError(
            f"{path} is a safetensors file without {FORMAT!r} in its metadata: it was not written "
            "by Tokens.save, or is damaged"
        )
    try:
        about = json.loads(metadata[FORMAT])
    except (ValueError, TypeError, RecursionError) as error:
        raise TokenFileError(f"{path} is damaged: its metadata is not JSON ({error})") from error
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise TokenFileError(f"{path} is damaged: its metadata states no version")
    if about["version"] != VERSION:
        raise TokenFileError(
            f"{path} has version {about['version']} of the format; this elastictok reads version "
            f"{VERSION}: install the release that wrote it, or encode again"
        )
    return {name: about.get(name) for name in ("facts", "sha256", "sha256_index")}


def _without_values(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if name not in _VALUES}


def _layout(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    return [(name, array.dtype, array.shape) for name, array in arrays.items()]


def _canonical(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, sort_keys=True)


def _checksum(
    facts: Mapping[str, object],
    arrays: Mapping[str, np.ndarray],
    layout: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
) -> str:
    """Over the facts and, in the order of their names, each array's name, type, shape and bytes.

    Arrays that are not given contribute name, type and shape.
    """
    digest = hashlib.sha256()

    def add(part: bytes | memoryview) -> None:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(_canonical(facts).encode())
    for name, dtype, shape in layout:
        add(json.dumps([name, dtype.newbyteorder("<").str, list(shape)]).encode())
        if name in arrays:
            add(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
