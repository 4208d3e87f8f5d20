"""One task of a build: from files to a shard of pictures, a shard of clips and their indices."""

import collections
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elastictok.data._built import INDEX, KINDS, index_row, shard_name
from elastictok.data._errors import MediaError
from elastictok.data._plan import Plan
from elastictok.data._prepare import Encoding, Listed, make_record
from elastictok.data._record import Record
from elastictok.data._shards import ShardWriter, write_whole

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
    """The records of one kind in one task."""

    def __init__(self, found: Plan, task: int, kind: str):
        self._writer = ShardWriter(
            found.out / shard_name(kind, task),
            found.part(task, kind, "index"),
            found.part(task, kind, "keys"),
            INDEX,
        )
        self._licences: collections.Counter[str] = collections.Counter()
        self._bytes = 0

    def add(self, record: Record) -> None:
        self._writer.add(record.key, record.to_bytes(), index_row(record))
        self._bytes += len(record.data)
        self._licences[record.licence] += 1

    def commit(self) -> dict[str, Any] | None:
        """Gives the shard its name and says what is in it; `None` if nothing is."""
        made = self._writer.commit()
        if made is None:
            return None
        licences = dict(self._licences.most_common(100))
        return made | {"bytes": self._bytes, "licences": licences}

    def discard(self) -> None:
        """Leaves nothing unfinished behind."""
        self._writer.discard()
