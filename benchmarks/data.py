"""How fast training data comes from disk, what it keeps in memory, and how fast it is built.

    python benchmarks/data.py                                      # prints
    python benchmarks/data.py --write                              # and keeps results/data.md
    python benchmarks/data.py --pictures FOLDER --clips FOLDER     # of your own files

Without folders it cuts pictures and clips out of the photographs that scikit-image carries. Nothing
is cached: every picture and frame is decoded when it is used. Each measurement is a process of its
own, which measures bare decoding first and last and the pipeline in between, in several stretches
of time each. Other programs on the machine only ever slow a stretch down, so read the ratios, the
best next to the median, and the processor time that a picture or frame takes. Linux only: memory
and processor time are read from /proc.

- Pictures: batches of 256 x 256 pixels out of a built data set, and out of the folder itself.
- Clips: all frames of clips in order, beside what PyAV takes to decode the same files.
- Memory: the same shard under up to a thousand names, for an index of ten million records.
- Start: from the start of the interpreter to the first batch.
- Building: of pictures as they are, and scaled down.

About six minutes on two cores.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "data.md"
PACKAGES = ("elastictok", "grain", "numpy", "pillow", "av", "simplejpeg", "array_record", "jax")
SIZE = 256
PICTURES = 600  # that are made
CLIPS, CLIP_FRAMES = 8, 150  # that are made
NAMES = {"pictures": 2000, "clips": 16}  # under which files are read, several for each if few
SHARD_RECORDS = 10_000
INDEXES = (1, 100, 1000)  # shards
DOCUMENTS = 40_000
STARTS = 5
BUILDS = 3
STRETCHES = 5

# Of each stretch of time: how many a second, and seconds of all processes for each.
Rates = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, help="folder of pictures, short side 256")
    parser.add_argument("--clips", type=Path, help="folder of clips, short side 256")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        print(json.dumps(TASKS[arguments.task](**arguments.settings)))
        return
    lines = []
    with tempfile.TemporaryDirectory(prefix="elastictok-benchmark-") as folder:
        for line in report(Path(folder), arguments.pictures, arguments.clips):
            print(line, flush=True)
            lines.append(line)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(folder: Path, pictures: Path | None, clips: Path | None) -> Iterator[str]:
    """The result as lines of Markdown."""
    began = time.monotonic()
    material = {
        "pictures": gather(folder / "pictures", pictures, write_pictures),
        "clips": gather(folder / "clips", clips, write_clips),
    }
    without = folder / "without"
    without.mkdir()
    (without / "simplejpeg.py").write_text("raise ImportError\n", encoding="utf-8")
    found = [name for name in PACKAGES if is_installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    yield "# Training data: speed, memory and building"
    yield ""
    yield f"`python benchmarks/data.py --write`, {datetime.date.today()}, on {os.cpu_count()} CPU"
    yield f"cores, Linux. Python {platform.python_version()}, {versions}."
    yield ""
    yield f"Runnable processes at the start: {load()}. The machine is noisy: where its cores serve"
    yield "other programs too, rates of one run differ by tens of percents. The best of several"
    yield "stretches is nearer to what it can do, and processor times hardly change."
    yield ""
    for kind, given in (("pictures", pictures), ("clips", clips)):
        origin = "real files" if given else "cut out of the photographs of scikit-image"
        yield f"- {describe(material[kind], kind, origin)}"
    yield from report_pictures(folder, material["pictures"], without)
    yield from report_clips(material["clips"])
    yield from report_memory(folder)
    yield from report_starts(folder / "built")
    yield from report_builds(folder, material["pictures"])
    yield ""
    yield f"Runnable processes at the end: {load()}. All of it took"
    yield f"{time.monotonic() - began:.0f} seconds."


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load() -> str:
    """How busy the machine was: more processes than cores, and times stretch."""
    one, five, _ = os.getloadavg()
    return f"{one:.1f} over the last minute, {five:.1f} over the last five"


def in_process(task: str, *, without: Path | None = None, **settings: Any) -> Any:
    """What a task answers that runs in a process of its own."""
    environment = dict(os.environ)
    if without is not None:
        # First on the path, of workers too.
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(without), inherited]))
    command = [sys.executable, __file__, "--task", task, "--settings", json.dumps(settings)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(answer.stdout.splitlines()[-1])


# Material


def gather(folder: Path, given: Path | None, write: Callable[[Path], None]) -> Path:
    """A folder of some of the files given, or of new ones; each several times if they are few."""
    from elastictok.data import find_media

    if given is None:
        given = folder / "made"
        given.mkdir(parents=True)
        write(given)
    library = folder / "library"
    library.mkdir(parents=True)
    media = find_media(given)
    files = list(media.clips)
    if folder.name == "pictures":
        files = [file for file in media.pictures if file.suffix.lower() in (".jpg", ".jpeg")]
    if not files:
        raise SystemExit(f"there are no {folder.name} in {given}; pictures must be JPEG")
    names: list[Path] = []
    for number in range(NAMES[folder.name]):
        again = number >= len(files)
        file = names[number - len(files)] if again else files[number].resolve()
        names.append(library / f"{number:06d}{file.suffix}")
        if again:
            names[-1].hardlink_to(file)
        else:
            shutil.copyfile(file, names[-1])
    return library


def write_pictures(folder: Path) -> None:
    """Photographs of 256 pixels short side: random parts of larger ones, as JPEG."""
    import numpy as np
    from PIL import Image

    from elastictok.cli._samples import TEST, TRAIN, photographs

    rng = np.random.default_rng(0)
    photos = list(photographs(TRAIN + TEST).values())
    for number in range(PICTURES):
        photo = Image.fromarray(photos[number % len(photos)])
        wide, high = (4, 3) if rng.random() < 0.7 else (3, 4)
        part = rng.uniform(0.6, 1.0) * min(photo.width / wide, photo.height / high)
        left = rng.uniform(0, photo.width - part * wide)
        top = rng.uniform(0, photo.height - part * high)
        box = (left, top, left + part * wide, top + part * high)
        size = (round(SIZE * wide / min(wide, high)), round(SIZE * high / min(wide, high)))
        picture = photo.resize(size, Image.Resampling.LANCZOS, box)
        picture.save(folder / f"{number:04d}.jpg", quality=95)


def write_clips(folder: Path) -> None:
    """A camera that holds, pans and zooms on a photograph, in shots of about a second."""
    import numpy as np

    from elastictok.cli._samples import TRAIN, photographs, random_move, random_view
    from elastictok.data import write_clip

    rng = np.random.default_rng(0)
    photos = list(photographs(TRAIN).values())
    for number in range(CLIPS):
        frames = np.empty((CLIP_FRAMES, SIZE, SIZE, 3), np.uint8)
        for at in range(CLIP_FRAMES):
            if at % 30 == 0:
                move = random_move(rng)
                view = random_view(photos[int(rng.integers(len(photos)))], rng, smallest=0.5)
            frames[at] = view.frame(SIZE)
            view = view.moved(*move)
        write_clip(folder / f"{number}.mp4", frames, 30)


def describe(folder: Path, kind: str, origin: str) -> str:
    """What there is to read."""
    files = [file.stat() for file in folder.iterdir()]
    different = len({file.st_ino for file in files})
    size = sum(file.st_size for file in files) / len(files) / 1000
    return (
        f"{len(files)} names of {different} {kind}, {origin}, {SIZE} pixels short side, on average "
        f"{size:.0f} kB"
    )


# Speed


def stretches(step: Callable[[], int], *, seconds: float, count: int) -> Rates:
    """How many come of repeated steps, in each of several stretches of time."""
    rates = []
    for _ in range(count):
        done, start, used = 0, time.perf_counter(), processor_time()
        while (took := time.perf_counter() - start) < seconds:
            done += step()
        rates.append((done / took, (processor_time() - used) / done))
    return rates


def processor_time() -> float:
    """Seconds that this process and its children have computed."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def best(rates: Rates) -> float:
    return max(rate for rate, _ in rates)


def median(rates: Rates) -> float:
    return statistics.median(rate for rate, _ in rates)


def cost(rates: Rates) -> float:
    """Microseconds of processor time for one."""
    return 1e6 * statistics.median(seconds for _, seconds in rates)


def own_cells(rates: Rates) -> list[str]:
    """Best and median rate, processor time, and how many cores it had."""
    cores = statistics.median(rate * seconds for rate, seconds in rates)
    return [f"{best(rates):.0f}", f"{median(rates):.0f}", f"{cost(rates):.0f}", f"{cores:.1f}"]


def bare_cells(rates: Rates, own: Rates) -> list[str]:
    """A bare decoder's median rate, the pipeline's as a share, and the share of its time that the
    decoder alone would take."""
    shares = median(own) / median(rates), cost(rates) / cost(own)
    return [f"{median(rates):.0f}", *(f"{share:.2f}" for share in shares)]


def pipeline(dataset: Any) -> Rates:
    """Frames a second that a data set delivers in valid blocks, once it has got going."""
    with iter(dataset) as batches:

        def step() -> int:
            batch = next(batches)
            return int(batch.valid.sum()) * batch.pixels.shape[2]

        # The first batch waits for processes to start, and some more were made ahead.
        step()
        stretches(step, seconds=1.5, count=1)
        return stretches(step, seconds=1.5, count=STRETCHES)


def alternately(files: list[Path], decoders: dict[str, Callable[[Path], int]]) -> dict[str, Rates]:
    """Rates of decoders that go through the same files; they take turns."""
    rates: dict[str, Rates] = {name: [] for name in decoders}
    for _ in range(2):
        for name, decode in decoders.items():
            waiting = iter(files * 1000)
            rates[name] += stretches(
                lambda waiting=waiting, decode=decode: decode(next(waiting)), seconds=0.7, count=1
            )
    return rates


def beside(
    dataset: Any, files: list[Path], decoders: dict[str, Callable[[Path], int]]
) -> dict[str, Rates]:
    """The pipeline's rates between those of bare decoders."""
    before = alternately(files, decoders)
    rates = {"pipeline": pipeline(dataset)}
    after = alternately(files, decoders)
    return rates | {name: before[name] + after[name] for name in decoders}


def task_pictures(
    folder: str, files: str, workers: int, frames_per_block: int = 1
) -> dict[str, Rates]:
    from elastictok.data import Geometry, RandomCrop, load_folders

    dataset = load_folders(
        folder,
        Geometry((SIZE, SIZE), frames_per_block=frames_per_block),
        crop=RandomCrop(1.0, 1.0),
        batch_size=32,
        workers=workers,
        cache_bytes=0,
    )
    decoders = {"Pillow": decode_by_pillow}
    try:
        import simplejpeg
    except ImportError:
        pass
    else:
        decoders["simplejpeg"] = decode_by_simplejpeg(simplejpeg)
    rates = beside(dataset, sorted(Path(files).iterdir()), decoders)
    # Pictures, not the frames that they are repeated in.
    own = rates["pipeline"]
    rates["pipeline"] = [(rate / frames_per_block, cpu * frames_per_block) for rate, cpu in own]
    return rates


def decode_by_pillow(file: Path) -> int:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        np.array(picture.convert("RGB"))
    return 1


def decode_by_simplejpeg(simplejpeg: Any) -> Callable[[Path], int]:
    def decode(file: Path) -> int:
        simplejpeg.decode_jpeg(file.read_bytes(), "RGB")
        return 1

    return decode


def task_clips(folder: str, workers: int, cache_bytes: int) -> dict[str, Rates]:
    from elastictok.data import Geometry, RandomCrop, WholeClip, load_folders

    dataset = load_folders(
        folder,
        Geometry((SIZE, SIZE), frames_per_block=4, blocks=8, fps=None),
        crop=RandomCrop(1.0, 1.0),
        excerpt=WholeClip(),
        batch_size=2,
        workers=workers,
        cache_bytes=cache_bytes,
    )
    decoders = {
        "one thread": lambda file: decode_clip(file, threads=1),
        "PyAV's default threads": decode_clip,
        "one thread, to RGB arrays": lambda file: decode_clip(file, threads=1, arrays=True),
    }
    return beside(dataset, sorted(Path(folder).iterdir()), decoders)


def decode_clip(file: Path, *, threads: int | None = None, arrays: bool = False) -> int:
    """Decodes a file and says how many frames it has."""
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        if threads is not None:
            stream.codec_context.thread_count = threads
        frames = 0
        for frame in container.decode(stream):
            if arrays:
                frame.to_ndarray(format="rgb24")
            frames += 1
    return frames


def report_pictures(folder: Path, files: Path, without: Path) -> Iterator[str]:
    built = folder / "built"
    in_process("build", folder=str(files), out=str(built), workers=0, keep=True)
    fast = importlib.util.find_spec("simplejpeg") is not None
    yield ""
    yield "## Pictures"
    yield ""
    yield "Pictures a second, in batches of 32, and microseconds of processor time for each, of all"
    yield "processes together. *Cores* is how many they had of the machine. Beside it the decoders"
    yield "alone, in one thread: their median rate, the pipeline's as a share of it, and their"
    yield "processor time as a share of the pipeline's: what the first share would be on one free"
    yield "core. Pictures in blocks of four frames are decoded once and repeated."
    yield ""
    yield (
        "| from | workers | JPEG by | best | median | us | cores | Pillow alone | share | of time "
        "| simplejpeg alone | share | of time |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    rows = [
        ("data set", built, 0, 1, None),
        ("data set", built, 2, 1, None),
        ("folder of files", files, 0, 1, None),
        ("folder of files", files, 2, 1, None),
        ("data set, four frames a block", built, 2, 4, None),
    ]
    if fast:
        rows += [("data set", built, workers, 1, without) for workers in (0, 2)]
    for name, source, workers, frames, hidden in rows:
        rates = in_process(
            "pictures",
            folder=str(source),
            files=str(files),
            workers=workers,
            frames_per_block=frames,
            without=hidden,
        )
        own = rates.pop("pipeline")
        cells = [name, str(workers), list(rates)[-1], *own_cells(own)]
        for bare in ("Pillow", "simplejpeg"):
            cells += bare_cells(rates[bare], own) if bare in rates else ["", "", ""]
        yield f"| {' | '.join(cells)} |"


def report_clips(files: Path) -> Iterator[str]:
    yield ""
    yield "## Clips"
    yield ""
    yield "Frames a second that arrive in valid blocks, eight blocks of four frames in a sequence,"
    yield "all frames of every clip in order; otherwise as above. Beside it what PyAV does with the"
    yield "same files: decodes them in one thread; with its default threads; and in one thread with"
    yield '`to_ndarray(format="rgb24")` of every frame.'
    yield ""
    yield (
        "| workers | cache, MiB | best | median | us | cores | one thread | share | of time "
        "| default threads | share | of time | to arrays | share | of time |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for workers in (0, 2):
        for cache in (0, 64):
            rates = in_process(
                "clips", folder=str(files), workers=workers, cache_bytes=cache * 2**20
            )
            own = rates.pop("pipeline")
            cells = [str(workers), str(cache), *own_cells(own)]
            for bare in rates.values():
                cells += bare_cells(bare, own)
            yield f"| {' | '.join(cells)} |"


# Memory


def report_memory(folder: Path) -> Iterator[str]:
    small = folder / "small"
    write_small(small)
    base = folder / "small-built"
    in_process("build", folder=str(small), out=str(base), workers=0, keep=True, shard_bytes=2**30)
    yield ""
    yield "## Memory"
    yield ""
    yield f"{DOCUMENTS} random pictures of 16 x 16 pixels out of shards of {SHARD_RECORDS} records,"
    yield "one thread, 1 MiB of cache. MB that the process has: *own* is memory that is no file's"
    yield "(pages of the mapped index are the system's to take back), before `load_folders`, after"
    yield "half of the pictures and at the end; *all* and *peak* count mapped files too."
    yield ""
    yield (
        "| records | index, MB | load s | pictures/s | own before | own half-way | own at the end "
        "| all | peak |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for shards in INDEXES:
        out = folder / f"indexed-{shards}"
        index = write_many(base, out, shards)
        row = in_process("memory", folder=str(out))
        shutil.rmtree(out)
        cells = [f"{shards * SHARD_RECORDS:,}", f"{index / 1e6:.0f}", f"{row['load']:.3f}"]
        cells.append(f"{row['rate']:.0f}")
        cells += [f"{row[name] / 1e6:.0f}" for name in ("before", "half", "end", "all", "peak")]
        yield f"| {' | '.join(cells)} |"


def write_small(folder: Path) -> None:
    """Ten thousand tiny JPEG files."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(SHARD_RECORDS):
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        picture.save(folder / f"{number:05d}.jpg")


def write_many(base: Path, out: Path, shards: int) -> int:
    """A data set that has the one shard of another under many names, and an index of all its
    records; returns the bytes of index and keys."""
    import numpy as np

    from elastictok.data import INDEX

    content = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    pictures = content["kinds"]["pictures"]
    (shard,) = pictures["shards"]
    rows = np.fromfile(base / "pictures.index", INDEX)
    keys = (base / "pictures.keys").read_bytes()
    out.mkdir()
    names = [f"pictures-{number:05d}.arrayrecord" for number in range(shards)]
    with (out / "pictures.index").open("wb") as index, (out / "pictures.keys").open("wb") as texts:
        for name in names:
            (out / name).hardlink_to(base / shard["file"])
            index.write(rows.tobytes())
            texts.write(keys)
            rows["key_end"] += len(keys)
    for name in ("clips.index", "clips.keys"):
        shutil.copyfile(base / name, out / name)
    pictures["shards"] = [shard | {"file": name} for name in names]
    pictures["records"] *= shards
    pictures["bytes"] *= shards
    (out / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return shards * (rows.nbytes + len(keys))


def task_memory(folder: str) -> dict[str, float]:
    import grain  # noqa: F401  # which the first batch would import

    from elastictok.data import Geometry, load_folders

    before = status("RssAnon")
    start = time.perf_counter()
    dataset = load_folders(folder, Geometry((16, 16), 1), batch_size=32, cache_bytes=2**20)
    took = time.perf_counter() - start
    held = []
    with iter(dataset) as batches:
        next(batches)
        start = time.perf_counter()
        for _ in range(2):
            for _ in range(DOCUMENTS // 64):
                next(batches)
            held.append(status("RssAnon"))
        rate = DOCUMENTS / (time.perf_counter() - start)
    return {
        "load": took,
        "rate": rate,
        "before": before,
        "half": held[0],
        "end": held[1],
        "all": status("VmRSS"),
        "peak": status("VmHWM"),
    }


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


# Start and building


def report_starts(built: Path) -> Iterator[str]:
    yield ""
    yield "## Start"
    yield ""
    yield "Seconds from the start of a process to its first batch of 32 pictures."
    yield ""
    yield "| workers | best | median | of it imports | load_folders | first batch |"
    yield "|---|---|---|---|---|---|"
    for workers in (0, 2):
        rows = []
        for _ in range(STARTS):
            clock = time.time()
            rows.append(in_process("start", folder=str(built), workers=workers, clock=clock))
        cells = [f"{min(row['all'] for row in rows):.2f}"]
        for name in ("all", "imports", "load", "batch"):
            cells.append(f"{statistics.median(row[name] for row in rows):.2f}")
        yield f"| {workers} | {' | '.join(cells)} |"


def task_start(folder: str, workers: int, clock: float) -> dict[str, float]:
    """Seconds since `clock`, a time of day, at which the parent began to start this process."""
    start = time.perf_counter()
    from elastictok.data import Geometry, RandomCrop, load_folders

    imported = time.perf_counter()
    dataset = load_folders(
        folder,
        Geometry((SIZE, SIZE), 1),
        crop=RandomCrop(1.0, 1.0),
        batch_size=32,
        workers=workers,
        cache_bytes=0,
    )
    loaded = time.perf_counter()
    with iter(dataset) as batches:
        next(batches)
        done = time.perf_counter()
        took = time.time() - clock
    return {
        "all": took,
        "imports": imported - start,
        "load": loaded - imported,
        "batch": done - loaded,
    }


def report_builds(folder: Path, files: Path) -> Iterator[str]:
    names = list(files.iterdir())
    size = sum(file.stat().st_size for file in names)
    yield ""
    yield "## Building"
    yield ""
    yield f"All {len(names)} pictures, {size / 1e6:.0f} MB, the start of the processes included."
    yield "MB are those of the files that are read."
    yield ""
    yield "| pictures | workers | files/s, best | median | MB/s, best | median |"
    yield "|---|---|---|---|---|---|"
    for name, resolution in (("as they are", None), ("scaled to 128", 128)):
        for workers in (0, 2):
            seconds = in_process(
                "build",
                folder=str(files),
                out=str(folder / "again"),
                workers=workers,
                resolution=resolution,
            )
            cells = [
                f"{amount / took:.0f}"
                for amount in (len(names), size / 1e6)
                for took in (min(seconds), statistics.median(seconds))
            ]
            yield f"| {name} | {workers} | {' | '.join(cells)} |"


def task_build(
    folder: str, out: str, workers: int, keep: bool = False, **settings: Any
) -> list[float]:
    """Seconds of building a data set, several times; once to keep it."""
    from elastictok.data import build

    seconds = []
    for _ in range(1 if keep else BUILDS):
        start = time.perf_counter()
        built = build(folder, out, workers=workers, **settings)
        seconds.append(time.perf_counter() - start)
        if built.rejected:
            raise SystemExit(str(built))
        if not keep:
            shutil.rmtree(out)
    return seconds


TASKS: dict[str, Callable[..., Any]] = {
    "pictures": task_pictures,
    "clips": task_clips,
    "memory": task_memory,
    "start": task_start,
    "build": task_build,
}


if __name__ == "__main__":
    main()
