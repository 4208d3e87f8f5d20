"""Building data sets: from folders of files to shards of records and an index.

A build is first planned: the files are listed on disk, sorted, and the list is cut into tasks. A
task makes one shard of pictures and one of clips, and is done when its marker is there, which is
written last. What a task makes depends on the list alone, not on who runs it: a process, a job of
an array of jobs, a worker of Apache Beam.

    OUT/build/plan/             the list: key, folder, path below it, bytes; settings and tasks
    OUT/build/parts/            index of each task
    OUT/build/done/             marker of each task
    OUT/pictures-00000.arrayrecord, OUT/clips-00000.arrayrecord, ...
    OUT/rejected.tsv, OUT/damaged.tsv
    OUT/dataset.json, OUT/pictures.index, OUT/pictures.keys, ...    when all tasks are done
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np

from elastictok.data._built import (
    DATASET,
    FORMAT,
    INDEX,
    KINDS,
    VERSION,
    index_row,
    read_description,
    record_module,
    shard_name,
)
from elastictok.data._errors import MediaError
from elastictok.data._find import walk
from elastictok.data._prepare import Encoding, Listed, make_record
from elastictok.data._record import Record

REJECTED = "rejected.tsv"
DAMAGED = "damaged.tsv"
_MOST_FILES = 2**14  # of one shard: reading a record takes longer the more a shard has
_SMALLEST_SHARD = 4 * 2**20
_LARGEST_SHARD = 256 * 2**20

Make = Callable[[Listed, Encoding], Record]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a build is.

    **Arguments:**

    - `files`, `bytes`: of the files that are done, among all that the caller has to do.
    - `all_files`, `all_bytes`: the sums of those.
    - `rejected`: files that cannot be used.
    - `seconds`: since the caller began.
    """

    files: int
    bytes: int
    all_files: int
    all_bytes: int
    rejected: int
    seconds: float

    @property
    def files_per_second(self) -> float:
        """Rate of this caller."""
        return self.files / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """From the bytes still to come and the rate so far; `None` before anything is known."""
        if not self.bytes:
            return None
        return (self.all_bytes - self.bytes) * self.seconds / self.bytes


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build came to.

    **Arguments:**

    - `out`: the folder.
    - `complete`: whether all tasks are done, so that the data set can be used.
    - `records`: of pictures and of clips, in the tasks that are done.
    - `rejected`, `damaged`: files that could not be used, and clips that hold fewer frames than
        they promise, in the tasks that are done.
    - `tasks`, `done`: how many there are and how many are done.
    """

    out: Path
    complete: bool
    records: dict[str, int]
    rejected: int
    damaged: int
    tasks: int
    done: int

    def __str__(self) -> str:
        pictures, clips = (self.records[kind] for kind in KINDS)
        text = f"{self.out}: {pictures} pictures and {clips} clips"
        if self.rejected:
            text += f"; {self.rejected} files rejected, see {self.out / REJECTED}"
        if self.damaged:
            text += f"; {self.damaged} clips lack frames, see {self.out / DAMAGED}"
        if not self.complete:
            text += f"; {self.done} of {self.tasks} tasks done: run the same command to go on"
        return text


@dataclasses.dataclass(frozen=True)
class _Task:
    """A range of lines of the list."""

    index: int
    offset: int
    files: int
    bytes: int


class Plan:
    """A build on disk: its list of files, its tasks, and which of them are done.

    **Arguments:**

    - `out`: the folder of the data set, in which a build was planned.
    """

    def __init__(self, out: Path):
        self.out = out
        self.folder = out / "build"
        stored = json.loads((self.folder / "plan" / "plan.json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = stored["settings"]
        self.encoding = Encoding(**self.settings["encoding"])
        self.roots = [Path(os.fsdecode(bytes.fromhex(root))) for root in stored["roots"]]
        self.tasks = [_Task(i, *task) for i, task in enumerate(stored["tasks"])]

    def marker(self, task: int) -> Path:
        """The file that says that a task is done, and what it made."""
        return self.folder / "done" / f"{task:06d}.json"

    def part(self, task: int, kind: str, what: str) -> Path:
        """A part of the index."""
        return self.folder / "parts" / f"{kind}-{task:06d}.{what}"

    def heartbeat(self, task: int) -> Path:
        """Which file of the list is being read."""
        return self.folder / "parts" / f"{task:06d}.reading"

    def open_tasks(self, shard: tuple[int, int]) -> list[_Task]:
        """Tasks of a job that are not done."""
        return [t for t in self.tasks[shard[0] :: shard[1]] if not self.marker(t.index).exists()]

    def listed(self, task: _Task) -> Iterator[tuple[Listed, int]]:
        """The files of a task, and the bytes of each."""
        with (self.folder / "plan" / "files.jsonl").open("rb") as lines:
            lines.seek(task.offset)
            for line in itertools.islice(lines, task.files):
                key, root, below, size, *about = json.loads(line)
                path = self.roots[root]
                yield Listed(key, path / below if below else path, *about), size

    def results(self) -> list[dict[str, Any] | None]:
        """What each task made; `None` if it is not done."""
        found: list[dict[str, Any] | None] = []
        for task in self.tasks:
            try:
                found.append(json.loads(self.marker(task.index).read_text(encoding="utf-8")))
            except FileNotFoundError:
                found.append(None)
        return found


def plan_for(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    resolution: int | None,
    fps: float | int | None,
    source: str,
    licence: str,
    table: str | os.PathLike[str] | None,
    shard_bytes: int | None,
) -> Plan | None:
    """Lists the files and cuts the list into tasks, or takes up the plan that `out` holds; `None`
    if the data set is complete.

    For the arguments and errors see [`build`][].
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    record_module()  # before any work: it may not be installed
    roots = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    folders = [Path(root) for root in roots]
    encoding = Encoding(resolution, None if fps is None else float(fps))
    _check_folders(folders, out)
    settings = {
        "folders": [os.path.abspath(folder) for folder in folders],
        "encoding": dataclasses.asdict(encoding),
        "source": source,
        "licence": licence,
        "table": None if table is None else os.path.abspath(table),
        "shard_bytes": shard_bytes,
    }
    settings = json.loads(json.dumps(settings))
    if (out / DATASET).exists():
        _check_same(out, read_description(out)["settings"], settings)
        return None
    if not (out / "build" / "plan").exists():
        out.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in out.iterdir() if p.name != "build" and p.name[0] != "."]
        if strangers:
            raise MediaError(
                out, f"holds other files, such as {min(strangers)}; choose an empty folder"
            )
        _write_plan(folders, out / "build", settings)
    found = Plan(out)
    _check_same(out, found.settings, settings)
    return found


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise MediaError(
                out,
                f"its build was begun with {name} = {before.get(name)}, now it is {value}; "
                "go on with the same settings, or choose another folder",
            )


def _check_folders(folders: Sequence[Path], out: Path) -> None:
    if not folders:
        raise ValueError("no folder was given; give at least one folder of pictures or clips")
    real = []
    for folder in folders:
        if not os.path.lexists(folder):
            raise MediaError(folder, "no such file or folder; check the spelling")
        real.append(Path(os.path.realpath(folder)))
    for one, other in itertools.permutations(real, 2):
        if one.is_relative_to(other):
            raise MediaError(one, f"is in {other}, which is given too; give each file once")
    inside = Path(os.path.realpath(out))
    for one in real:
        if inside == one or inside.is_relative_to(one):
            raise MediaError(out, f"lies in {one}, of which it is built; choose another folder")


def _write_plan(folders: Sequence[Path], folder: Path, settings: dict[str, Any]) -> None:
    """Writes list and plan under names of their own; of several jobs, the first one wins."""
    about = _Table(settings["table"], settings["source"], settings["licence"])
    scratch = folder / f"plan-{secrets.token_hex(8)}"
    scratch.mkdir(parents=True)
    try:
        total = 0
        with (scratch / "files.jsonl").open("w", encoding="ascii") as lines:
            for root, (label, path) in enumerate(zip(_labels(folders), folders, strict=True)):
                for below in walk(path) if path.is_dir() else [""]:
                    size = _size(path / below if below else path)
                    total += size
                    key = f"{label}/{below}" if below else label
                    json.dump([key, root, below, size, *about(key, below or path.name)], lines)
                    lines.write("\n")
        about.check_used()
        most = settings["shard_bytes"] or min(max(total // 32, _SMALLEST_SHARD), _LARGEST_SHARD)
        tasks = _tasks(scratch / "files.jsonl", most)
        if not tasks:
            raise MediaError(folders[0], "no file in this folder or below it")
        content = {
            "settings": settings,
            "roots": [os.fsencode(os.path.abspath(path)).hex() for path in folders],
            "tasks": [[task.offset, task.files, task.bytes] for task in tasks],
        }
        (scratch / "plan.json").write_text(json.dumps(content), encoding="utf-8")
        for name in ("parts", "done"):
            (folder / name).mkdir(exist_ok=True)
        # Of several jobs the first one wins: this fails where there is a plan.
        with contextlib.suppress(OSError):
            os.rename(scratch, folder / "plan")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, numbered where two have the same."""
    names: list[str] = []
    for folder in folders:
        name = Path(os.path.abspath(folder)).name or "root"
        fresh = (name if n == 1 else f"{name}.{n}" for n in itertools.count(1))
        names.append(next(label for label in fresh if label not in names))
    return names


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a broken link, of which the reader will say so


def _tasks(files: Path, most: int) -> list[_Task]:
    """Ranges of the list of at most so many bytes, but one file at least."""
    tasks: list[_Task] = []
    offset = start = count = total = 0
    with files.open("rb") as lines:
        for line in lines:
            size = json.loads(line)[3]
            if count and (total + size > most or count == _MOST_FILES):
                tasks.append(_Task(len(tasks), start, count, total))
                start, count, total = offset, 0, 0
            offset += len(line)
            count += 1
            total += size
    if count:
        tasks.append(_Task(len(tasks), start, count, total))
    return tasks


class _Table:
    """Source and licence of each file, from a table with the columns `path`, `source` and
    `licence`, or the same for all."""

    def __init__(self, table: str | None, source: str, licence: str):
        self._all = (source, licence)
        self._rows: dict[str, tuple[str, str]] = {}
        self._path = table
        self._hits = 0
        if table is None:
            return
        with open(table, encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            columns = set(reader.fieldnames or ())
            if "path" not in columns or not columns & {"source", "licence"}:
                raise MediaError(
                    table,
                    "its first line must name the columns path and source or licence, divided by "
                    f"tabs; it names {', '.join(sorted(columns)) or 'none'}",
                )
            for row in reader:
                known = (row.get("source") or source, row.get("licence") or licence)
                self._rows[row["path"]] = known

    def __call__(self, key: str, below: str) -> tuple[str, str]:
        found = self._rows.get(below) or self._rows.get(key)
        self._hits += found is not None
        return found or self._all

    def check_used(self) -> None:
        if self._rows and not self._hits:
            raise MediaError(
                self._path or "",
                f"none of its {len(self._rows)} paths is that of a file here; they must be those "
                "below the folder given, such as " + min(self._rows),
            )


@dataclasses.dataclass(frozen=True)
class _Counters:
    """What the processes of a build have done, in memory that they share."""

    files: "Synchronized[int]"
    bytes: "Synchronized[int]"
    rejected: "Synchronized[int]"

    @classmethod
    def make(cls) -> "_Counters":
        context = multiprocessing.get_context("spawn")
        return cls(context.Value("q"), context.Value("q"), context.Value("q"))

    def add(self, size: int, rejected: bool) -> None:
        """Counts a file of so many bytes."""
        for counter, more in ((self.files, 1), (self.bytes, size), (self.rejected, int(rejected))):
            with counter.get_lock():
                counter.value += more


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
    _write_whole(found.marker(index), json.dumps(result).encode())


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
            self._writer = record_module().ArrayRecordWriter(str(self._temporary), options)
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
        _sync(self._temporary)
        os.replace(self._temporary, self._path)
        index = np.array(self._rows, INDEX)
        index["key_end"] = np.cumsum([len(key) for key in self._keys])
        _write_whole(self._index_path, index.tobytes())
        _write_whole(self._keys_path, b"".join(self._keys))
        return {
            "file": self._path.name,
            "records": len(self._rows),
            "bytes": self._bytes,
            "file_bytes": self._path.stat().st_size,
            "sha256": self._digest.hexdigest(),
            "key_bytes": sum(map(len, self._keys)),
            "licences": dict(self._licences.most_common(100)),
        }

    def discard(self) -> None:
        """Leaves nothing unfinished behind."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_whole(path: Path, data: bytes) -> None:
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


def build(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    fps: float | int | None = None,
    source: str = "",
    licence: str = "",
    table: str | os.PathLike[str] | None = None,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    shard_bytes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    make: Make = make_record,
) -> Built:
    """Builds a data set of pictures and clips, or goes on where an earlier call stopped.

    The result depends on the files and the settings, not on workers, jobs or interruptions. A file
    that cannot be used is named in `rejected.tsv` with its reason; nothing stops for it, nor for
    one whose decoder kills its process, if there are workers.

    **Arguments:**

    - `folders`: as for [`find_media`][]; all files below them are listed, and those of no known
        suffix are rejected.
    - `out`: the folder to make.
    - `resolution`, `fps`: see [`Encoding`][]; by default the bytes of the files are kept.
    - `source`, `licence`: noted in every record.
    - `table`: a file of tab-separated columns `path`, `source`, `licence` that says so for single
        files, by their path below the folder given. It is held in memory.
    - `workers`: processes; 0 for this one. Programs that use them must protect their main module
        by `if __name__ == "__main__":`.
    - `shard`: (index, count) of this job if several build the same data set, on machines that share
        a file system. The one that ends last completes it.
    - `shard_bytes`: of files that go into one shard; by default a 32nd of all, between 4 and
        256 MiB.
    - `progress`: called about once a second, and at the end.
    - `make`: makes the record of a file; with workers, it must be importable.

    **Returns:** what there is now. With several jobs it may not be complete yet.

    **Raises:** `MediaError` for folders that cannot be read, or an `out` that holds something else
    or a build with other settings; `ValueError` for settings that cannot be.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard is {shard}; it must be (index, count), index < count")
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 or more")
    out = Path(out)
    found = plan_for(
        folders,
        out,
        resolution=resolution,
        fps=fps,
        source=source,
        licence=licence,
        table=table,
        shard_bytes=shard_bytes,
    )
    if found is not None:
        try:
            _Crew(found, found.open_tasks(shard), make, progress).run(workers)
        finally:
            if found.folder.exists():
                list_problems(out, found.results())
        finish(found)
    return state_of(out)


class _Crew:
    """Does tasks, in this process or in others, and tells how far it is."""

    def __init__(
        self,
        found: Plan,
        tasks: Sequence[_Task],
        make: Make,
        progress: Callable[[Progress], None] | None,
    ):
        self._plan = found
        self._tasks = tasks
        self._make = make
        self._progress = progress
        self._counters = _Counters.make()
        self._began = time.monotonic()
        self._told = self._began
        self._fatal: dict[int, list[str]] = {}

    def run(self, workers: int) -> None:
        if workers == 0:
            for task in self._tasks:
                run_task(self._plan, task.index, make=self._make, count=self._count)
        else:
            waiting = list(reversed(self._tasks))
            while waiting:
                died = self._run_in_pool(waiting, workers)
                # Whose fault it was shows when each runs alone.
                for task in died:
                    self._run_alone(task)
        self._tell()

    def _run_in_pool(self, waiting: list[_Task], workers: int) -> list[_Task]:
        """Takes tasks from `waiting` until none is left or a process has died; returns those that
        were being done then."""
        with self._pool(workers) as pool:
            running: dict[concurrent.futures.Future[None], _Task] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < workers:
                        task = waiting.pop()
                        running[self._submit(pool, task)] = task
                    done, _ = concurrent.futures.wait(
                        running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        future.result()
                        del running[future]
                    self._tell_now_and_then()
            except concurrent.futures.process.BrokenProcessPool:
                return list(running.values())
            except BaseException:
                _kill(pool)
                raise
        return []

    def _run_alone(self, task: _Task) -> None:
        while not self._plan.marker(task.index).exists():
            with self._pool(1) as pool:
                try:
                    self._submit(pool, task).result()
                except concurrent.futures.process.BrokenProcessPool:
                    key = json.loads(self._plan.heartbeat(task.index).read_bytes().split(b"\n")[0])
                    if key in self._fatal.get(task.index, ()):
                        raise
                    self._fatal.setdefault(task.index, []).append(key)
                except BaseException:
                    _kill(pool)
                    raise
            self._tell_now_and_then()

    def _count(self, size: int, rejected: bool) -> None:
        self._counters.add(size, rejected)
        self._tell_now_and_then()

    def _pool(self, workers: int) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(self._plan.out, self._counters),
        )

    def _submit(
        self, pool: concurrent.futures.ProcessPoolExecutor, task: _Task
    ) -> "concurrent.futures.Future[None]":
        fatal = tuple(self._fatal.get(task.index, ()))
        return pool.submit(_task_of_worker, task.index, self._make, fatal)

    def _tell_now_and_then(self) -> None:
        if time.monotonic() - self._told >= 1:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._progress is not None:
            # A task that was begun again counts its files again.
            files = sum(task.files for task in self._tasks)
            size = sum(task.bytes for task in self._tasks)
            self._progress(
                Progress(
                    files=min(self._counters.files.value, files),
                    bytes=min(self._counters.bytes.value, size),
                    all_files=files,
                    all_bytes=size,
                    rejected=self._counters.rejected.value,
                    seconds=self._told - self._began,
                )
            )


def _kill(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends the processes now: what they were at is begun again another time."""
    for process in list((pool._processes or {}).values()):
        process.kill()


_worker: tuple[Plan, _Counters] | None = None


def _begin_worker(out: Path, counters: _Counters) -> None:
    global _worker
    _worker = Plan(out), counters


def _task_of_worker(index: int, make: Make, fatal: Sequence[str]) -> None:
    assert _worker is not None
    found, counters = _worker
    run_task(found, index, make=make, fatal=fatal, count=counters.add)


def finish(found: Plan) -> None:
    """Joins the parts of the index and declares the data set complete, if all tasks are done.

    Several jobs may do so at once: each writes the same.
    """
    out = found.out
    try:
        results = [result for result in found.results() if result is not None]
        if len(results) < len(found.tasks):
            return
        kinds = {kind: _join(found, kind, results) for kind in KINDS}
        list_problems(out, results)
    except FileNotFoundError:
        if (out / DATASET).exists():
            return
        raise
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": found.settings,
        "tasks": len(results),
        "rejected": sum(len(result["rejected"]) for result in results),
        "damaged": sum(len(result["damaged"]) for result in results),
        "kinds": kinds,
    }
    _write_whole(out / DATASET, json.dumps(content, indent=1).encode())
    # Renamed first, so that another job finds all of it or nothing.
    done = out / f".build-{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(found.folder, done)
    shutil.rmtree(done, ignore_errors=True)
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def _join(found: Plan, kind: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes the index of one kind and says what there is of it."""
    made = [(task, result[kind]) for task, result in enumerate(results) if result[kind]]
    temporary = {what: found.folder / f"{kind}.{what}-{secrets.token_hex(8)}" for what in _WHAT}
    base = 0
    licences: collections.Counter[str] = collections.Counter()
    with temporary["index"].open("wb") as index, temporary["keys"].open("wb") as keys:
        for task, shard in made:
            rows = np.fromfile(found.part(task, kind, "index"), INDEX)
            rows["key_end"] += base
            base += shard["key_bytes"]
            index.write(rows.tobytes())
            keys.write(found.part(task, kind, "keys").read_bytes())
            licences.update(shard["licences"])
    for what, path in temporary.items():
        _sync(path)
        os.replace(path, found.out / f"{kind}.{what}")
    return {
        "records": sum(shard["records"] for _, shard in made),
        "bytes": sum(shard["bytes"] for _, shard in made),
        "licences": dict(licences.most_common(100)),
        "shards": [
            {name: shard[name] for name in ("file", "records", "file_bytes", "sha256")}
            for _, shard in made
        ],
    }


_WHAT = ("index", "keys")


def list_problems(out: Path, results: Sequence[dict[str, Any] | None]) -> None:
    """Writes `rejected.tsv` and `damaged.tsv` of the tasks that are done."""
    for name, header in ((REJECTED, "reason"), (DAMAGED, "missing_frames")):
        kind = name.removesuffix(".tsv")
        rows = [row for result in results if result for row in result[kind]]
        lines = [f"key\t{header}", *(f"{_cell(key)}\t{_cell(about)}" for key, about in rows)]
        _write_whole(out / name, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def _cell(value: object) -> str:
    """Without tabs and line ends, which would break the table."""
    return (
        str(value)
        .replace("\\", "\\\\")
        .replace("\t", "\\t")
        .replace("\n", "\\n")
        .replace("\r", "\\r")
    )


def state_of(out: Path) -> Built:
    """What a build has come to so far."""
    if (out / DATASET).exists():
        content = read_description(out)
        return Built(
            out=out,
            complete=True,
            records={kind: content["kinds"][kind]["records"] for kind in KINDS},
            rejected=content["rejected"],
            damaged=content["damaged"],
            tasks=content["tasks"],
            done=content["tasks"],
        )
    results = Plan(out).results()
    done = [result for result in results if result is not None]
    return Built(
        out=out,
        complete=False,
        records={kind: sum((r[kind] or {"records": 0})["records"] for r in done) for kind in KINDS},
        rejected=sum(len(result["rejected"]) for result in done),
        damaged=sum(len(result["damaged"]) for result in done),
        tasks=len(results),
        done=len(done),
    )
