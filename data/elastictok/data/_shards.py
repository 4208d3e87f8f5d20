"""Shards, ArrayRecord files of single records, and their index: what all data sets are made of."""

import bisect
import collections
import contextlib
import hashlib
import importlib
import itertools
import mmap
import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from elastictok.data._errors import MediaError

# Open shards keep about ten bytes for each of their records (46 in one of a million).
_MOST_OPEN_RECORDS = 2**22
_MOST_OPEN_SHARDS = 512
_READING = "readahead_buffer_size:0,max_parallelism:0"


def record_module() -> ModuleType:
    """The reader and writer of ArrayRecord files, imported late.

    **Raises:** `RuntimeError` where there is none for this machine.
    """
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise RuntimeError(
            "built data sets need the package array_record, which exists for Linux and for macOS "
            "on arm64; train on the folder of files itself instead"
        ) from error


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def expect(condition: bool) -> None:
    """**Raises:** `ValueError`, for whoever reads a description to say more."""
    if not condition:
        raise ValueError


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def check_shards(shards: Any) -> int:
    """Checks what a description says of its shards, and returns how many records they have.

    **Raises:** `ValueError`, `KeyError` or `TypeError`.
    """
    for shard in shards:
        expect(is_count(shard["records"]) and is_count(shard["file_bytes"]))
        expect(isinstance(shard["sha256"], str))
        # A name in this folder, and no way out of it.
        expect(Path(shard["file"]).name == shard["file"] and "\0" not in shard["file"])
    return sum(shard["records"] for shard in shards)


class Shards:
    """Some shards as one list of records. No more than some of them are open at once.

    **Arguments:**

    - `folder`: where they are.
    - `kind`: of what, for messages.
    - `shards`: as the description has them.
    - `again`: what is to be done again where they are damaged.

    **Raises:** `MediaError` if files are missing or do not have the size they should.
    """

    def __init__(self, folder: Path, kind: str, shards: list[dict[str, Any]], again: str):
        self._folder = folder
        self._shards = shards
        self._again = again
        self._ends = list(itertools.accumulate(shard["records"] for shard in shards))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._open_records = 0
        wrong = [shard["file"] for shard in shards if not self._is_whole(shard)]
        if wrong:
            raise MediaError(
                folder,
                f"{len(wrong)} of {len(shards)} shards of {kind} are missing or cut, such as "
                f"{wrong[0]}; copy them again, or {again}",
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def fingerprint(self) -> str:
        """Of what is in them."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(f"{shard['records']} {shard['sha256']}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> bytes | None:
        """Reads a record; `None` if it is damaged.

        **Raises:** `MediaError` if its shard is.
        """
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        reader = self._reader(shard)
        try:
            (stored,) = reader.read([index - first])
        except (RuntimeError, ValueError, IndexError):
            return None
        return stored

    def close(self) -> None:
        """Closes all shards; they are opened again when needed."""
        while self._readers:
            self._close_one()

    def _reader(self, shard: int) -> Any:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        about = self._shards[shard]
        path = self._folder / about["file"]
        try:
            # As bytes: a path need not be UTF-8.
            reader = record_module().ArrayRecordReader(os.fsencode(path), _READING)
        except (RuntimeError, ValueError, OSError) as error:
            raise MediaError(path, f"cannot be read; copy it again, or {self._again}") from error
        # A file that lost its end opens without complaint and is empty.
        if reader.num_records() != about["records"]:
            with contextlib.suppress(RuntimeError):  # says what is said here
                reader.close()
            raise MediaError(path, f"does not hold its {about['records']} records; {self._again}")
        self._readers[shard] = reader
        self._open_records += about["records"]
        while len(self._readers) > 1 and (
            self._open_records > _MOST_OPEN_RECORDS or len(self._readers) > _MOST_OPEN_SHARDS
        ):
            self._close_one()
        return reader

    def _close_one(self) -> None:
        shard, reader = self._readers.popitem(last=False)
        self._open_records -= self._shards[shard]["records"]
        reader.close()

    def _is_whole(self, shard: dict[str, Any]) -> bool:
        try:
            return (self._folder / shard["file"]).stat().st_size == shard["file_bytes"]
        except OSError:
            return False


class Index:
    """The rows and keys of all records of one kind, mapped into memory and not read.

    **Arguments:**

    - `folder`, `kind`: where they are, in `KIND.index` and `KIND.keys`.
    - `dtype`: of a row, with a field `key_end`.
    - `records`: how many there are.
    - `again`: what is to be done again where they are damaged.

    **Raises:** `MediaError` if they are damaged.
    """

    def __init__(self, folder: Path, kind: str, dtype: np.dtype, records: int, again: str):
        self.rows = _map_rows(folder / f"{kind}.index", dtype, records, again)
        self._keys = _map_keys(folder / f"{kind}.keys", self.rows, again)

    def key(self, index: int) -> str:
        """The key of a record."""
        start = int(self.rows["key_end"][index - 1]) if index else 0
        stop = int(self.rows["key_end"][index])
        return bytes(self._keys[start:stop]).decode("utf-8", "surrogateescape")


def _map_rows(path: Path, dtype: np.dtype, records: int, again: str) -> np.ndarray:
    if not records:
        return np.empty(0, dtype)
    try:
        index = np.memmap(path, dtype, "r")
    except (OSError, ValueError) as error:
        raise MediaError(path, f"cannot be read ({error})") from error
    if len(index) != records:
        raise MediaError(path, f"has {len(index)} rows for {records} records; {again}")
    return index


def _map_keys(path: Path, rows: np.ndarray, again: str) -> mmap.mmap | bytes:
    if not len(rows):
        return b""
    try:
        with path.open("rb") as file:
            keys = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise MediaError(path, f"cannot be read ({error})") from error
    if len(keys) != int(rows["key_end"][-1]):
        raise MediaError(path, f"does not have the length that the index says; {again}")
    return keys


class ShardWriter:
    """Writes a shard and its part of the index, under temporary names until they are whole.

    **Arguments:**

    - `path`: of the shard.
    - `index`, `keys`: of the parts of the index.
    - `dtype`: of a row of the index.
    """

    def __init__(self, path: Path, index: Path, keys: Path, dtype: np.dtype):
        self._path = path
        self._index_path = index
        self._keys_path = keys
        self._dtype = dtype
        self._temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
        self._writer: Any = None
        self._digest = hashlib.sha256()
        self._rows: list[tuple] = []
        self._keys: list[bytes] = []

    def add(self, key: str, stored: bytes, row: tuple) -> None:
        """Adds a record.

        **Arguments:**

        - `key`: of it.
        - `stored`: the record.
        - `row`: of the index, with the end of its key still open.
        """
        if self._writer is None:
            # Groups of one, so that a record is read without its neighbours; not compressed, for
            # what is in them cannot be compressed further.
            options = "group_size:1,uncompressed"
            self._writer = record_module().ArrayRecordWriter(os.fsencode(self._temporary), options)
        self._writer.write(stored)
        self._digest.update(len(stored).to_bytes(8, "little") + stored)
        self._keys.append(key.encode("utf-8", "surrogateescape"))
        self._rows.append(row)

    def commit(self) -> dict[str, Any] | None:
        """Gives the shard its name and says what is in it; `None` if nothing is."""
        if self._writer is None:
            self._path.unlink(missing_ok=True)
            return None
        self._writer.close()
        self._writer = None
        self._check_written()
        sync(self._temporary)
        os.replace(self._temporary, self._path)
        index = np.array(self._rows, self._dtype)
        index["key_end"] = np.cumsum([len(key) for key in self._keys])
        write_whole(self._index_path, index.tobytes())
        write_whole(self._keys_path, b"".join(self._keys))
        return {
            "file": self._path.name,
            "records": len(self._rows),
            "file_bytes": self._path.stat().st_size,
            "sha256": self._digest.hexdigest(),
            "key_bytes": sum(map(len, self._keys)),
        }

    def _check_written(self) -> None:
        """A file that lost its end opens without complaint and is empty."""
        reader = record_module().ArrayRecordReader(os.fsencode(self._temporary), _READING)
        count = reader.num_records()
        reader.close()
        if count != len(self._rows):
            raise OSError(
                f"{self._path}: {len(self._rows)} records were written and {count} are there; is "
                "the disk full? Make room and run the same command to go on"
            )

    def discard(self) -> None:
        """Leaves nothing unfinished behind."""
        if self._writer is not None:
            # It fails again if it has failed, on a full disk for one; that was said already.
            with contextlib.suppress(RuntimeError):
                self._writer.close()
            self._writer = None
        self._temporary.unlink(missing_ok=True)


def join_index(
    parts: list[tuple[Path, Path, int]], folder: Path, kind: str, dtype: np.dtype, scratch: Path
) -> None:
    """Writes the index of all records of a kind.

    **Arguments:**

    - `parts`: of each shard the index, the keys and how many bytes those have.
    - `folder`, `kind`, `dtype`: see [`Index`][].
    - `scratch`: a folder on the same disk, for files that are not whole.
    """
    temporary = {
        what: scratch / f"{kind}.{what}-{secrets.token_hex(8)}" for what in ("index", "keys")
    }
    base = 0
    with temporary["index"].open("wb") as index, temporary["keys"].open("wb") as keys:
        for index_path, keys_path, key_bytes in parts:
            rows = np.fromfile(index_path, dtype)
            rows["key_end"] += base
            base += key_bytes
            index.write(rows.tobytes())
            keys.write(keys_path.read_bytes())
    for what, path in temporary.items():
        sync(path)
        os.replace(path, folder / f"{kind}.{what}")
