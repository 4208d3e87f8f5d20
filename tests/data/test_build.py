"""Building data sets: the same result however it is made, and nothing twice."""

import csv
import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elastictok.data import (
    INDEX,
    BuiltDataset,
    CentreCrop,
    Geometry,
    MediaError,
    Record,
    build,
    contact_sheet,
    describe_data,
    load_folders,
    read_media,
    write_clip,
    write_picture,
)


def contents(out):
    """Every file of a finished data set, with its bytes; where it was made does not count."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file():
            found[path.relative_to(out).as_posix()] = path.read_bytes()
    return found


def records(out):
    dataset = BuiltDataset(Path(out))
    return [part[i] for part in (dataset.pictures, dataset.clips) for i in range(len(part))]


def rejected(out):
    with (Path(out) / "rejected.tsv").open(encoding="utf-8", newline="") as lines:
        return {row["key"]: row["reason"] for row in csv.DictReader(lines, delimiter="\t")}


@pytest.fixture(scope="module")
def media(tmp_path_factory, make):
    """Nine pictures and three clips, nested, among files that cannot be used."""
    root = tmp_path_factory.mktemp("material") / "media"
    rng = np.random.default_rng(0)
    for index in range(9):
        folder = root / "pictures" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = ("png", "jpg", "webp")[index % 3]
        pixels = rng.integers(0, 256, (10 + index, 20, 3)).astype(np.uint8)
        write_picture(folder / f"{index}.{suffix}", pixels)
    (root / "clips").mkdir()
    for index in range(3):
        write_clip(root / "clips" / f"{index}.mp4", make.numbered(5 + index, 32, 48), 8)
    (root / "notes.txt").write_text("not a picture")
    (root / "clips" / "text.mp4").write_text("not a clip")
    (root / "pictures" / "empty.png").touch()
    return root


BAD = {"media/notes.txt", "media/clips/text.mp4", "media/pictures/empty.png"}


def test_records_keep_the_bytes_and_say_what_is_known(media, tmp_path):
    built = build(media, tmp_path / "out", source="the garden", licence="CC0-1.0")
    assert built.complete
    assert built.records == {"pictures": 9, "clips": 3}
    assert set(rejected(tmp_path / "out")) == BAD
    assert "suffix" in rejected(tmp_path / "out")["media/notes.txt"]
    found = records(tmp_path / "out")
    keys = [record.key for record in found]
    assert keys == sorted(k for k in keys if "pictures" in k) + sorted(
        k for k in keys if "clips" in k
    )
    for record in found:
        path = media.parent / record.key
        assert record.data == path.read_bytes()
        clip = read_media(path)
        assert (record.height, record.width) == clip.frames.shape[1:3]
        assert record.frames == len(clip.frames)
        assert (record.source, record.licence, record.missing) == ("the garden", "CC0-1.0", 0)
        if record.kind == "picture":
            assert clip.picture
            assert (record.fps, record.duration) == (None, None)
        else:
            assert record.fps == pytest.approx(8)
            assert record.duration == pytest.approx(record.frames / 8)


def test_the_index_says_what_the_records_say(media, tmp_path):
    build(media, tmp_path / "out", shard_bytes=2000)
    dataset = BuiltDataset(tmp_path / "out")
    for part in (dataset.pictures, dataset.clips):
        assert len({shard["file"] for shard in part._shards}) > 1
        assert part.index.dtype == INDEX
        for i, row in enumerate(part.index):
            record = part[i]
            assert part.key(i) == record.key
            assert row["bytes"] == len(record.data)
            for name in ("height", "width", "frames", "missing"):
                assert row[name] == getattr(record, name)
            assert row["fps"] == (record.fps or 0)
            assert row["duration"] == (record.duration or 0)


class Backwards:
    """A listing of a folder in another order."""

    def __init__(self, entries):
        self._entries = reversed(list(entries))

    def __enter__(self):
        return self._entries

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self._entries


def test_workers_jobs_and_file_order_change_nothing(media, tmp_path, monkeypatch):
    expected = tmp_path / "expected"
    build(media, expected, shard_bytes=2000)
    build(media, tmp_path / "workers", shard_bytes=2000, workers=2)
    assert contents(tmp_path / "workers") == contents(expected)
    for index in (2, 0, 1):
        built = build(media, tmp_path / "jobs", shard_bytes=2000, shard=(index, 3))
        assert built.complete == (index == 1)
        assert (tmp_path / "jobs" / "dataset.json").exists() == (index == 1)
    assert contents(tmp_path / "jobs") == contents(expected)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Backwards(scandir(path)))
    build(media, tmp_path / "order", shard_bytes=2000)
    assert contents(tmp_path / "order") == contents(expected)


class Stopped(Exception):
    pass


def opaque(listed, encoding):
    """Takes any file for a picture or clip, by its name."""
    data = listed.path.read_bytes()
    kind = "clip" if listed.path.suffix == ".mp4" else "picture"
    if listed.path.suffix == ".bad":
        raise MediaError(listed.path, "bad")
    return Record(listed.key, kind, 1, 1, 1, None, None, 0, "", "", data)


@given(data=st.data())
def test_every_file_once_whatever_happens_on_the_way(data, tmp_path_factory):
    """Sizes of files and shards, the number of jobs, and where each is interrupted."""
    root = tmp_path_factory.mktemp("any")
    folder = root / "folder"
    names = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["", "a/", "b/", "a/b/", "a.x/"]),
                st.sampled_from(["1", "2", "a", "z"]),
                st.sampled_from([".mp4", ".jpg", ".bad", ".txt"]),
            ).map("".join),
            unique=True,
            min_size=1,
            max_size=12,
        )
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(data.draw(st.integers(0, 40))))
    shard_bytes = data.draw(st.integers(1, 100))
    jobs = data.draw(st.integers(1, 3))
    made: list[str] = []
    turns = 0
    while True:
        turns += 1
        patience = data.draw(st.integers(1, 6)) if turns < 6 else len(names) + 1
        index = data.draw(st.integers(0, jobs - 1)) if turns < 9 else turns % jobs
        here: list[str] = []

        def make(listed, encoding, patience=patience, here=here):
            if len(here) == patience:
                raise Stopped
            here.append(listed.key)
            return opaque(listed, encoding)

        try:
            built = build(
                folder, root / "out", shard_bytes=shard_bytes, shard=(index, jobs), make=make
            )
        except Stopped:
            assert not (root / "out" / "dataset.json").exists()
            with pytest.raises(MediaError, match="not complete"):
                BuiltDataset(root / "out")
        else:
            made += here
            if built.complete:
                break
    keys = sorted(f"folder/{name}" for name in names)
    bad = {key for key in keys if key.endswith(".bad")}
    found = records(root / "out")
    for kind, suffixes in (("picture", (".jpg", ".txt")), ("clip", (".mp4",))):
        expected = [key for key in keys if key.endswith(suffixes)]
        assert [record.key for record in found if record.kind == kind] == expected
    assert set(rejected(root / "out")) == bad
    for record in found:
        assert record.data == (folder.parent / record.key).read_bytes()
    left = {path.name for path in (root / "out").iterdir()}
    assert not [name for name in left if name.startswith(".") or name == "build"]
    assert len({shard["file"] for k in ("pictures", "clips") for shard in shards(root, k)}) == len(
        [name for name in left if name.endswith(".arrayrecord")]
    )


def shards(root, kind):
    return json.loads((root / "out" / "dataset.json").read_text())["kinds"][kind]["shards"]


def test_going_on_reads_no_file_of_a_finished_task_again(media, tmp_path):
    reads: list[str] = []

    def make(listed, encoding):
        reads.append(listed.key)
        if len(reads) == 9:
            raise KeyboardInterrupt
        return opaque(listed, encoding)

    with pytest.raises(KeyboardInterrupt):
        build(media, tmp_path / "out", shard_bytes=1, make=make)
    # What is known by then can be read already.
    assert (tmp_path / "out" / "build" / "rejected.tsv").exists()
    build(media, tmp_path / "out", shard_bytes=1, make=make)
    files = 9 + 3 + len(BAD)
    assert len(reads) == files + 1
    assert len(set(reads)) == files
    before = len(reads)
    assert build(media, tmp_path / "out", shard_bytes=1, make=make).complete
    assert len(reads) == before


FATAL = """
import os, signal, sys
from elastictok.data import build, make_record

def make(listed, encoding):
    if listed.key.endswith(os.environ["FATAL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return make_record(listed, encoding)

if __name__ == "__main__":
    print(build(sys.argv[1], sys.argv[2], shard_bytes=2000, workers=int(sys.argv[3]), make=make))
"""


def run_fatal(tmp_path, media, workers, fatal):
    (tmp_path / "fatal.py").write_text(FATAL)
    return subprocess.run(
        [sys.executable, "fatal.py", media, "out", str(workers)],
        cwd=tmp_path,
        env=os.environ | {"FATAL": fatal, "ELASTICTOK_TYPECHECK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_file_that_kills_its_process_is_rejected_by_workers(media, tmp_path):
    result = run_fatal(tmp_path, media, 2, "1/3.png")
    assert result.returncode == 0, result.stderr
    assert "8 pictures and 3 clips" in result.stdout
    found = rejected(tmp_path / "out")
    assert set(found) == BAD | {"media/pictures/1/3.png"}
    assert "process that read it died" in found["media/pictures/1/3.png"]


def test_killed_at_any_file_a_build_goes_on(media, tmp_path):
    build(media, tmp_path / "expected", shard_bytes=2000)
    for fatal in ("clips/1.mp4", "0/0.png", "1/7.jpg"):
        result = run_fatal(tmp_path, media, 0, fatal)
        assert result.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "dataset.json").exists()
    assert run_fatal(tmp_path, media, 0, "none").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


SLOW = """
import sys, time
from elastictok.data import build, make_record

def make(listed, encoding):
    print(listed.key, flush=True)
    time.sleep(0.2)
    return make_record(listed, encoding)

if __name__ == "__main__":
    try:
        build(sys.argv[1], sys.argv[2], shard_bytes=1, workers=2, make=make)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_with_workers_nothing_is_left_running(how, media, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "slow.py", media, "out"],
        cwd=tmp_path,
        env=os.environ | {"ELASTICTOK_TYPECHECK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    process.stdout.readline()
    if how == signal.SIGINT:  # as a terminal sends it: to all
        os.killpg(process.pid, how)
    else:
        process.kill()
    # The pipes end when the last process that holds them does.
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert "Traceback" not in errors, errors
    build(media, tmp_path / "expected", shard_bytes=1)
    build(media, tmp_path / "out", shard_bytes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


JOB = """
import sys
from elastictok.data import build

build(sys.argv[1], sys.argv[2], shard_bytes=1, shard=(int(sys.argv[3]), 3))
"""


def test_jobs_at_the_same_time(media, tmp_path):
    build(media, tmp_path / "expected", shard_bytes=1)
    command = [sys.executable, "-c", JOB, media, tmp_path / "out"]
    jobs = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE) for i in range(3)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], errors
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_encoding_anew_only_what_is_larger_or_faster(tmp_path, make):
    folder = tmp_path / "in"
    folder.mkdir()
    rows, columns = np.mgrid[:90, :120]
    wave = (127 + 100 * np.sin(rows / 9) * np.cos(columns / 11)).astype(np.uint8)
    picture = wave[..., None].repeat(3, 2)
    write_picture(folder / "large.png", picture)
    write_picture(folder / "small.png", picture[:20, :30])
    write_clip(folder / "large.mp4", make.numbered(24, 90, 120), 24)
    write_clip(folder / "fast.mp4", make.numbered(24, 32, 48), 24)
    write_clip(folder / "slow.mp4", make.numbered(6, 30, 44), 8)
    build(folder, tmp_path / "out", resolution=32, fps=12)
    found = {record.key.removeprefix("in/"): record for record in records(tmp_path / "out")}
    for name in ("small.png", "slow.mp4"):
        assert found[name].data == (folder / name).read_bytes()
    large = found["large.png"]
    assert (large.height, large.width) == (32, 43)
    shown = np.asarray(Image.open(io.BytesIO(large.data)))
    exact = np.asarray(Image.fromarray(picture).resize((43, 32), Image.Resampling.BICUBIC))
    assert np.abs(shown.astype(int) - exact).mean() < 3
    for name, size in (("large.mp4", (32, 42)), ("fast.mp4", (32, 48))):
        record = found[name]
        assert (record.height, record.width) == size
        assert record.fps == pytest.approx(12)
        assert record.frames == 12
        assert record.duration == pytest.approx(1)
        (tmp_path / name).write_bytes(record.data)
        assert make.numbers(read_media(tmp_path / name).frames) == list(range(0, 24, 2))


def test_a_variable_rate_keeps_its_timing_when_only_the_size_changes(tmp_path, make):
    (tmp_path / "in").mkdir()
    frames = make.numbered(29, 64, 64)[::7]
    times = [0, 100, 200, 800, 900]
    make.encode(tmp_path / "in" / "a.mp4", frames, times=times, rate=1000)
    before = read_media(tmp_path / "in" / "a.mp4", fps=10).frames
    build(tmp_path / "in", tmp_path / "out", resolution=32)
    (record,) = records(tmp_path / "out")
    assert record.height == 32
    (tmp_path / "b.mp4").write_bytes(record.data)
    after = read_media(tmp_path / "b.mp4", fps=10).frames
    shown = [0, 1, 2, 2, 2, 2, 2, 2, 3]
    assert [round(number / 7) for number in make.numbers(before)][:9] == shown
    assert [round(number / 7) for number in make.numbers(after)][:9] == shown


def test_training_on_a_data_set_is_training_on_its_files(media, tmp_path):
    build(media, tmp_path / "out", shard_bytes=2000)
    geometry = Geometry((8, 8), 2, 2)
    batches = []
    (tmp_path / "clips").mkdir()
    for path in (media / "clips").glob("?.mp4"):
        (tmp_path / "clips" / path.name).symlink_to(path)
    for folder in (media / "pictures" / "0", media / "pictures" / "1", tmp_path / "clips"):
        out = tmp_path / "built" / folder.name
        build(folder, out, shard_bytes=2000)
        pair = []
        for data in (folder, out):
            with iter(load_folders(data, geometry, crop=CentreCrop(), batch_size=2)) as iterator:
                pair.append([next(iterator) for _ in range(4)])
        for one, other in zip(*pair, strict=True):
            assert (one.pixels == other.pixels).all()
            assert (one.segments == other.segments).all()
        batches += pair[1]
    assert batches[0].names[0][0].startswith(f"{tmp_path / 'built' / '0'}:0/")


@pytest.mark.parametrize(
    ("folders", "changes", "message"),
    [
        ([], {}, "no folder was given"),
        (["missing"], {}, "no such file or folder"),
        (["a", "a/b"], {}, "is in .*a, which is given too"),
        (["a", "a"], {}, "is in .*a, which is given too"),
        (["empty"], {}, "no file in this folder"),
        (["a"], {"shard": (3, 3)}, "index < count"),
        (["a"], {"workers": -1}, "workers is -1"),
        (["a"], {"shard_bytes": 0}, "shard_bytes is 0"),
        (["a"], {"resolution": 1}, "resolution is 1"),
        (["a"], {"fps": -1.0}, "fps is -1"),
    ],
)
def test_settings_that_cannot_be(folders, changes, message, tmp_path):
    write_in(tmp_path / "a" / "b" / "x.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        build([tmp_path / name for name in folders], tmp_path / "out", **changes)


def write_in(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, np.zeros((4, 4, 3), np.uint8))


def test_places_that_cannot_be_built_in(tmp_path):
    write_in(tmp_path / "a" / "x.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.pdf").touch()
    with pytest.raises(MediaError, match=r"holds other files, such as thesis\.pdf"):
        build(tmp_path / "a", tmp_path / "full")
    for out in (tmp_path / "a", tmp_path / "a" / "out"):
        with pytest.raises(MediaError, match="of which it is built"):
            build(tmp_path / "a", out)
    with pytest.raises(MediaError, match="not a built data set"):
        BuiltDataset(tmp_path / "a")


@pytest.mark.parametrize("complete", [True, False])
def test_other_settings_are_refused_with_their_name(complete, tmp_path):
    write_in(tmp_path / "a" / "x.png")
    write_in(tmp_path / "a" / "y.png")

    def make(listed, encoding):
        if listed.key == "a/y.png" and not complete:
            raise Stopped
        return opaque(listed, encoding)

    try:
        build(tmp_path / "a", tmp_path / "out", licence="one", make=make)
    except Stopped:
        assert not complete
    with pytest.raises(MediaError, match="begun with licence = one, now it is other"):
        build(tmp_path / "a", tmp_path / "out", licence="other", make=make)
    write_in(tmp_path / "b" / "x.png")
    with pytest.raises(MediaError, match="begun with folders"):
        build(tmp_path / "b", tmp_path / "out")


def test_folders_of_one_name_and_single_files(tmp_path):
    for name in ("one/p/x.png", "two/p/x.png", "z.png"):
        write_in(tmp_path / name)
    build([tmp_path / "one" / "p", tmp_path / "two" / "p", tmp_path / "z.png"], tmp_path / "out")
    assert [record.key for record in records(tmp_path / "out")] == ["p/x.png", "p.2/x.png", "z.png"]


def test_a_table_says_source_and_licence_of_single_files(tmp_path):
    for name in ("x.png", "sub/y.png", "sub/z.png"):
        write_in(tmp_path / "in" / name)
    table = tmp_path / "table.tsv"
    table.write_text("path\tbytes\tlicence\nsub/y.png\t3\tMIT\nx.png\t4\t\nin/sub/z.png\t5\t0BSD\n")
    build(tmp_path / "in", tmp_path / "out", table=table, licence="unknown", source="here")
    found = {record.key: (record.source, record.licence) for record in records(tmp_path / "out")}
    assert found == {
        "in/sub/y.png": ("here", "MIT"),
        "in/sub/z.png": ("here", "0BSD"),
        "in/x.png": ("here", "unknown"),
    }
    text = describe_data(tmp_path / "out")
    assert all(licence in text for licence in ("MIT (1)", "0BSD (1)", "unknown (1)"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\nx.png\n", "must name the columns path and source or licence"),
        ("", "it names none"),
        ("path\tlicence\nnowhere.png\tMIT\n", "none of its 1 paths is that of a file here"),
    ],
)
def test_a_table_that_says_nothing_is_refused(text, message, tmp_path):
    write_in(tmp_path / "in" / "x.png")
    (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(MediaError, match=message):
        build(tmp_path / "in", tmp_path / "out", table=tmp_path / "table.tsv")
    # Nothing is left that would stop the next try.
    assert build(tmp_path / "in", tmp_path / "out").complete


def test_progress_grows_to_the_end(media, tmp_path, monkeypatch):
    from elastictok.data import _build

    clock = itertools.count()
    monkeypatch.setattr(_build.time, "monotonic", lambda: float(next(clock)))
    seen = []
    build(media, tmp_path / "out", progress=seen.append)
    assert len(seen) > 5
    for before, after in itertools.pairwise(seen):
        assert after.files >= before.files
        assert after.bytes >= before.bytes
        assert after.seconds > before.seconds
    last = seen[-1]
    assert (last.files, last.bytes) == (last.all_files, last.all_bytes)
    assert (last.all_files, last.rejected, last.seconds_left) == (15, 3, 0)
    half = dataclasses.replace(last, bytes=last.all_bytes // 4, seconds=10.0)
    assert half.seconds_left == pytest.approx(30, rel=0.01)


def test_what_is_in_it_is_told_and_drawn(media, tmp_path):
    build(media, tmp_path / "out", licence="CC0-1.0")
    text = describe_data(tmp_path / "out")
    assert "pictures: 9" in text
    assert "clips: 3" in text
    assert "18 frames" in text
    assert "rejected: 3 files" in text
    assert "CC0-1.0 (9)" in text
    contact_sheet(tmp_path / "out", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] > sheet.shape[0] > 400
    # Nine pictures of noise above, rows of frames of rising grey below.
    assert sheet[30:110, :800].std() > 40
    row = sheet[-50, 50 :: (96 + 4), 0].astype(int)
    assert (np.diff(row[:10]) >= 0).all()
    assert row[9] > row[0]


def test_nothing_usable_is_still_a_result(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no")
    built = build(tmp_path / "in", tmp_path / "out")
    assert built.complete
    assert (built.records, built.rejected) == ({"pictures": 0, "clips": 0}, 1)
    assert "pictures: none" in describe_data(tmp_path / "out")
    with pytest.raises(MediaError, match="empty"):
        contact_sheet(tmp_path / "out", tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="neither pictures nor clips"):
        load_folders(tmp_path / "out", Geometry((4, 4), 1))


FULL = """
import resource, signal, sys
from elastictok.data import build

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
build(sys.argv[1], sys.argv[2])
"""


def test_a_disk_that_is_full_is_an_error_and_loses_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 200, 3)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for index in range(4):
        write_picture(tmp_path / "in" / f"{index}.png", noise)
    command = [sys.executable, "-c", FULL, tmp_path / "in", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build"]
    build(tmp_path / "in", tmp_path / "out")
    assert [record.key for record in records(tmp_path / "out")] == [f"in/{i}.png" for i in range(4)]
