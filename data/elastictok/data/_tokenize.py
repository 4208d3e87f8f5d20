"""Making data sets of tokens: what is to be tokenized, in tasks, and what became of it.

As a build is (see `_build.py`), it is first planned: the list of pictures and clips is cut into
tasks, each of which makes one shard and is done when its marker is there, which is written last.
What a task makes depends on the list and the model, not on who runs it.

    TOKENS/build/plan/          the list, if it is one of files; settings and tasks
    TOKENS/build/parts/         index of each task
    TOKENS/build/done/          marker of each task
    TOKENS/tokens-00000.arrayrecord, ...
    TOKENS/tokens.json, TOKENS/tokens.index, TOKENS/tokens.keys, TOKENS/rejected.tsv
                                when all tasks are done

Nothing here knows a model: an encoder is any function from clips to records.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastictok.data._build import Progress, list_problems
from elastictok.data._built import BuiltDataset, Records, is_built
from elastictok.data._clip import read_clip
from elastictok.data._errors import MediaError
from elastictok.data._find import is_clip, is_picture, walk, wanted
from elastictok.data._picture import read_picture
from elastictok.data._plan import check_folders, check_same, labels, read_markers
from elastictok.data._shards import ShardWriter, join_index, record_module, write_whole
from elastictok.data._stored import Blob, Stored
from elastictok.data._tokens import (
    FORMAT,
    KIND,
    TOKEN_INDEX,
    TOKENS,
    VERSION,
    TokenRecord,
    read_tokens_description,
    token_index_row,
)
from elastictok.data._types import Clip

Encoder = Callable[[Sequence[tuple[str, Clip]]], list[TokenRecord]]
"""Makes the records of pictures and clips with their keys."""

# Of one shard, and so of the work that an interruption can lose.
_MOST_ITEMS = 1024
_FEWEST_ITEMS = 16
# Of the frames that are given to an encoder at once.
_BATCH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What tokenizing a data set came to.

    **Arguments:**

    - `out`: the folder.
    - `complete`: whether all tasks are done, so that the tokens can be used.
    - `records`, `tokens`: how many there are, in the tasks that are done.
    - `rejected`, `damaged`: what could not be used, and clips that hold fewer frames than they
        promise, in the tasks that are done.
    - `tasks`, `done`: how many there are and how many are done.
    """

    out: Path
    complete: bool
    records: int
    tokens: int
    rejected: int
    damaged: int
    tasks: int
    done: int

    def __str__(self) -> str:
        text = f"{self.out}: {self.tokens} tokens of {self.records} pictures and clips"
        lists = self.out if self.complete else self.out / "build"
        if self.rejected:
            text += f"; {self.rejected} rejected, see {lists / 'rejected.tsv'}"
        if self.damaged:
            text += f"; {self.damaged} clips lack frames, see {lists / 'damaged.tsv'}"
        if not self.complete:
            text += f"; {self.done} of {self.tasks} tasks done: run the same command to go on"
        return text


def tokenize(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoders: Sequence[Encoder],
    *,
    settings: Mapping[str, Any],
    fps: float | int | None = None,
    max_frames: int | None = None,
    batch_size: int = 16,
    shard: tuple[int, int] = (0, 1),
    shard_items: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Tokenized:
    """Makes a data set of tokens, or goes on where an earlier call stopped.

    The result depends on the files, the encoder and the settings, not on the number of encoders,
    jobs or interruptions. A file that cannot be used is named in `rejected.tsv` with its reason.

    **Arguments:**

    - `data`: the folder of a data set that `build` made, or a folder of pictures and clips.
    - `out`: the folder to make.
    - `encoders`: one for each device, each of which does the same. Batches go to them in turns,
        each in a thread of its own, while this one reads files.
    - `settings`: of the encoder, as JSON; `model` is the fingerprint of the model. Kept with the
        tokens, and compared when a call goes on.
    - `fps`, `max_frames`: see [`read_media`][].
    - `batch_size`: the most pictures and clips that an encoder gets at once.
    - `shard`: (index, count) of this job if several do the same data set, on machines that share a
        file system. The one that ends last completes it.
    - `shard_items`: pictures and clips that go into one shard; by default a 32nd of all, between 16
        and 1024.
    - `progress`: called about once a second, and at the end.

    **Returns:** what there is now. With several jobs it may not be complete yet.

    **Raises:** `MediaError` for data that cannot be read, or an `out` that holds something else or
    tokens of another model or other settings; `ValueError` for settings that cannot be; whatever
    else an encoder raises.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard is {shard}; it must be (index, count), index < count")
    for name, value in (("batch_size", batch_size), ("shard_items", shard_items)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    data, out = Path(data), Path(out)
    record_module()  # before any work: it may not be installed
    check_folders([data], out)
    reading = {
        "fps": None if fps is None else float(fps),
        "max_frames": max_frames,
        "shard_items": shard_items,
    }
    found = _plan_for(data, out, json.loads(json.dumps({**settings, **reading})))
    if found is not None:
        with _completing(found):
            _Run(found, encoders, batch_size, found.open_tasks(shard), progress).run()
    return _state_of(out)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A range of items."""

    index: int
    start: int
    items: int
    bytes: int


class _Items:
    """Pictures and clips of a built data set or of a list of files, by number.

    **Arguments:**

    - `data`: the folder.
    - `files`: keys, paths below the folder and sizes, unless it was built.
    """

    def __init__(self, data: Path, files: list[tuple[str, str, int]] | None):
        self._data = data
        self._files = files
        self._kinds: tuple[Records, ...] = ()
        if files is None:
            built = BuiltDataset(data)
            self._kinds = (built.pictures, built.clips)

    def __len__(self) -> int:
        return sum(map(len, self._kinds)) if self._files is None else len(self._files)

    def fingerprint(self) -> str:
        """Of what is in the data set."""
        return ",".join(kind.fingerprint() for kind in self._kinds)

    def bytes(self, index: int) -> int:
        """Of the encoded picture or clip."""
        if self._files is not None:
            return self._files[index][2]
        records, place = self._find(index)
        return int(records.index["bytes"][place])

    def key(self, index: int) -> str:
        if self._files is not None:
            return self._files[index][0]
        records, place = self._find(index)
        return records.key(place)

    def stored(self, index: int) -> tuple[Stored, bool]:
        """The file or its bytes, and whether it is a clip.

        **Raises:** `MediaError` if it cannot be used.
        """
        if self._files is None:
            records, place = self._find(index)
            record = records[place]
            return Blob(record.key, record.data), record.kind == "clip"
        path = self._data / self._files[index][1]
        return path, is_clip(path)

    def _find(self, index: int) -> tuple[Records, int]:
        pictures, clips = self._kinds
        return (pictures, index) if index < len(pictures) else (clips, index - len(pictures))


class _Plan:
    """What is to be tokenized, and which tasks are done.

    **Arguments:**

    - `out`: the folder of the tokens, in which it was planned.
    - `data`: the folder of pictures and clips.
    """

    def __init__(self, out: Path, data: Path | None = None):
        self.out = out
        self.folder = out / "build"
        stored = json.loads((self.folder / "plan" / "plan.json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = stored["settings"]
        self.tasks = [_Task(i, *task) for i, task in enumerate(stored["tasks"])]
        files = stored["files"]
        self._files = None if files is None else [(key, below, size) for key, below, size in files]
        self._data = data

    def items(self) -> _Items:
        assert self._data is not None
        return _Items(self._data, self._files)

    def marker(self, task: int) -> Path:
        """The file that says that a task is done, and what it made."""
        return self.folder / "done" / f"{task:06d}.json"

    def part(self, task: int, what: str) -> Path:
        """A part of the index."""
        return self.folder / "parts" / f"{task:06d}.{what}"

    def open_tasks(self, shard: tuple[int, int]) -> list[_Task]:
        """Tasks of a job that are not done."""
        return [t for t in self.tasks[shard[0] :: shard[1]] if not self.marker(t.index).exists()]

    def results(self) -> list[dict[str, Any] | None]:
        """What each task made; `None` if it is not done."""
        return read_markers(self.marker(task.index) for task in self.tasks)


def _plan_for(data: Path, out: Path, settings: dict[str, Any]) -> _Plan | None:
    """Makes the plan, or takes up the one that `out` holds; `None` if all is done."""
    built = is_built(data)
    content = _Items(data, None).fingerprint() if built else None
    settings = {**settings, "data": os.path.abspath(data), "content": content}
    begun = "the tokens in it were"
    if (out / TOKENS).exists():
        check_same(out, read_tokens_description(out)["settings"], settings, begun)
        return None
    if not (out / "build" / "plan").exists():
        out.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in out.iterdir() if p.name != "build" and p.name[0] != "."]
        # Unless another job has planned the same since, and begun with it.
        if strangers and not (out / "build" / "plan").exists():
            raise MediaError(
                out, f"holds other files, such as {min(strangers)}; choose an empty folder"
            )
        files = None if built else _list_files(data)
        _write_plan(out / "build", settings, _Items(data, files), files)
    found = _Plan(out, data)
    check_same(out, found.settings, settings, begun)
    return found


def _list_files(data: Path) -> list[tuple[str, str, int]]:
    """Pictures and clips in a folder: key, path below it, bytes."""
    (label,) = labels([data])
    found = []
    for below in walk(data) if data.is_dir() else []:
        path = data / below
        if is_picture(path) or is_clip(path):
            # A broken link has no size; the reader will say so.
            size = path.stat().st_size if path.exists() else 0
            found.append((f"{label}/{below}", below, size))
    if not found:
        raise MediaError(
            data,
            f"neither a built data set nor a folder of pictures and clips (looked for {wanted()})",
        )
    return found


def _write_plan(
    folder: Path,
    settings: dict[str, Any],
    items: _Items,
    files: list[tuple[str, str, int]] | None,
) -> None:
    """Writes the plan under a name of its own; of several jobs, the first one wins."""
    if not len(items):
        raise MediaError(settings["data"], "there is nothing in it to tokenize")
    most = settings["shard_items"] or min(max(len(items) // 32, _FEWEST_ITEMS), _MOST_ITEMS)
    starts = range(0, len(items), most)
    tasks = []
    for start in starts:
        count = min(most, len(items) - start)
        tasks.append([start, count, sum(items.bytes(start + i) for i in range(count))])
    scratch = folder / f"plan-{secrets.token_hex(8)}"
    scratch.mkdir(parents=True)
    try:
        content = {"settings": settings, "tasks": tasks, "files": files}
        (scratch / "plan.json").write_text(json.dumps(content), encoding="utf-8")
        for name in ("parts", "done"):
            (folder / name).mkdir(exist_ok=True)
        # This fails where there is a plan.
        with contextlib.suppress(OSError):
            os.rename(scratch, folder / "plan")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_Batch = list[tuple[str, Clip]]


class _Run:
    """Does tasks, and tells how far it is."""

    def __init__(
        self,
        found: _Plan,
        encoders: Sequence[Encoder],
        batch_size: int,
        tasks: Sequence[_Task],
        progress: Callable[[Progress], None] | None,
    ):
        self._plan = found
        self._items = found.items()
        self._encoders = encoders
        self._batch_size = batch_size
        self._tasks = tasks
        self._progress = progress
        self._began = self._told = time.monotonic()
        self._done = self._bytes = self._rejected = 0

    def run(self) -> None:
        threads = [concurrent.futures.ThreadPoolExecutor(1) for _ in self._encoders]
        try:
            for task in self._tasks:
                self._run_task(task, threads)
        finally:
            # What is being encoded ends first: threads cannot be stopped.
            for thread in threads:
                thread.shutdown(cancel_futures=True)
        self._tell()

    def _run_task(
        self, task: _Task, threads: Sequence[concurrent.futures.ThreadPoolExecutor]
    ) -> None:
        found, index = self._plan, task.index
        writer = ShardWriter(
            found.out / f"{KIND}-{index:05d}.arrayrecord",
            found.part(index, "index"),
            found.part(index, "keys"),
            TOKEN_INDEX,
        )
        rejected: list[tuple[str, str]] = []
        damaged: list[tuple[str, int]] = []
        sizes: dict[str, int] = {}
        tokens = 0
        with contextlib.ExitStack() as stack:
            stack.callback(writer.discard)
            for record in self._encoded(self._batches(task, rejected, sizes), threads):
                writer.add(record.key, record.to_bytes(), token_index_row(record))
                tokens += len(record.values)
                if record.missing:
                    damaged.append((record.key, record.missing))
                self._count(sizes.pop(record.key))
            shard = writer.commit()
        result = {"shard": shard, "tokens": tokens, "rejected": rejected, "damaged": damaged}
        write_whole(found.marker(index), json.dumps(result).encode())

    def _batches(
        self, task: _Task, rejected: list[tuple[str, str]], sizes: dict[str, int]
    ) -> Iterator[_Batch]:
        """Cut by what is in the list alone, so that a batch is the same each time.

        Adds to `rejected`, and to `sizes` the encoded bytes of what is in a batch.
        """
        batch: _Batch = []
        size = 0
        for index in range(task.start, task.start + task.items):
            key, encoded = self._items.key(index), self._items.bytes(index)
            try:
                clip = self._read(index)
            except MediaError as error:
                rejected.append((key, error.reason))
                self._rejected += 1
                self._count(encoded)
                continue
            full = len(batch) == self._batch_size or size + clip.frames.nbytes > _BATCH_BYTES
            if batch and full:
                yield batch
                batch, size = [], 0
            batch.append((key, clip))
            size += clip.frames.nbytes
            sizes[key] = encoded
        if batch:
            yield batch

    def _read(self, index: int) -> Clip:
        stored, clip = self._items.stored(index)
        if clip:
            settings = self._plan.settings
            return read_clip(stored, fps=settings["fps"], max_frames=settings["max_frames"])
        return Clip(read_picture(stored)[None], None)

    def _encoded(
        self,
        batches: Iterator[_Batch],
        threads: Sequence[concurrent.futures.ThreadPoolExecutor],
    ) -> Iterator[TokenRecord]:
        """Records in the order of the list, though all encoders are at work."""
        waiting: collections.deque[concurrent.futures.Future[list[TokenRecord]]]
        waiting = collections.deque()
        for turn, batch in enumerate(batches):
            which = turn % len(threads)
            waiting.append(threads[which].submit(self._encoders[which], batch))
            # One more for each encoder than it works at, so that it need not wait.
            while len(waiting) > 2 * len(threads):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _count(self, size: int) -> None:
        self._done += 1
        self._bytes += size
        if time.monotonic() - self._told >= 1:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._progress is not None:
            self._progress(
                Progress(
                    files=self._done,
                    bytes=self._bytes,
                    all_files=sum(task.items for task in self._tasks),
                    all_bytes=sum(task.bytes for task in self._tasks),
                    rejected=self._rejected,
                    seconds=self._told - self._began,
                )
            )


@contextlib.contextmanager
def _completing(found: _Plan) -> Iterator[None]:
    """Around the work on tasks: lists what was rejected so far however it ends, and completes the
    data set if it ends well and nothing is left to do."""
    try:
        yield
    finally:
        # Not in `out`, where another job may just be putting the final ones.
        with contextlib.suppress(FileNotFoundError):
            list_problems(found.folder, found.results())
    _finish(found)


def _finish(found: _Plan) -> None:
    """Joins the parts of the index and declares the tokens complete, if all tasks are done.

    Several jobs may do so at once: each writes the same.
    """
    out = found.out
    try:
        results = [result for result in found.results() if result is not None]
        if len(results) < len(found.tasks):
            return
        made = [(i, r["shard"]) for i, r in enumerate(results) if r["shard"] is not None]
        parts = [
            (found.part(i, "index"), found.part(i, "keys"), shard["key_bytes"]) for i, shard in made
        ]
        join_index(parts, out, KIND, TOKEN_INDEX, found.folder)
        list_problems(out, results)
    except FileNotFoundError:
        if (out / TOKENS).exists():
            return
        raise
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": found.settings,
        "tasks": len(results),
        "records": sum(shard["records"] for _, shard in made),
        "tokens": sum(result["tokens"] for result in results),
        "rejected": sum(len(result["rejected"]) for result in results),
        "damaged": sum(len(result["damaged"]) for result in results),
        "shards": [
            {name: shard[name] for name in ("file", "records", "file_bytes", "sha256")}
            for _, shard in made
        ],
    }
    write_whole(out / TOKENS, json.dumps(content, indent=1).encode())
    # Renamed first, so that another job finds all of it or nothing.
    done = out / f".build-{secrets.token_hex(8)}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(found.folder, done)
    shutil.rmtree(done, ignore_errors=True)
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def _state_of(out: Path) -> Tokenized:
    """What there is so far."""
    results: list[dict[str, Any] | None] = []
    with contextlib.suppress(FileNotFoundError):  # another job may just have completed it
        results = _Plan(out).results()
    if (out / TOKENS).exists():
        content = read_tokens_description(out)
        names = ("records", "tokens", "rejected", "damaged", "tasks")
        counts = {name: content[name] for name in names}
        return Tokenized(out=out, complete=True, done=content["tasks"], **counts)
    done = [result for result in results if result is not None]
    return Tokenized(
        out=out,
        complete=False,
        records=sum((result["shard"] or {"records": 0})["records"] for result in done),
        tokens=sum(result["tokens"] for result in done),
        rejected=sum(len(result["rejected"]) for result in done),
        damaged=sum(len(result["damaged"]) for result in done),
        tasks=len(results),
        done=len(done),
    )
