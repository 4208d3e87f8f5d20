"""Building data sets: from folders of files to shards of records and an index.

A build is first planned: the files are listed on disk, sorted, and the list is cut into tasks. A
task makes one shard of pictures and one of clips, and is done when its marker is there, which is
written last. What a task makes depends on the list alone, not on who runs it: a process, a job of
an array of jobs, a worker of Apache Beam.

    OUT/build/plan/             the list: key, folder, path below it, bytes; settings and tasks
    OUT/build/parts/            index of each task
    OUT/build/done/             marker of each task
    OUT/build/rejected.tsv, OUT/build/damaged.tsv               so far
    OUT/pictures-00000.arrayrecord, OUT/clips-00000.arrayrecord, ...
    OUT/dataset.json, OUT/pictures.index, OUT/pictures.keys, ..., OUT/rejected.tsv, OUT/damaged.tsv
                                when all tasks are done
"""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from elastictok.data._built import DATASET, FORMAT, INDEX, KINDS, VERSION, read_description
from elastictok.data._plan import Plan, Task, plan_for
from elastictok.data._prepare import make_record
from elastictok.data._shards import join_index, write_whole
from elastictok.data._task import Make, run_task

REJECTED = "rejected.tsv"
DAMAGED = "damaged.tsv"


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
        lists = self.out if self.complete else self.out / "build"
        if self.rejected:
            text += f"; {self.rejected} files rejected, see {lists / REJECTED}"
        if self.damaged:
            text += f"; {self.damaged} clips lack frames, see {lists / DAMAGED}"
        if not self.complete:
            text += f"; {self.done} of {self.tasks} tasks done: run the same command to go on"
        return text


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
        with completing(found):
            _Crew(found, found.open_tasks(shard), make, progress).run(workers)
    return state_of(out)


@contextlib.contextmanager
def completing(found: Plan) -> Iterator[None]:
    """Around the work on tasks: lists what was rejected so far however it ends, and completes the
    data set if it ends well and nothing is left to do."""
    try:
        yield
    finally:
        # Not in `out`, where another job may just be putting the final ones.
        with contextlib.suppress(FileNotFoundError):
            list_problems(found.folder, found.results())
    _finish(found)


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


class _Crew:
    """Does tasks, in this process or in others, and tells how far it is."""

    def __init__(
        self,
        found: Plan,
        tasks: Sequence[Task],
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

    def _run_in_pool(self, waiting: list[Task], workers: int) -> list[Task]:
        """Takes tasks from `waiting` until none is left or a process has died; returns those that
        were being done then."""
        with self._pool(workers) as pool:
            running: dict[concurrent.futures.Future[None], Task] = {}
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

    def _run_alone(self, task: Task) -> None:
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
        self, pool: concurrent.futures.ProcessPoolExecutor, task: Task
    ) -> "concurrent.futures.Future[None]":
        fatal = tuple(self._fatal.get(task.index, ()))
        with _interruptions_held_back():  # the first task of a pool begins its processes
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


@contextlib.contextmanager
def _interruptions_held_back() -> Iterator[None]:
    """Processes that begin meanwhile are born with interruptions held back, until they ignore
    them: else one that is still importing would tell of it at length."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends the processes now: what they were at is begun again another time."""
    for process in list((pool._processes or {}).values()):
        process.kill()


_worker: tuple[Plan, _Counters] | None = None


def _begin_worker(out: Path, counters: _Counters) -> None:
    global _worker
    # An interruption on the terminal reaches all processes; the first one deals with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Plan(out), counters


def _end_with_parent() -> None:
    """A pool whose process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _task_of_worker(index: int, make: Make, fatal: Sequence[str]) -> None:
    assert _worker is not None
    found, counters = _worker
    run_task(found, index, make=make, fatal=fatal, count=counters.add)


def _finish(found: Plan) -> None:
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
    write_whole(out / DATASET, json.dumps(content, indent=1).encode())
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
    licences: collections.Counter[str] = collections.Counter()
    for _, shard in made:
        licences.update(shard["licences"])
    parts = [
        (found.part(task, kind, "index"), found.part(task, kind, "keys"), shard["key_bytes"])
        for task, shard in made
    ]
    join_index(parts, found.out, kind, INDEX, found.folder)
    return {
        "records": sum(shard["records"] for _, shard in made),
        "bytes": sum(shard["bytes"] for _, shard in made),
        "licences": dict(licences.most_common(100)),
        "shards": [
            {name: shard[name] for name in ("file", "records", "file_bytes", "sha256")}
            for _, shard in made
        ],
    }


def list_problems(folder: Path, results: Sequence[dict[str, Any] | None]) -> None:
    """Writes `rejected.tsv` and `damaged.tsv` of the tasks that are done."""
    for name, header in ((REJECTED, "reason"), (DAMAGED, "missing_frames")):
        kind = name.removesuffix(".tsv")
        rows = [row for result in results if result for row in result[kind]]
        lines = [f"key\t{header}", *(f"{_cell(key)}\t{_cell(about)}" for key, about in rows)]
        write_whole(folder / name, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


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
    results: list[dict[str, Any] | None] = []
    with contextlib.suppress(FileNotFoundError):  # another job may just have completed it
        results = Plan(out).results()
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
