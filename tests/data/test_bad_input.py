"""Odd, damaged and hostile input: used or refused with a reason, and the same by both ways in.

A folder is trained on directly, and after it was built. Whatever the files are, both use the same
ones, deliver the same pixels, and name the others.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from elastictok.data import (
    CLIPS,
    PICTURES,
    BuiltDataset,
    CentreCrop,
    Clip,
    Geometry,
    MediaError,
    MediaWarning,
    RandomCrop,
    Record,
    WholeClip,
    WorkingSize,
    _picture,
    build,
    find_media,
    load_clips,
    load_folders,
    read_media,
    write_clip,
    write_picture,
)
from elastictok.data._clip import read_clip
from elastictok.data._picture import read_picture
from elastictok.data._stored import Blob

# One frame in a block and room for all of a clip: a document is the whole file, whatever is drawn.
GEOMETRY = Geometry((24, 32), 1, 40, fps=None)
SUFFIXES = PICTURES + CLIPS
# Where an example is a folder of files, a smaller one takes minutes to find and says no more.
AS_FOUND = (Phase.explicit, Phase.reuse, Phase.generate)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training saw of each file, by its key; what it skipped and why; frames it missed."""

    pixels: dict[str, np.ndarray]
    skipped: dict[str, str]
    damaged: dict[str, int]


def train(dataset, key):
    """Goes on until every file was used or skipped; `key` makes keys of the names in reports."""
    total = sum(len(component.source) for component in dataset.components)
    pixels: dict[str, np.ndarray] = {}
    with warnings.catch_warnings(record=True) as caught, iter(dataset) as batches:
        warnings.simplefilter("always")
        for batch in itertools.islice(batches, 20 * total):
            for row, names in enumerate(batch.names):
                for segment, name in enumerate(names, 1):
                    document = batch.pixels[row, batch.segments[row] == segment, 0]
                    assert np.array_equal(pixels.setdefault(key(name), document), document)
            report = batches.report()
            if report.used + len(report.skipped) == total:
                break
        else:
            pytest.fail(f"not every file was tried: {report}")
    told = [str(w.message) for w in caught if issubclass(w.category, MediaWarning)]
    told = [text for text in told if not text.startswith("none of the")]
    # A warning for each file that was skipped, and no second one.
    assert sorted(told) == sorted(f"skipped {item.name}: {item.reason}" for item in report.skipped)
    skipped = {key(item.name): item.reason for item in report.skipped}
    damaged = {key(item.name): item.missing for item in report.damaged}
    assert set(pixels) == {key(c.source.name(i)) for c in dataset.components for i in items(c)} - (
        set(skipped)
    )
    return Trained(pixels, skipped, damaged)


def items(component):
    return range(len(component.source))


def train_on_folder(folder):
    dataset = load_folders(folder, GEOMETRY, crop=CentreCrop(), batch_size=2)
    return train(dataset, lambda name: os.path.relpath(name, folder.parent))


def train_on_built(out):
    dataset = load_folders(out, GEOMETRY, crop=CentreCrop(), batch_size=2)
    return train(dataset, lambda name: name.removeprefix(f"{out}:"))


def all_records(out):
    dataset = BuiltDataset(out)
    parts = (dataset.pictures, dataset.clips)
    found = {part.key(i): part[i] for part in parts for i in range(len(part))}
    assert all(record.key == key for key, record in found.items())
    return found


def table(path):
    """A table of problems: one line for each file, with tabs and line ends as in C."""
    _, *lines, end = path.read_text("utf-8").split("\n")
    assert end == ""
    rows = dict(line.split("\t") for line in lines)
    assert len(rows) == len(lines)
    return {unescaped(key): value for key, value in rows.items()}


def unescaped(cell):
    plain = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}

    def one(match):
        return plain.get(match[1]) or chr(int(match[1][1:], 16))

    return re.sub(r"\\(\\|t|n|r|u[0-9a-f]{4})", one, cell)


def decoded(record):
    """All pixels of a record."""
    if record.kind == "clip":
        return read_clip(record.blob).frames
    return read_picture(record.blob)[None]


@dataclasses.dataclass(frozen=True)
class Ways:
    """What came of a folder by both ways."""

    folder: Path
    out: Path
    direct: Trained
    packed: Trained
    records: dict[str, Record]
    rejected: dict[str, str]
    damaged: dict[str, str]

    @classmethod
    def of(cls, folder):
        out = folder.with_name("built")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            built = build(folder, out)
        assert built.complete
        ways = cls(
            folder,
            out,
            train_on_folder(folder),
            train_on_built(out),
            all_records(out),
            table(out / "rejected.tsv"),
            table(out / "damaged.tsv"),
        )
        assert sum(built.records.values()) == len(ways.records)
        assert (built.rejected, built.damaged) == (len(ways.rejected), len(ways.damaged))
        return ways

    def path(self, key):
        return self.folder.parent / key

    def check(self):
        """Both ways agree about every file."""
        listed = {os.path.relpath(p, self.folder.parent) for p in find_media(self.folder).paths}
        assert set(self.direct.pixels) == set(self.packed.pixels) == set(self.records)
        assert set(self.direct.skipped) == {key for key in self.rejected if key in listed}
        assert not self.packed.skipped
        assert set(self.records) | set(self.rejected) >= listed
        assert not set(self.records) & set(self.rejected)
        missing = {key: int(count) for key, count in self.damaged.items()}
        assert self.direct.damaged == self.packed.damaged == missing
        for key in self.records:
            self.check_used(key)

    def check_used(self, key):
        record = self.records[key]
        assert record.key == key
        clip = read_media(self.path(key))
        assert record.data == self.path(key).read_bytes()
        assert record.kind == ("picture" if clip.picture else "clip")
        assert (record.frames, record.height, record.width, 3) == clip.frames.shape
        assert record.missing == clip.missing == int(self.damaged.get(key, 0))
        assert (record.fps is None, record.duration is None) == (clip.picture, clip.picture)
        assert np.array_equal(decoded(record), clip.frames)
        assert np.array_equal(self.direct.pixels[key], self.packed.pixels[key])


def still(kind, mode="RGB", size=(33, 47), **options):
    def write(path, make):
        image = Image.fromarray(make.corners(*size)).convert(mode)
        image.save(path, kind, **options)
        return np.asarray(image.convert("RGB"))[None]

    return write


def see_through(mode):
    """A picture that fades from left to right."""

    def write(path, make):
        image = Image.fromarray(make.corners(32, 48)).convert(mode.removesuffix("A"))
        alpha = np.broadcast_to(np.linspace(0, 255, 48).astype(np.uint8), (32, 48))
        pixels = np.asarray(image.convert("RGB")).astype(float)
        image.putalpha(Image.fromarray(alpha.copy()))
        assert image.mode == mode
        image.save(path, "PNG")
        opaque = alpha[..., None] / 255
        return (pixels * opaque + 255 * (1 - opaque)).round().astype(np.uint8)[None]

    return write


def deep_grey(path, make):
    grey = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    Image.fromarray(grey).save(path, "PNG")
    return (grey / 257).round().astype(np.uint8)[None, ..., None].repeat(3, -1)


def png_chunks(width, height, depth, colour, rows):
    """A PNG, also one that Pillow cannot write."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(chunk, parts))


def deep_colour(path, make):
    pixels = make.corners(32, 48)
    rows = b"".join(b"\0" + row.tobytes() for row in (pixels.astype(">u2") * 257))
    path.write_bytes(png_chunks(48, 32, 16, 2, rows))
    return pixels[None]


def several(kind, seen, **options):
    """A file of four pictures, the first `seen` of which count."""

    def write(path, make):
        frames = make.numbered(4)
        first, *others = map(Image.fromarray, frames)
        first.save(path, kind, save_all=True, append_images=others, **options)
        return frames[:seen]

    return write


def turned_picture(path, make):
    image = Image.fromarray(make.corners(32, 48))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, quality=95, exif=exif)
    return np.rot90(make.corners(32, 48), -1)[None]


def turned_clip(path, make):
    write_clip(path, np.stack([make.corners(32, 48)] * 3), 10)
    make.turn(path, (0, 1, -1, 0))
    return np.stack([np.rot90(make.corners(32, 48), -1)] * 3)


def written(count=6, *size, as_if=None):
    """A clip of the format that the suffix says, or another."""

    def write(path, make):
        frames = make.numbered(count, *size)
        other = path.with_suffix(as_if or path.suffix)
        write_clip(other, frames, 8)
        other.rename(path)
        return frames

    return write


def coded(*codecs, pix_fmt="yuv420p", **options):
    """A clip by the first of some encoders that there is; `None` if there is none."""

    def write(path, make):
        codec = next((name for name in codecs if name in av.codecs_available), None)
        if codec is None:
            return None
        make.encode(path, make.numbered(6, 64, 64), codec=codec, pix_fmt=pix_fmt, **options)
        return make.numbered(6, 64, 64)

    return write


# What is used: each writes a file and returns the frames that must be seen, but for what a lossy
# format makes of them.
USED = {
    "baseline.jpg": still("JPEG", quality=95),
    "fine.jpeg": still("JPEG", quality=95, subsampling=0),
    "grey.jpg": still("JPEG", "L"),
    "progressive.jpg": still("JPEG", progressive=True),
    "restarting.jpg": still("JPEG", restart_marker_rows=1),
    "large.jpg": still("JPEG", size=(330, 470)),
    "cmyk.jpg": still("JPEG", "CMYK"),
    "turned.jpg": turned_picture,
    "phone.jpg": several("MPO", 1),
    "palette.png": still("PNG", "P"),
    "bits.png": still("PNG", "1"),
    "grey.png": still("PNG", "L"),
    "deep.png": deep_grey,
    "deep colour.png": deep_colour,
    "alpha.png": see_through("RGBA"),
    "grey alpha.png": see_through("LA"),
    "one.png": still("PNG", size=(1, 1)),
    "wide.png": still("PNG", size=(1, 16000)),
    "tall.jpg": still("JPEG", size=(16000, 1)),
    "animated.png": several("PNG", 1),
    "animated.webp": several("WEBP", 1, lossless=True),
    "lossy.webp": still("WEBP"),
    "plain.bmp": still("BMP"),
    "UPPER.PNG": still("PNG"),
    "a jpeg.png": still("JPEG"),
    "a png.jpg": still("PNG"),
    "a webp.bmp": still("WEBP"),
    "a bmp.webp": still("BMP"),
    "a gif.jpeg": still("GIF"),
    "animated.gif": several("GIF", 4, duration=100),
    "plain.mp4": written(),
    "plain.m4v": written(),
    "plain.mov": written(),
    "plain.mkv": written(),
    "plain.avi": written(),
    "plain.webm": written(),
    "long.mp4": written(30),
    "one.mp4": written(1),
    "one.webm": written(1),
    "one.gif": still("GIF"),
    "odd.webm": written(6, 33, 47),
    "an mp4.webm": written(as_if=".mp4"),
    "a webm.mp4": written(as_if=".webm"),
    "an mp4.gif": written(as_if=".mp4"),
    "variable.mp4": coded("libx264", times=[0, 100, 200, 800, 900, 1000]),
    "index behind.mp4": coded("libx264"),
    "hevc.mp4": coded("libx265", options={"x265-params": "log-level=none"}),
    "av1.mp4": coded("libsvtav1", "libaom-av1", options={"preset": "12"}),
    "vp9.mkv": coded("libvpx-vp9"),
    "mpeg4.mp4": coded("mpeg4"),
    "mjpeg.avi": coded("mjpeg", pix_fmt="yuvj420p"),
    "ffv1.mkv": coded("ffv1"),
    "turned.mp4": turned_clip,
    "folder.mp4/inside.png": still("PNG"),
}


def content(data):
    def write(path, make):
        path.write_bytes(data)

    return write


def noise(seed):
    return content(np.random.default_rng(seed).bytes(1000))


def renamed(written_as, writer):
    def write(path, make):
        writer(path.with_suffix(written_as), make)
        path.with_suffix(written_as).rename(path)

    return write


def declared(kind, start, size):
    """A small picture whose header says that it is large: `size` is put at `start`, or behind it
    if that is a marker."""

    def write(path, make):
        Image.new("RGB", (8, 8)).save(path, kind, lossless=True)
        data = bytearray(path.read_bytes())
        at = start if isinstance(start, int) else data.index(start) + len(start)
        data[at : at + len(size)] = size
        path.write_bytes(data)

    return write


def strange_colours(path, make):
    """A colour matrix that there is a number for, and no decoder."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=5)
        context = stream.codec_context
        context.height, context.width, context.pix_fmt = 32, 32, "yuv420p"
        context.colorspace = 14
        output.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(stream.encode())


def broken_link(path, make):
    path.symlink_to(path.parent / "nowhere.png")


TEXT = content(b"These are not pixels.\n" * 20)
PLAYLIST = content(b"#EXTM3U\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n")
UNDECODABLE = r"not a (picture|clip)|cannot be decoded|an empty file"
LARGE = "limit"

# What is refused, and a word of the reason. None of the large pictures is large as a file: to be
# refused for its size it must not have been decoded.
REFUSED = {
    **{f"noise{s}": (noise(i), UNDECODABLE) for i, s in enumerate(SUFFIXES)},
    **{f"empty{s}": (content(b""), UNDECODABLE) for s in SUFFIXES},
    **{f"text{s}": (TEXT, UNDECODABLE) for s in (".jpg", ".png", ".mp4", ".webm", ".gif")},
    "a list.mp4": (PLAYLIST, UNDECODABLE),
    "a png.mp4": (renamed(".png", still("PNG")), "not a clip"),
    "a jpeg.gif": (renamed(".jpg", still("JPEG")), "not a clip"),
    "a webp.webm": (renamed(".webp", still("WEBP")), "not a clip"),
    "an mp4.jpg": (renamed(".mp4", written()), "not a picture"),
    "a webm.webp": (renamed(".webm", written()), "not a picture"),
    "sound.mp4": (lambda path, make: make.sound(path), "no video"),
    "album.mp4": (
        lambda path, make: make.sound(path, cover=make.corners(16, 16)),
        "no video",
    ),
    "strange colours.mp4": (strange_colours, "cannot be decoded"),
    "broken link.png": (broken_link, "(?i)no such file"),
    "broken link.mp4": (broken_link, "(?i)no such file"),
    "large.png": (content(png_chunks(10000, 10000, 1, 0, b"\0" * 99)), LARGE),
    "huge.png": (content(png_chunks(20000, 20000, 1, 0, b"\0" * 99)), LARGE),
    "huge.jpg": (declared("JPEG", b"\xff\xc0\x00\x11\x08", b"\xff\xdc\xff\xdc"), LARGE),
    "huge.bmp": (declared("BMP", 18, struct.pack("<ii", 30000, 30000)), LARGE),
    "huge.webp": (declared("WEBP", 21, struct.pack("<I", 2**28 - 1)), LARGE),
    "a huge gif.png": (declared("GIF", 6, b"\xff\xff\xff\xff"), LARGE),
    "huge.gif": (declared("GIF", 6, b"\xff\xff\xff\xff"), "limit|no frame of it"),
}

UNKNOWN = {
    "no suffix": still("JPEG"),
    "notes.txt": TEXT,
    "photo.heic": still("JPEG"),
    "scan.tiff": still("TIFF"),
    "photo.jpg.part": still("JPEG"),
    "clip.mp4~": renamed(".mp4", written()),
    "png": still("PNG"),
}


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All of the above in one folder, and what came of it."""

    ways: Ways
    expected: dict[str, np.ndarray | None]
    memory: Trained


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory, make):
    folder = tmp_path_factory.mktemp("catalogue") / "media"
    folder.mkdir()
    (folder / "folder.mp4").mkdir()
    expected = {name: writer(folder / name, make) for name, writer in USED.items()}
    for name, (writer, _) in REFUSED.items():
        writer(folder / name, make)
    for name, writer in UNKNOWN.items():
        writer(folder / name, make)
    ways = Ways.of(folder)
    clips = []
    for key in {f"media/{name}" for name in USED} & set(ways.records):
        rate = ways.records[key].fps
        clips.append(Clip(read_media(ways.path(key), fps=rate).frames, rate, Path(key)))
    dataset = load_clips(clips, GEOMETRY, crop=CentreCrop(), batch_size=2)
    return Catalogue(ways, expected, train(dataset, str))


def close(left, right):
    assert left.shape == right.shape
    distance = np.abs(left.astype(int) - right)
    # A frame beside the right one would be off by eight everywhere.
    assert np.median(distance, (1, 2, 3)).max() <= 4
    assert distance.mean() < 8


@pytest.mark.parametrize("name", USED)
def test_what_is_used(name, catalogue):
    expected = catalogue.expected[name]
    if expected is None:
        pytest.skip("this PyAV has no encoder for it")
    ways, key = catalogue.ways, f"media/{name}"
    assert key not in ways.rejected
    assert key not in ways.direct.skipped
    ways.check_used(key)
    assert ways.records[key].missing == 0
    assert ways.records[key].frames == len(expected)
    close(decoded(ways.records[key]), expected)
    close(ways.direct.pixels[key], catalogue.memory.pixels[key])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, catalogue):
    ways, key, reason = catalogue.ways, f"media/{name}", REFUSED[name][1]
    assert key not in ways.records
    assert key not in ways.direct.pixels
    assert re.search(reason, ways.rejected[key])
    assert re.search(reason, ways.direct.skipped[key])


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_known_suffix(name, catalogue):
    ways, key = catalogue.ways, f"media/{name}"
    assert re.search(r"suffix.*\.jpg", ways.rejected[key])
    assert key not in ways.direct.skipped
    assert key not in ways.direct.pixels


def test_both_ways_agree_about_the_catalogue(catalogue):
    ways = catalogue.ways
    ways.check()
    assert not ways.damaged
    written = {f"media/{name}" for name, frames in catalogue.expected.items() if frames is not None}
    assert set(ways.records) == written
    assert set(ways.rejected) == {f"media/{name}" for name in (*REFUSED, *UNKNOWN)}
    for name, header in (("rejected", "reason"), ("damaged", "missing_frames")):
        assert (ways.out / f"{name}.tsv").read_text("utf-8").startswith(f"key\t{header}\n")


def test_a_built_data_set_gives_the_batches_of_its_folder(catalogue, tmp_path):
    """Nothing is encoded anew, so where every file can be used, nothing changes at all."""
    for key in catalogue.ways.records:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(catalogue.ways.path(key), tmp_path / key)
    folder, out = tmp_path / "media", tmp_path / "out"
    assert not build(folder, out, shard_bytes=20_000).rejected
    assert len(list(out.glob("*.arrayrecord"))) > 4
    tight = {"cache_bytes": 10_000}  # so that the long clip is read in stretches
    for geometry, choices in [
        (Geometry((24, 32), 2, 3, fps=8), {"crop": RandomCrop(0.5, 1.0), "seed": 1}),
        (Geometry((16, 16), 2, 2, fps=None), tight | {"excerpt": WholeClip(), "image_share": 0.3}),
        (Geometry((16, 16), 1, 5, fps=12.5, buckets=((12, 24),)), tight),
    ]:
        with (
            iter(load_folders(folder, geometry, batch_size=3, **choices)) as direct,
            iter(load_folders(out, geometry, batch_size=3, **choices)) as packed,
        ):
            for one, other in zip(
                itertools.islice(direct, 25), itertools.islice(packed, 25), strict=True
            ):
                assert np.array_equal(one.pixels, other.pixels)
                assert np.array_equal(one.segments, other.segments)
                assert np.array_equal(one.valid, other.valid)
                names = [[name.removeprefix(f"{out}:") for name in row] for row in other.names]
                assert names == [
                    [os.path.relpath(name, tmp_path) for name in row] for row in one.names
                ]


def anchored(folder):
    """With a picture and a clip that are good, so that no kind is given up."""
    folder.mkdir()
    write_picture(folder / "good.png", np.full((8, 8, 3), 7, np.uint8))
    first = Image.new("L", (8, 8), 10)
    first.save(folder / "good.gif", save_all=True, append_images=[Image.new("L", (8, 8), 90)])
    return folder


def test_a_clip_that_is_cut_keeps_what_decodes(tmp_path, make):
    folder = anchored(tmp_path / "media")
    frames = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8)
    write_clip(tmp_path / "whole.mp4", frames, 10)
    data = (tmp_path / "whole.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(data[: len(data) // 2])
    ways = Ways.of(folder)
    ways.check()
    record = ways.records["media/half.mp4"]
    assert 5 < record.frames < 25
    assert record.missing >= 30 - record.frames - 3
    assert ways.damaged == {"media/half.mp4": str(record.missing)}
    assert ways.direct.damaged == {"media/half.mp4": record.missing}
    assert not ways.rejected
    whole = read_media(tmp_path / "whole.mp4").frames
    assert np.array_equal(decoded(record)[:5], whole[:5])
    (row,) = (row for row in BuiltDataset(ways.out).clips.index if row["missing"])
    assert (row["frames"], row["missing"]) == (record.frames, record.missing)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A small file to damage."""

    name: str
    data: bytes = dataclasses.field(repr=False)

    @property
    def suffix(self):
        return Path(self.name).suffix


@pytest.fixture(scope="module")
def samples(tmp_path_factory, make):
    """Thirteen of them, of every suffix but one."""
    folder = tmp_path_factory.mktemp("samples")
    picture = Image.fromarray(make.corners(40, 56))
    for name, options in {
        "a.jpg": {},
        "b.jpg": {"progressive": True},
        "a.png": {},
        "a.webp": {},
        "b.webp": {"lossless": True},
        "a.bmp": {},
    }.items():
        picture.save(folder / name, **options)
    for suffix in (".mp4", ".mov", ".mkv", ".avi", ".webm"):
        write_clip(folder / f"a{suffix}", make.numbered(6, 16, 24), 8)
    make.encode(folder / "b.mp4", make.numbered(6, 16, 24))
    several("GIF", 4)(folder / "a.gif", make)
    return [Sample(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


@contextlib.contextmanager
def scratch(tmp_path_factory):
    """A folder for one example."""
    root = tmp_path_factory.mktemp("example")
    try:
        yield root
    finally:
        shutil.rmtree(root)


PLACE = st.floats(0, 1, exclude_max=True)


def check_damaged(files, tmp_path_factory):
    with scratch(tmp_path_factory) as root:
        folder = anchored(root / "media")
        for number, (suffix, data) in enumerate(files):
            (folder / f"{number}{suffix}").write_bytes(data)
        Ways.of(folder).check()


PICKS = st.integers(0, 12)


@settings(max_examples=20, phases=AS_FOUND)
@given(cuts=st.lists(st.tuples(PICKS, PLACE), min_size=8, max_size=16))
def test_files_cut_at_any_byte(cuts, samples, tmp_path_factory):
    picked = [(samples[pick], place) for pick, place in cuts]
    files = [(one.suffix, one.data[: int(place * len(one.data))]) for one, place in picked]
    check_damaged(files, tmp_path_factory)


DAMAGE = st.lists(
    st.tuples(PLACE, st.binary(min_size=1, max_size=6), st.sampled_from([0, 1, 6])),
    min_size=1,
    max_size=3,
)


def damaged(data, spots):
    """Puts in noise for some bytes, perhaps for more or fewer than it has."""
    for place, mess, instead in spots:
        at = int(place * len(data))
        data = data[:at] + mess + data[at + instead :]
    return data


@settings(max_examples=20, phases=AS_FOUND)
@given(changes=st.lists(st.tuples(PICKS, DAMAGE), min_size=8, max_size=16))
def test_files_with_noise_anywhere(changes, samples, tmp_path_factory):
    picked = [(samples[pick], spots) for pick, spots in changes]
    files = [(one.suffix, damaged(one.data, spots)) for one, spots in picked]
    check_damaged(files, tmp_path_factory)


def test_the_suffix_helps_no_file_that_its_content_does_not(samples, tmp_path_factory):
    """ffmpeg would guess the container from the name, which a record does not have."""
    starts = (b"x", b"xx", bytes(8), bytes(3000))
    files = [(one.suffix, start + one.data) for one in samples for start in starts]
    files += [(one.suffix, b"xx" + one.data[2:]) for one in samples]
    check_damaged(files, tmp_path_factory)


NAMES = [
    b"tab\t.png",
    b"line\nend.png",
    b"carriage\r\n.png",
    b"\"quoted' and `.png",
    b"back\\slash \\t \\n \\udcff.png",
    b" spaces .png",
    b"-rf.png",
    b"%03d #?&:;*|<>.png",
    b"file:name.png",
    b"\x01\x0b\x0c\x1b[31m\x7f.png",
    "Größe 日本語 😀 \u2028\u0085.png".encode(),
    b"\xff\xfe not UTF-8 \xed\xb3\xbf.png",
]
if sys.platform == "darwin":
    NAMES = [name for name in NAMES if b"\xff" not in name]
PART = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0."))


@settings(max_examples=15, phases=AS_FOUND)
@given(
    parts=st.lists(PART, min_size=1, max_size=8, unique=True),
    folder=PART,
    suffixes=st.lists(st.sampled_from([b".png", b".gif", b".txt"]), min_size=8, max_size=8),
)
@example(parts=[name.removesuffix(b".png") for name in NAMES], folder=b"a", suffixes=[b".png"])
@example(parts=[name.removesuffix(b".png") for name in NAMES], folder=b"\n", suffixes=[b".gif"])
def test_any_name_survives(parts, folder, suffixes, tmp_path_factory):
    if sys.platform == "darwin":
        parts = [part.decode("utf-8", "ignore").encode() or b"x" for part in parts]
        folder = folder.decode("utf-8", "ignore").encode() or b"x"
    with scratch(tmp_path_factory) as root:
        media = anchored(root / os.fsdecode(folder))
        expected: dict[bool, set[str]] = {True: set(), False: set()}
        for part, suffix in zip(parts, itertools.cycle(suffixes), strict=False):
            for good, start in ((True, b"+"), (False, b"-"), (True, b""), (False, b"")):
                name = os.fsdecode(start + part + suffix)
                if (media / name).exists():
                    continue
                good = good and suffix != b".txt"
                kind = suffix.decode() if good else ".gif"
                data = (media / f"good{kind}").read_bytes() if good else b"no"
                (media / name).write_bytes(data)
                expected[good].add(f"{media.name}/{name}")
        ways = Ways.of(media)
        ways.check()
        assert set(ways.rejected) == expected[False]
        good = {f"{media.name}/good{suffix}" for suffix in (".png", ".gif")}
        assert set(ways.records) == expected[True] | good


@pytest.mark.skipif(sys.platform == "darwin", reason="every name there is UTF-8")
def test_a_data_set_in_a_folder_of_any_name(tmp_path):
    folder = anchored(tmp_path / "media")
    out = tmp_path / os.fsdecode(b"\xff \n")
    assert build(folder, out).complete
    assert set(all_records(out)) == {"media/good.png", "media/good.gif"}
    assert set(train_on_built(out).pixels) == {"media/good.png", "media/good.gif"}


def test_what_is_no_file_is_not_listed(tmp_path):
    """Reading a pipe would wait for ever, and so would a link to one."""
    folder = anchored(tmp_path / "media")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "link.png").symlink_to(folder / "pipe.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    listed = [path.name for path in find_media(folder).paths]
    assert listed == ["good.png", "good.gif"]
    ways = Ways.of(folder)
    ways.check()
    assert not ways.rejected


def test_a_link_to_itself_is_as_good_as_a_broken_one(tmp_path):
    folder = anchored(tmp_path / "media")
    for name in ("a.png", "b.mp4", "c.txt"):
        (folder / name).symlink_to(folder / name)
    ways = Ways.of(folder)
    ways.check()
    assert set(ways.rejected) == {"media/a.png", "media/b.mp4", "media/c.txt"}
    assert set(ways.direct.skipped) == {"media/a.png", "media/b.mp4"}


def test_a_file_that_may_not_be_read(tmp_path):
    folder = anchored(tmp_path / "media")
    for name in ("good.png", "good.gif"):
        shutil.copy(folder / name, folder / f"closed {name}")
        (folder / f"closed {name}").chmod(0)
    if os.access(folder / "closed good.png", os.R_OK):
        pytest.skip("root may read everything")
    ways = Ways.of(folder)
    ways.check()
    assert set(ways.rejected) == {"media/closed good.png", "media/closed good.gif"}
    for reasons in (ways.rejected, ways.direct.skipped):
        assert all("Permission denied" in reason for reason in reasons.values())


EMPTY = Record("k", "picture", 1, 1, 1, None, None, 0, "", "", b"")
WHOLE = st.integers(0, 2**40)
SECONDS = st.none() | st.floats(0, allow_nan=False, allow_infinity=False)
RECORDS = st.builds(
    Record,
    key=st.binary(max_size=40).map(os.fsdecode) | st.text(max_size=40),
    kind=st.sampled_from(["picture", "clip"]),
    height=WHOLE,
    width=WHOLE,
    frames=WHOLE,
    fps=SECONDS,
    duration=SECONDS,
    missing=WHOLE,
    source=st.text(max_size=20),
    licence=st.text(max_size=20),
    data=st.binary(max_size=100),
)


@given(record=RECORDS)
def test_records_come_back_as_they_were(record):
    again = Record.from_bytes(record.to_bytes(), "here")
    assert again == record
    assert again.blob == Blob(record.key, record.data)


def check_record(stored):
    """A record that makes sense, or an error with the name."""
    try:
        record = Record.from_bytes(stored, "the name")
    except MediaError as error:
        assert str(error).startswith("the name: ")
        assert error.reason
        return None
    assert record.kind in ("picture", "clip")
    assert all(isinstance(text, str) for text in (record.key, record.source, record.licence))
    numbers = (record.height, record.width, record.frames, record.missing)
    assert all(isinstance(number, int) and number >= 0 for number in numbers)
    assert all(v is None or 0 <= v < math.inf for v in (record.fps, record.duration))
    assert Record.from_bytes(record.to_bytes(), "again") == record
    return record


@settings(max_examples=100)
@given(record=RECORDS, place=PLACE, spots=DAMAGE)
def test_damaged_records_are_records_or_errors(record, place, spots):
    stored = record.to_bytes()
    cut = check_record(stored[: int(place * len(stored))])
    # The pixels may be cut off and nothing else, which the decoder or the shard's checksums say.
    assert cut is None or cut == dataclasses.replace(record, data=cut.data)
    check_record(damaged(stored, spots))
    flipped = bytearray(stored)
    flipped[int(place * len(stored))] ^= 1 << len(spots)
    check_record(bytes(flipped))


def with_header(header, data=b"pixels"):
    return struct.pack("<I", len(header)) + header + data


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**64])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES_OF_FIELDS = [field.name for field in dataclasses.fields(Record) if field.name != "data"]


@settings(max_examples=100)
@given(record=RECORDS, changes=st.dictionaries(st.sampled_from(NAMES_OF_FIELDS), JSON), other=JSON)
@example(record=None, changes={"height": 10**400}, other=None)
@example(record=None, changes={"kind": "sound"}, other=[])
def test_descriptions_that_say_something_else(record, changes, other):
    fields = dict.fromkeys(NAMES_OF_FIELDS, 1) | {"kind": "clip", "key": "", "source": ""}
    fields |= {"licence": ""}
    if record is not None:
        fields = {name: getattr(record, name) for name in NAMES_OF_FIELDS}
    assert check_record(with_header(json.dumps(fields).encode())) is not None
    check_record(with_header(json.dumps(fields | changes).encode()))
    for name in changes:
        less = {key: value for key, value in fields.items() if key != name}
        assert check_record(with_header(json.dumps(less).encode())) is None
    assert check_record(with_header(json.dumps(other).encode())) is None


@given(stored=st.binary(max_size=100))
@example(stored=with_header(b"[" * 60_000))
@example(stored=with_header(b'{"key":' * 9_000))
@example(stored=with_header(b"9" * 60_000))
@example(stored=with_header(b"\xff\xfe{}"))
@example(stored=with_header(EMPTY.to_bytes()[4:] + b" " * 2**16))
@example(stored=struct.pack("<I", 2**32 - 1) + bytes(100))
@example(stored=struct.pack("<I", 2**16 + 1) + bytes(2**16 + 1))
def test_bytes_that_are_no_record_are_an_error(stored):
    assert check_record(stored) is None


def test_texts_that_are_too_long_are_refused(tmp_path):
    folder = anchored(tmp_path / "media")
    with pytest.raises(MediaError, match="shorten"):
        dataclasses.replace(EMPTY, source="x" * 2**16).to_bytes()
    built = build(folder, tmp_path / "out", licence="x" * 2**16)
    assert (built.complete, built.rejected) == (True, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory, make):
    """A data set of four pictures and two clips, and what is in it."""
    root = tmp_path_factory.mktemp("small")
    (root / "media").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3)).astype(np.uint8)
    for number, picture in enumerate(pixels):
        write_picture(root / "media" / f"{number}.png", picture)
    for number in range(2):
        write_clip(root / "media" / f"{number}.mp4", make.numbered(4, 16, 24), 8)
    build(root / "media", root / "out")
    return root / "out", all_records(root / "out"), train_on_built(root / "out")


@pytest.fixture
def spoilt(small, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(small[0], tmp_path / "out")


def load(out):
    return load_folders(out, GEOMETRY)


@settings(max_examples=12)
@given(kind=st.sampled_from(["pictures", "clips"]), place=PLACE, refill=st.booleans())
@example(kind="pictures", place=0.5, refill=True)
@example(kind="clips", place=0.0, refill=True)
def test_a_shard_that_lost_its_end(kind, place, refill, small, tmp_path_factory):
    with scratch(tmp_path_factory) as root:
        out = shutil.copytree(small[0], root / "out")
        path = out / f"{kind}-00000.arrayrecord"
        data = path.read_bytes()
        path.write_bytes(data[: int(place * len(data))])
        for opened in (BuiltDataset, load):
            with pytest.raises(MediaError, match=r"missing or cut, such as .*copy them again"):
                opened(out)
        if refill:
            # As after a copy that stopped on a file system that reserves.
            os.truncate(path, len(data))
            check_spoilt(out, small)


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_a_shard_that_is_gone(kind, spoilt):
    (spoilt / f"{kind}-00000.arrayrecord").unlink()
    for opened in (BuiltDataset, load):
        with pytest.raises(MediaError, match=f"1 of 1 shards of {kind} are missing or cut"):
            opened(spoilt)


def check_spoilt(out, small):
    """Every record is as it was or an error; training skips those and delivers the others.

    Returns the keys of those that are errors.
    """
    _, records, trained = small
    dataset = BuiltDataset(out)
    lost = set()
    for part in (dataset.pictures, dataset.clips):
        for index in range(len(part)):
            key = part.key(index)
            try:
                assert part[index] == records[key]
            except MediaError as error:
                assert str(out) in str(error)
                lost.add(key)
        part.close()
    found = train_on_built(out)
    assert set(found.skipped) == lost
    assert set(found.pixels) == set(records) - lost
    for key, pixels in found.pixels.items():
        assert np.array_equal(pixels, trained.pixels[key])
    return lost


@settings(max_examples=25)
@given(
    kind=st.sampled_from(["pictures", "clips"]),
    at=st.integers(0, 4000) | st.integers(65536, 65536 + 150) | st.integers(0, 131071),
    bit=st.integers(0, 7),
)
@example(kind="pictures", at=65600, bit=0)
@example(kind="clips", at=100, bit=7)
def test_a_bit_that_flips_in_a_shard_changes_no_pixel(kind, at, bit, small, tmp_path_factory):
    with scratch(tmp_path_factory) as root:
        out = shutil.copytree(small[0], root / "out")
        path = out / f"{kind}-00000.arrayrecord"
        data = bytearray(path.read_bytes())
        data[at % len(data)] ^= 1 << bit
        path.write_bytes(data)
        check_spoilt(out, small)


def test_a_damaged_record_leaves_the_others_alone(small, spoilt):
    _, records, _ = small
    for kind, key in (("pictures", "media/1.png"), ("clips", "media/0.mp4")):
        path = spoilt / f"{kind}-00000.arrayrecord"
        data = bytearray(path.read_bytes())
        at = data.index(records[key].data)
        data[at + len(records[key].data) // 2] ^= 1
        path.write_bytes(data)
    assert check_spoilt(spoilt, small) == {"media/1.png", "media/0.mp4"}
    assert all(
        "record is damaged; build again" in reason
        for reason in train_on_built(spoilt).skipped.values()
    )


@pytest.mark.parametrize("kind", ["pictures", "clips"])
@pytest.mark.parametrize("what", ["index", "keys"])
def test_an_index_that_is_cut(kind, what, spoilt):
    path = spoilt / f"{kind}.{what}"
    data = path.read_bytes()
    rows = [] if what == "keys" else [48, len(data) - 48]
    for length in {0, 1, len(data) // 3, len(data) - 1, *rows}:
        path.write_bytes(data[:length])
        for opened in (BuiltDataset, load):
            with pytest.raises(MediaError, match=rf"{kind}\.{what}: "):
                opened(spoilt)
    path.write_bytes(data + data)
    with pytest.raises(MediaError, match="build again"):
        BuiltDataset(spoilt)
    path.unlink()
    with pytest.raises(MediaError, match=rf"{kind}\.{what}: cannot be read"):
        load(spoilt)


def described(out, content):
    (out / "dataset.json").write_text(
        content if isinstance(content, str) else json.dumps(content), "utf-8"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "of version 2, and this elastictok reads 1; build it again"),
        # Whatever else the version changes.
        ({"version": 2, "kinds": {}}, "of version 2, and this elastictok reads 1"),
        ({"format": "another"}, "damaged, or not written by elastictok"),
        ({"version": None}, "version|damaged"),
        ({"kinds": []}, "damaged"),
    ],
)
def test_a_description_of_something_else(change, message, spoilt):
    content = json.loads((spoilt / "dataset.json").read_text("utf-8"))
    described(spoilt, content | change)
    for opened in (BuiltDataset, load):
        with pytest.raises(MediaError, match=message):
            opened(spoilt)


@pytest.mark.parametrize("name", ["../{}", "/{}", "below/../{}", "..", "", "a\0b", "../out/{}"])
def test_shards_are_in_the_folder_of_the_data_set(name, spoilt):
    """A data set from elsewhere opens no other file of this machine."""
    content = json.loads((spoilt / "dataset.json").read_text("utf-8"))
    shard = content["kinds"]["pictures"]["shards"][0]
    (spoilt / "below").mkdir()
    path = spoilt / shard["file"]
    shutil.copy(path, spoilt.parent)
    shard["file"] = name.format(shard["file"] if name[0:1] != "/" else str(path)[1:])
    described(spoilt, content)
    for opened in (BuiltDataset, load):
        with pytest.raises(MediaError, match=r"damaged, or not written|missing or cut"):
            opened(spoilt)
    if "{}" in name:
        with pytest.raises(MediaError, match="damaged, or not written"):
            load(spoilt)


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "null", "[1]", "9" * 5000, '"x"', "\x00", "{}"]
)
def test_a_description_that_is_none(content, spoilt):
    described(spoilt, content)
    for opened in (BuiltDataset, load):
        with pytest.raises(MediaError, match="damaged, or not written by elastictok"):
            opened(spoilt)


@given(place=PLACE, spots=DAMAGE)
def test_a_damaged_description_is_an_error_or_harmless(place, spots, small, tmp_path_factory):
    with scratch(tmp_path_factory) as root:
        out = shutil.copytree(small[0], root / "out")
        path = out / "dataset.json"
        data = path.read_bytes()
        path.write_bytes(data[: int(place * len(data))])
        with pytest.raises(MediaError, match="damaged, or not written"):
            BuiltDataset(out)
        path.write_bytes(damaged(data, spots))
        check_described(out, small)


def check_described(out, small):
    try:
        found = all_records(out)
        load(out)
    except MediaError:
        return
    assert found == small[1]


def places(content, above=()):
    """Ways to every value in nested lists and dictionaries."""
    yield above
    names = range(len(content)) if isinstance(content, list) else content
    for name in names if isinstance(content, dict | list) else ():
        yield from places(content[name], (*above, name))


GONE = object()
WRONG = [None, True, -1, 0, 1.5, 10**400, math.inf, math.nan, "", "x", [], [1], {}, {"a": 1}, GONE]


def test_a_description_with_a_wrong_value_is_an_error_or_harmless(small, spoilt):
    content = json.loads((spoilt / "dataset.json").read_text("utf-8"))
    # Values that are but told again.
    told = ("settings", "bytes", "licences", "tasks", "rejected", "damaged")
    faults = []
    for place in places(content):
        if not place or set(place) & set(told):
            continue
        for value in WRONG:
            changed = copy.deepcopy(content)
            *above, last = place
            parent = functools.reduce(lambda inner, name: inner[name], above, changed)
            parent[last] = value
            if value is GONE:
                del parent[last]
            described(spoilt, changed)
            try:
                check_described(spoilt, small)
            except Exception as error:
                faults.append(f"{place} = {value!r:.20}: {error!r:.80}")
    assert not faults


@pytest.mark.parametrize("name", ["settings", "kinds", "rejected", "damaged", "tasks"])
def test_building_over_a_damaged_description_says_so(name, small, spoilt):
    content = json.loads((spoilt / "dataset.json").read_text("utf-8"))
    del content[name]
    described(spoilt, content)
    with pytest.raises(MediaError, match="damaged, or not written"):
        build(small[0].with_name("media"), spoilt)


def jpegs():
    """JPEG files of all kinds that are decoded by simplejpeg, and some that are not."""
    rows, columns = np.mgrid[:37, :51]
    wave = 127 + 60 * np.sin(rows / 5) * np.cos(columns / 7)
    pixels = np.stack([wave, wave[::-1], 255 - wave], -1)
    pixels = pixels + np.random.default_rng(0).integers(-40, 40, pixels.shape)
    colour = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    exif = colour.getexif()
    exif[0x0112] = 8
    kinds = {
        "plain": (colour, {}),
        "4:4:4": (colour, {"subsampling": 0, "quality": 98}),
        "4:2:2": (colour, {"subsampling": 1}),
        "coarse": (colour, {"quality": 3}),
        "progressive": (colour, {"progressive": True}),
        "optimised": (colour, {"optimize": True}),
        "restarting": (colour, {"restart_marker_blocks": 2}),
        "turned": (colour, {"exif": exif}),
        "kept as RGB": (colour, {"keep_rgb": True}),
        "grey": (colour.convert("L"), {}),
        "grey, progressive": (colour.convert("L"), {"progressive": True}),
        "CMYK": (colour.convert("CMYK"), {}),
        "one pixel": (colour.crop((0, 0, 1, 1)), {}),
        "one row": (colour.crop((0, 0, 51, 1)), {}),
        "16 by 16": (colour.crop((0, 0, 16, 16)), {}),
    }
    found = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        found[name] = buffer.getvalue()
    return found


JPEGS = jpegs()


def both_decoders(data, working=None):
    """The pixels by simplejpeg and by Pillow, or their refusals; and whether simplejpeg decoded."""
    simplejpeg = pytest.importorskip("simplejpeg")
    calls = []

    class Counting:
        @staticmethod
        def decode_jpeg(*arguments):
            pixels = simplejpeg.decode_jpeg(*arguments)
            calls.append(pixels.shape)
            return pixels

    found = []
    for decoder in (Counting, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_picture, "simplejpeg", decoder)
            try:
                found.append(read_picture(Blob("a.jpg", data), working=working))
            except MediaError as error:
                found.append(error.reason)
    return (*found, bool(calls))


@pytest.mark.parametrize("name", JPEGS)
def test_good_pictures_do_not_depend_on_simplejpeg(name):
    fast, slow, was_fast = both_decoders(JPEGS[name])
    assert was_fast == (name != "CMYK")
    assert fast.dtype == slow.dtype == np.uint8
    assert np.array_equal(fast, slow)
    small = WorkingSize(((5, 5),), 1.0)
    assert np.array_equal(*both_decoders(JPEGS[name], small)[:2])


@settings(max_examples=200)
@given(
    name=st.sampled_from(sorted(JPEGS)),
    place=st.none() | PLACE,
    spots=st.just([]) | DAMAGE,
    working=st.sampled_from([None, WorkingSize(((5, 5),), 1.0)]),
)
@example(name="plain", place=0.9999, spots=[], working=None)
@example(name="plain", place=0.5, spots=[], working=None)
@example(name="plain", place=None, spots=[(0.7, b"\0", 1)], working=None)
def test_damaged_pictures_do_not_depend_on_simplejpeg(name, place, spots, working):
    data = damaged(JPEGS[name], spots)
    if place is not None:
        data = data[: int(place * len(data))]
    fast, slow, _ = both_decoders(data, working)
    if isinstance(slow, str):
        assert fast == slow
    else:
        assert np.array_equal(fast, slow)
