"""The whole way from folders to batches, with files that are good, odd and bad."""

import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from elastictok.data import (
    CentreCrop,
    Geometry,
    MediaError,
    MediaReader,
    MediaWarning,
    RandomCrop,
    load_folders,
    write_clip,
    write_picture,
)
from elastictok.data import _source as source_module

GEOMETRY = Geometry((16, 16), 2, 4, fps=8)


def take(dataset, count):
    with iter(dataset) as batches:
        return [next(batches) for _ in range(count)]


def used(report):
    return report["pictures"].items, report["clips"].items


def equal(left, right):
    pairs = zip(left, right, strict=True)
    return all((a.pixels == b.pixels).all() and (a.valid == b.valid).all() for a, b in pairs)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make):
    """Six pictures and four clips in nested folders."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for index, suffix in enumerate(["png", "jpg", "webp", "bmp", "PNG", "jpeg"]):
        (root / "p" / suffix).mkdir(parents=True)
        height, width = rng.integers(20, 90, 2)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        pixels = np.asarray(small.resize((int(width), int(height))))
        write_picture(root / "p" / suffix / f"{index}.{suffix}", pixels)
    for suffix, frames, rate, size in [
        ("mp4", 30, 24, (48, 64)),
        ("webm", 30, 8, (33, 47)),
        ("avi", 3, 8, (32, 32)),
        ("mov", 28, 12, (64, 24)),
    ]:
        (root / "c").mkdir(exist_ok=True)
        write_clip(root / "c" / f"clip.{suffix}", make.numbered(frames, *size), rate)
    return root


@pytest.fixture
def broken(tmp_path):
    """A folder of files that cannot be used, each for a reason of its own."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a clip at all, though it says so\n" * 10)
    (tmp_path / "empty.png").touch()
    write_picture(tmp_path / "cut.jpg", np.zeros((50, 50, 3), np.uint8))
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[:300])
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    return tmp_path


def test_everything_in_nested_folders_is_used(folder):
    dataset = load_folders(folder, GEOMETRY, batch_size=4)
    with iter(dataset) as batches:
        seen = [next(batches) for _ in range(8)]
        report = batches.report()
    assert (used(report), report.skipped) == ((6, 4), ())
    assert all(batch.pixels.shape == (4, 4, 2, 16, 16, 3) for batch in seen)
    assert np.mean([batch.valid.mean() for batch in seen]) > 0.7


def test_clips_are_resampled_and_their_frames_are_in_order(folder, make):
    # Thirty frames at 24 per second give ten at 8, every third; a stretch has eight of them.
    dataset = load_folders(folder / "c" / "clip.mp4", GEOMETRY, crop=CentreCrop())
    starts = set()
    for batch in take(dataset, 6):
        for row in batch.pixels.reshape(8, 8, 16, 16, 3):
            numbers = make.numbers(row)
            assert numbers == list(range(numbers[0], numbers[0] + 24, 3))
            starts.add(numbers[0])
    assert starts == {0, 3, 6}


def test_the_cache_changes_nothing(folder):
    for crop in (CentreCrop(), RandomCrop(0.6, 0.9)):
        batches = [
            take(load_folders(folder, GEOMETRY, crop=crop, cache_bytes=limit), 6)
            for limit in (0, 20_000, 2**30)
        ]
        assert equal(batches[0], batches[1])
        assert equal(batches[0], batches[2])


def test_stretches_of_long_clips_are_those_of_the_whole(folder, monkeypatch):
    short = Geometry((16, 16), 1, 2, fps=8)
    read, stretches = source_module.read_stretch, []

    def counting(stored, probe, **arguments):
        stretches.append(stored.suffix)
        return read(stored, probe, **arguments)

    monkeypatch.setattr(source_module, "read_stretch", counting)
    whole = take(load_folders(folder / "c", short, batch_size=4), 6)
    assert not stretches
    parts = take(load_folders(folder / "c", short, batch_size=4, cache_bytes=4096), 6)
    assert set(stretches) == {".mp4", ".webm", ".mov"}
    assert equal(whole, parts)


def test_decoded_files_stay_within_the_limit(folder):
    dataset = load_folders(folder, GEOMETRY, cache_bytes=30_000)
    take(dataset, 10)
    cache, other = (component.source._cache for component in dataset.components)
    assert cache is other
    assert 0 < cache.held <= 30_000


def test_decoding_happens_once(folder, monkeypatch):
    read, opened = source_module.read_picture, []

    def counting(path, **arguments):
        opened.append(path)
        return read(path, **arguments)

    monkeypatch.setattr(source_module, "read_picture", counting)
    take(load_folders(folder / "p", GEOMETRY, batch_size=8), 6)
    assert len(opened) == 6


def test_broken_files_are_skipped_named_once_and_counted(folder, broken):
    dataset = load_folders([folder, broken], GEOMETRY, batch_size=4)
    with warnings.catch_warnings(record=True) as caught, iter(dataset) as batches:
        warnings.simplefilter("always")
        for _ in range(16):
            next(batches)
        report = batches.report()
    names = {"empty.mp4", "text.mp4", "empty.png", "cut.jpg", "gone.png"}
    messages = [str(w.message) for w in caught if w.category is MediaWarning]
    assert len(messages) == 5
    assert all(sum(name in text for text in messages) == 1 for name in names)
    assert {os.path.basename(item.name) for item in report.skipped} == names
    assert used(report) == (6, 4)
    assert "5 files skipped" in str(report)
    assert all(item.reason in str(report) for item in report.skipped)


def test_a_broken_file_is_opened_once(broken, folder, monkeypatch):
    read, opened = source_module.read_picture, []

    def counting(path, **arguments):
        opened.append(path.name)
        return read(path, **arguments)

    monkeypatch.setattr(source_module, "read_picture", counting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        take(load_folders([broken, folder / "p"], GEOMETRY), 8)
    assert opened.count("cut.jpg") == 1


def test_nothing_but_broken_files_is_an_error(broken):
    with iter(load_folders(broken, GEOMETRY)) as batches:
        with pytest.raises(MediaError, match="none of the 5 files here can be used") as caught:
            next(batches)
        assert caught.value.path.parent == broken


def test_damaged_clips_are_used_and_reported(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8)
    write_clip(tmp_path / "a.mp4", noise, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    with iter(load_folders(tmp_path, GEOMETRY)) as batches:
        assert next(batches).valid.all()
        report = batches.report()
    assert [item.name for item in report.damaged] == [str(tmp_path / "a.mp4")]
    assert report.damaged[0].missing >= 10
    assert f"a.mp4: {report.damaged[0].missing} frames missing" in str(report)
    # Read by stretches, of which some begin behind its end.
    short = Geometry((16, 16), 1, 1, fps=8)
    for batch in take(load_folders(tmp_path, short, cache_bytes=4096, batch_size=16), 3):
        assert batch.valid.all()


def test_a_clip_shorter_than_a_block_repeats_its_last_frame(folder, make):
    dataset = load_folders(folder / "c" / "clip.avi", Geometry((16, 16), 5, 2, fps=8))
    (batch,) = take(dataset, 1)
    assert all(make.numbers(block) == [0, 1, 2, 2, 2] for row in batch.pixels for block in row)


def test_sizes_that_are_not_square(folder):
    for size in ((8, 24), (31, 7)):
        (batch,) = take(load_folders(folder, Geometry(size, 1, 2, fps=8)), 1)
        assert batch.pixels.shape == (8, 2, 1, *size, 3)


def test_resuming_after_a_move(folder, tmp_path):
    dataset = load_folders(folder, GEOMETRY)
    with iter(dataset) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        expected = [next(batches) for _ in range(3)]
    moved = tmp_path / "elsewhere"
    moved.symlink_to(folder, target_is_directory=True)
    with iter(load_folders(moved, GEOMETRY)) as batches:
        batches.set_state(state)
        assert equal([next(batches) for _ in range(3)], expected)


def test_other_files_cannot_be_resumed(folder, broken):
    with iter(load_folders(folder, GEOMETRY)) as batches:
        next(batches)
        state = batches.get_state()
    with (
        iter(load_folders([folder, broken], GEOMETRY)) as batches,
        pytest.raises(ValueError, match="pictures are not the same; the clips are not the same"),
    ):
        batches.set_state(state)


def test_closing_ends_the_thread(folder):
    before = threading.active_count()
    batches = iter(load_folders(folder, GEOMETRY))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    batches.close()
    for use in (batches.get_state, batches.__next__):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("close", ["", "batches.close()", "del batches"])
def test_a_program_ends_quietly(close, folder):
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import elastictok.data as data\n"
        f"dataset = data.load_folders({str(folder)!r}, data.Geometry((8, 8), 1))\n"
        f"batches = iter(dataset)\nbatch = next(batches)\n{close}"
    )
    result = run(code, ELASTICTOK_TYPECHECK="0")
    # Grain says this much where jax is not installed.
    noise = [line for line in result.stderr.splitlines() if "jax profiler" not in line]
    assert (result.returncode, result.stdout, noise) == (0, "", [])


QUIET = """
import json, sys, warnings
from elastictok.data import Geometry, load_folders

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    batches = iter(load_folders(sys.argv[1], Geometry((8, 8), 1), workers=2))
    for _ in range(5):
        batch = next(batches)
    json.dumps(batches.get_state())
    if sys.argv[2] == "close":
        batches.close()
"""


@pytest.mark.heavy
@pytest.mark.parametrize("close", ["close", "leave"])
def test_a_program_with_workers_needs_no_flags_parsed_and_ends_quietly(close, folder, tmp_path):
    """Grain alone raises UnparsedFlagAccessError, and prints exceptions at the end."""
    (tmp_path / "quiet.py").write_text(QUIET)
    result = subprocess.run(
        [sys.executable, "quiet.py", folder, close],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"ELASTICTOK_TYPECHECK": "0"},
        check=False,
    )
    noise = [line for line in result.stderr.splitlines() if "jax profiler" not in line]
    assert (result.returncode, result.stdout, noise) == (0, "", [])


@pytest.mark.heavy
def test_workers(folder, broken):
    """Two processes: shares hold in every batch, resuming is exact, warnings arrive."""
    arguments = {"batch_size": 4, "workers": 2, "image_share": 0.5}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with iter(load_folders([folder, broken], GEOMETRY, **arguments)) as batches:
            seen = [next(batches) for _ in range(7)]
            state = json.loads(json.dumps(batches.get_state()))
            expected = [next(batches) for _ in range(5)]
            report = batches.report()
    messages = [str(w.message) for w in caught if w.category is MediaWarning]
    assert len(messages) == len(set(messages)) == len(report.skipped) == 5
    assert used(report) == (6, 4)
    for batch in seen + expected:
        # Pictures are those blocks of which both frames are the same.
        still = (batch.pixels[:, :, 0] == batch.pixels[:, :, 1]).all((2, 3, 4))[batch.valid]
        assert 0.2 <= still.mean() <= 0.8
    # Owned by this process, so that nothing refers to a worker that has ended.
    assert all(batch.pixels.flags["OWNDATA"] for batch in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        with iter(load_folders([folder, broken], GEOMETRY, **arguments)) as batches:
            batches.set_state(state)
            assert equal([next(batches) for _ in range(5)], expected)


def test_reader(folder, broken):
    reader = MediaReader([folder, broken], fps=8, max_frames=9)
    assert len(reader) == 15
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clips = list(reader)
    assert len([w for w in caught if w.category is MediaWarning]) == 5
    assert [clip.path for clip in clips] == [p for p in reader.paths if p.parent != broken]
    assert [clip.picture for clip in clips] == [True] * 6 + [False] * 4
    assert all(len(clip.frames) <= 9 for clip in clips)
    report = reader.report()
    assert (used(report), report.documents) == ((6, 4), 10)
    assert len(report.skipped) == 5
    again = [clip.frames.shape for clip in MediaReader(folder, fps=8, max_frames=9)]
    assert again == [clip.frames.shape for clip in clips]


def test_reader_of_nothing_usable(broken):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MediaWarning)
        with pytest.raises(MediaError, match="none of the 5 files"):
            list(MediaReader(broken))


def test_importing_and_reading_bring_no_accelerator_library(folder):
    """Nor Grain, which is slow to import and brings jax along."""
    code = (
        "import sys, elastictok.data as data\n"
        f"clips = list(data.MediaReader({str(folder)!r}))\n"
        f"data.load_folders({str(folder)!r}, data.Geometry((8, 8), 1))\n"
        "print(len(clips), {'jax', 'jaxlib', 'equinox', 'grain'} & set(sys.modules))"
    )
    result = run(code, ELASTICTOK_TYPECHECK="0")
    assert result.stdout.strip() == "10 set()", result.stderr


def test_wrong_shapes_raise_when_asked_for():
    code = (
        "import numpy as np\nfrom elastictok.data import Batch\n"
        "Batch(np.zeros((1, 2, 1, 4, 4, 3), np.uint8), np.zeros((1, 3), np.int32),"
        " np.zeros((1, 2), bool))"
    )
    assert run(code, ELASTICTOK_TYPECHECK="0").returncode == 0
    result = run(code, ELASTICTOK_TYPECHECK="1")
    assert "TypeCheckError" in result.stderr
