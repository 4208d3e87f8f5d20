"""The plan of a build: the list of files on disk, and the tasks that it is cut into."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastictok.data._built import DATASET, read_description
from elastictok.data._errors import MediaError
from elastictok.data._find import walk
from elastictok.data._prepare import Encoding, Listed
from elastictok.data._shards import record_module

_MOST_FILES = 2**14  # of one shard: reading a record takes longer the more a shard has
_SMALLEST_SHARD = 4 * 2**20
_LARGEST_SHARD = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Task:
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
        self.tasks = [Task(i, *task) for i, task in enumerate(stored["tasks"])]

    def marker(self, task: int) -> Path:
        """The file that says that a task is done, and what it made."""
        return self.folder / "done" / f"{task:06d}.json"

    def part(self, task: int, kind: str, what: str) -> Path:
        """A part of the index."""
        return self.folder / "parts" / f"{kind}-{task:06d}.{what}"

    def heartbeat(self, task: int) -> Path:
        """Which file of the list is being read."""
        return self.folder / "parts" / f"{task:06d}.reading"

    def open_tasks(self, shard: tuple[int, int]) -> list[Task]:
        """Tasks of a job that are not done."""
        return [t for t in self.tasks[shard[0] :: shard[1]] if not self.marker(t.index).exists()]

    def listed(self, task: Task) -> Iterator[tuple[Listed, int]]:
        """The files of a task, and the bytes of each."""
        with (self.folder / "plan" / "files.jsonl").open("rb") as lines:
            lines.seek(task.offset)
            for line in itertools.islice(lines, task.files):
                key, root, below, size, *about = json.loads(line)
                path = self.roots[root]
                yield Listed(key, path / below if below else path, *about), size

    def results(self) -> list[dict[str, Any] | None]:
        """What each task made; `None` if it is not done."""
        return read_markers(self.marker(task.index) for task in self.tasks)


def read_markers(paths: Iterable[Path]) -> list[dict[str, Any] | None]:
    """What tasks wrote when they were done; `None` for each that is not."""
    found: list[dict[str, Any] | None] = []
    for path in paths:
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
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
    check_folders(folders, out)
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
        check_same(out, read_description(out)["settings"], settings)
        return None
    if not (out / "build" / "plan").exists():
        out.mkdir(parents=True, exist_ok=True)
        strangers = [p.name for p in out.iterdir() if p.name != "build" and p.name[0] != "."]
        # Unless another job has planned the build since, and begun with it.
        if strangers and not (out / "build" / "plan").exists():
            raise MediaError(
                out, f"holds other files, such as {min(strangers)}; choose an empty folder"
            )
        _write_plan(folders, out / "build", settings)
    found = Plan(out)
    check_same(out, found.settings, settings)
    return found


def check_same(
    out: Path, before: dict[str, Any], now: dict[str, Any], what: str = "its build was"
) -> None:
    """**Raises:** `MediaError`, which names both, for a setting that is not what it was."""
    for name, value in now.items():
        if before.get(name) != value:
            raise MediaError(
                out,
                f"{what} begun with {name} = {before.get(name)}, now it is {value}; "
                "go on with the same settings, or choose another folder",
            )


def check_folders(folders: Sequence[Path], out: Path) -> None:
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
            for root, (label, path) in enumerate(zip(labels(folders), folders, strict=True)):
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


def labels(folders: Sequence[Path]) -> list[str]:
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


def _tasks(files: Path, most: int) -> list[Task]:
    """Ranges of the list of at most so many bytes, but one file at least."""
    tasks: list[Task] = []
    offset = start = count = total = 0
    with files.open("rb") as lines:
        for line in lines:
            size = json.loads(line)[3]
            if count and (total + size > most or count == _MOST_FILES):
                tasks.append(Task(len(tasks), start, count, total))
                start, count, total = offset, 0, 0
            offset += len(line)
            count += 1
            total += size
    if count:
        tasks.append(Task(len(tasks), start, count, total))
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
