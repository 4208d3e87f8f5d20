"""Data sets that were built: reading records and the index.

A folder with `dataset.json`, which names the shards (ArrayRecord files of single records); and for
each kind `KIND.index`, an array of fixed rows that is mapped into memory and not read, and
`KIND.keys`, the keys one after the other.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from elastictok.data._errors import MediaError
from elastictok.data._record import Record
from elastictok.data._shards import Index, Shards, check_shards, expect, is_count
from elastictok.data._source import AbstractLibrary
from elastictok.data._stored import Stored

DATASET = "dataset.json"
FORMAT = "elastictok-data"
VERSION = 1
KINDS = ("pictures", "clips")
_AGAIN = "build again"
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
        expect(content["format"] == FORMAT)
        version = content["version"]
        expect(type(version) is int)
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
    expect(isinstance(content["settings"]["encoding"], dict))
    expect(all(is_count(content[name]) for name in ("tasks", "rejected", "damaged")))
    for kind in KINDS:
        about = content["kinds"][kind]
        expect(isinstance(about["licences"], dict) and is_count(about["bytes"]))
        expect(is_count(about["records"]) and about["records"] == check_shards(about["shards"]))


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
        self._files = Shards(folder, kind, shards, _AGAIN)
        self._index = Index(folder, kind, INDEX, len(self), _AGAIN)
        self.index = self._index.rows

    def __reduce__(self):
        # Files are opened anew in a worker.
        return Records, (self._folder, self._kind, self._shards)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """The key of a record."""
        return self._index.key(index)

    def name(self, index: int) -> str:
        return f"{self._folder}:{self.key(index)}"

    def fingerprint(self) -> str:
        return self._files.fingerprint()

    def stored(self, index: int) -> Stored:
        return self[index].blob

    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        **Raises:** `IndexError`; `MediaError` if it is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} {self._kind}")
        stored = self._files.read(index)
        if stored is None:
            raise MediaError(self.name(index), f"its record is damaged; {_AGAIN}")
        return Record.from_bytes(stored, self.name(index))

    def close(self) -> None:
        """Closes all shards; they are opened again when needed."""
        self._files.close()
