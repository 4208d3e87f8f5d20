"""One task of a build: from files to a shard of pictures, a shard of clips and their indices."""

import collections
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastictok.data._built import INDEX, KINDS, READING, index_row, record_module, shard_name
from elastictok.data._errors import MediaError
from elastictok.data._plan import Plan
from elastictok.data._prepare import Encoding, Listed, make_record
from elastictok.data._record import Record

Make = Callable[[Listed, Encoding], Record]


def run_task(
    found: Plan,
    index: int,
    *,
    make: Make = make_record,
    fatal: Sequence[str] = (),
    count: Callable[[int, bool], None] | None = None,
) -> None:
    """Makes the shards of a task. Made twice, they are replaced by the same.

    **Arguments:**

    - `found`: the plan.
    - `index`: of the task.
    - `make`: makes the record of a file.
    - `fatal`: keys of files that are not to be opened, because a process died of it.
    - `count`: told of every file: its bytes, and whether it was rejected.
    """
    task = found.tasks[index]
    shards = {kind: _Shard(found, index, kind) for kind in KINDS}
    rejected: list[tuple[str, str]] = []
    damaged: list[tuple[str, int]] = []
    with contextlib.ExitStack() as stack:
        for shard in shards.values():
            stack.callback(shard.discard)
        reading = stack.enter_context(_Heartbeat(found.heartbeat(index)))
        for listed, size in found.listed(task):
            reading.beat(listed.key)
            try:
                if listed.key in fatal:
                    reason = "the process that read it died: no memory, or a fault of a decoder"
                    raise MediaError(listed.path, reason)
                record = make(listed, found.encoding)
                shards[f"{record.kind}s"].add(record)
                if record.missing:
                    damaged.append((listed.key, record.missing))
                good = True
            except MediaError as error:
                rejected.append((listed.key, error.reason))
                good = False
            if count is not None:
                count(size, not good)
        result: dict[str, Any] = {kind: shard.commit() for kind, shard in shards.items()}
    result |= {"rejected": rejected, "damaged": damaged}
    write_whole(found.marker(index), json.dumps(result).encode())


class _Heartbeat:
    """Tells on disk which file is being read, for whoever finds the process dead."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "_Heartbeat":
        self._file = self._path.open("wb", buffering=0)
        return self

    def beat(self, key: str) -> None:
        line = json.dumps(key).encode() + b"\n"
        self._file.seek(0)
        self._file.write(line)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class _Shard:
    """The records of one kind in one task, under temporary names until they are whole."""

    def __init__(self, found: Plan, task: int, kind: str):
        self._path = found.out / shard_name(kind, task)
        self._index_path = found.part(task, kind, "index")
        self._keys_path = found.part(task, kind, "keys")
        self._temporary = found.out / f".{self._path.name}-{secrets.token_hex(8)}.tmp"
        self._writer: Any = None
        self._digest = hashlib.sha256()
        self._rows: list[tuple] = []
        self._keys: list[bytes] = []
        self._licences: collections.Counter[str] = collections.Counter()
        self._bytes = 0

    def add(self, record: Record) -> None:
        stored = record.to_bytes()
        if self._writer is None:
            # Groups of one, so that a record is read without its neighbours; not compressed, for
            # the files are already.
            options = "group_size:1,uncompressed"
            self._writer = record_module().ArrayRecordWriter(os.fsencode(self._temporary), options)
        self._writer.write(stored)
        self._digest.update(len(stored).to_bytes(8, "little") + stored)
        self._keys.append(record.key.encode("utf-8", "surrogateescape"))
        self._rows.append(index_row(record))
        self._bytes += len(record.data)
        self._licences[record.licence] += 1

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
        index = np.array(self._rows, INDEX)
        index["key_end"] = np.cumsum([len(key) for key in self._keys])
        write_whole(self._index_path, index.tobytes())
        write_whole(self._keys_path, b"".join(self._keys))
        return {
            "file": self._path.name,
            "records": len(self._rows),
            "bytes": self._bytes,
            "file_bytes": self._path.stat().st_size,
            "sha256": self._digest.hexdigest(),
            "key_bytes": sum(map(len, self._keys)),
            "licences": dict(self._licences.most_common(100)),
        }

    def _check_written(self) -> None:
        """A file that lost its end opens without complaint and is empty."""
        reader = record_module().ArrayRecordReader(os.fsencode(self._temporary), READING)
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
