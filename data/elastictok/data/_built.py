"""Data sets that were built: reading records and the index.

A folder with `dataset.json`, which names the shards (ArrayRecord files of single records); and for
each kind `KIND.index`, an array of fixed rows that is mapped into memory and not read, and
`KIND.keys`, the keys one after the other.
"""

import bisect
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import mmap
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from elastictok.data._errors import MediaError
from elastictok.data._record import Record
from elastictok.data._source import AbstractLibrary
from elastictok.data._stored import Stored

DATASET = "dataset.json"
FORMAT = "elastictok-data"
VERSION = 1
KINDS = ("pictures", "clips")
INDEX = np.dtype(
    [
        ("bytes", "<u8"),
        ("key_end", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("frames", "<u4"),
        ("missing", "<u4"),
        ("fps", "<f8"),
        ("duration", "<f8"),
    ]
)
"""What the index says of a record: bytes of the file, where its key ends, and as in [`Record`][];
0 where that has `None`."""

# Open shards keep about ten bytes for each of their records (46 in one of a million).
_MOST_OPEN_RECORDS = 2**22
_MOST_OPEN_SHARDS = 512
READING = "readahead_buffer_size:0,max_parallelism:0"


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


def shard_name(kind: str, task: int) -> str:
    return f"{kind}-{task:05d}.arrayrecord"


def index_row(record: Record) -> tuple[int, int, int, int, int, int, float, float]:
    """The row of a record, with the end of its key still open."""
    return (
        len(record.data),
        0,
        record.height,
        record.width,
        record.frames,
        record.missing,
        record.fps or 0.0,
        record.duration or 0.0,
    )


def is_built(folder: Path) -> bool:
    """Whether a folder holds a data set, or the beginning of one."""
    return (folder / DATASET).exists() or (folder / "build" / "plan").exists()


def read_description(folder: Path) -> dict[str, Any]:
    """What `dataset.json` says.

    **Raises:** `MediaError` if it is not there, damaged, or of another version.
    """
    path = folder / DATASET
    if not path.exists():
        reason = "not a built data set; make one by `elastictok data build FOLDER --out OUT`"
        if is_built(folder):
            reason = "its build is not complete; run the same `elastictok data build` to go on"
        raise MediaError(folder, reason)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _expect(content["format"] == FORMAT)
        version = content["version"]
        _expect(type(version) is int)
        if version == VERSION:
            _check_description(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MediaError(path, "damaged, or not written by elastictok") from error
    if version != VERSION:
        raise MediaError(
            path, f"of version {version}, and this elastictok reads {VERSION}; build it again"
        )
    return content


def _check_description(content: Any) -> None:
    """Nothing of it is used unseen: neither counts nor the names of files."""
    _expect(isinstance(content["settings"]["encoding"], dict))
    _expect(all(_is_count(content[name]) for name in ("tasks", "rejected", "damaged")))
    for kind in KINDS:
        about = content["kinds"][kind]
        _expect(isinstance(about["licences"], dict) and _is_count(about["bytes"]))
        for shard in about["shards"]:
            _expect(_is_count(shard["records"]) and _is_count(shard["file_bytes"]))
            _expect(isinstance(shard["sha256"], str))
            # A name in this folder, and no way out of it.
            _expect(Path(shard["file"]).name == shard["file"] and "\0" not in shard["file"])
        _expect(_is_count(about["records"]))
        _expect(about["records"] == sum(shard["records"] for shard in about["shards"]))


def _expect(condition: bool) -> None:
    if not condition:
        raise ValueError


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


class BuiltDataset:
    """A data set that `build` made.

    **Arguments:**

    - `folder`: the one that was given to it as `out`.

    **Raises:** `MediaError` if it is not complete, or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.description = read_description(folder)
        self.pictures = Records(folder, "pictures", self.description["kinds"]["pictures"]["shards"])
        self.clips = Records(folder, "clips", self.description["kinds"]["clips"]["shards"])


class Records(AbstractLibrary):
    """The records of one kind, by number. Reading one leaves the others alone.

    Memory does not grow with the number of records: the index is mapped, and no more than some
    shards are open at once.

    **Arguments:**

    - `folder`: of the data set.
    - `kind`: pictures or clips.
    - `shards`: as `dataset.json` has them.

    **Raises:** `MediaError` if files are missing or do not have the size they should.
    """

    def __init__(self, folder: Path, kind: str, shards: list[dict[str, Any]]):
        self._folder = folder
        self._kind = kind
        self._shards = shards
        self._ends = list(itertools.accumulate(shard["records"] for shard in shards))
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._open_records = 0
        wrong = [shard["file"] for shard in shards if not self._is_whole(shard)]
        if wrong:
            raise MediaError(
                folder,
                f"{len(wrong)} of {len(shards)} shards of {kind} are missing or cut, such as "
                f"{wrong[0]}; copy them again, or build again",
            )
        self.index = self._map_index()
        self._keys = self._map_keys()

    def __reduce__(self):
        # Files are opened anew in a worker.
        return Records, (self._folder, self._kind, self._shards)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def key(self, index: int) -> str:
        """The key of a record."""
        start = int(self.index["key_end"][index - 1]) if index else 0
        stop = int(self.index["key_end"][index])
        return bytes(self._keys[start:stop]).decode("utf-8", "surrogateescape")

    def name(self, index: int) -> str:
        return f"{self._folder}:{self.key(index)}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(f"{shard['records']} {shard['sha256']}\n".encode())
        return digest.hexdigest()

    def stored(self, index: int) -> Stored:
        return self[index].blob

    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        **Raises:** `IndexError`; `MediaError` if it is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} {self._kind}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        reader = self._reader(shard)
        try:
            (stored,) = reader.read([index - first])
        except (RuntimeError, ValueError, IndexError) as error:
            raise MediaError(self.name(index), "its record is damaged; build again") from error
        return Record.from_bytes(stored, self.name(index))

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
            reader = record_module().ArrayRecordReader(os.fsencode(path), READING)
        except (RuntimeError, ValueError, OSError) as error:
            raise MediaError(path, "cannot be read; copy it again, or build again") from error
        # A file that lost its end opens without complaint and is empty.
        if reader.num_records() != about["records"]:
            with contextlib.suppress(RuntimeError):  # says what is said here
                reader.close()
            raise MediaError(path, f"does not hold its {about['records']} records; build again")
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

    def _map_index(self) -> np.ndarray:
        path = self._folder / f"{self._kind}.index"
        if not len(self):
            return np.empty(0, INDEX)
        try:
            index = np.memmap(path, INDEX, "r")
        except (OSError, ValueError) as error:
            raise MediaError(path, f"cannot be read ({error})") from error
        if len(index) != len(self):
            raise MediaError(path, f"has {len(index)} rows for {len(self)} records; build again")
        return index

    def _map_keys(self) -> mmap.mmap | bytes:
        path = self._folder / f"{self._kind}.keys"
        if not len(self):
            return b""
        try:
            with path.open("rb") as file:
                keys = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise MediaError(path, f"cannot be read ({error})") from error
        if len(keys) != int(self.index["key_end"][-1]):
            raise MediaError(path, "does not have the length that the index says; build again")
        return keys
