"""Clips: which frames come, how they lie, and what becomes of damaged and foreign files."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elastictok.data import MediaError, _clip, read_media, write_clip
from elastictok.data._clip import probe_clip, read_clip, read_stretch, shown
from elastictok.data._crop import WorkingSize

SUFFIXES = ["mp4", "m4v", "mov", "mkv", "avi", "webm"]


def on_screen(times, duration, fps):
    """By the definition, with fractions: which frame is on screen at k / fps seconds.

    `times` in seconds from the first; the clip lasts until the last time stamp plus `duration`.
    """
    tolerance = Fraction(25, 10000)
    result = []
    for k in itertools.count():
        time = Fraction(k) / Fraction(fps)
        if k > 0 and time >= times[-1] + duration - tolerance:
            return result
        result.append(max(i for i, t in enumerate(times) if i == 0 or t - tolerance <= time))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_frame_comes_once_and_in_order(suffix, tmp_path, make):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, make.numbered(20), 10)
    clip = read_media(path)
    assert make.numbers(clip.frames) == list(range(20))
    assert (clip.fps, clip.missing, clip.path, clip.picture) == (10.0, 0, path, False)
    assert clip.frames.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx265", "yuv420p", "mp4"),
        ("libx264", "yuv444p", "mp4"),
        ("libx264", "yuv420p10le", "mkv"),
        ("libsvtav1", "yuv420p", "mp4"),
        ("ffv1", "yuv420p", "mkv"),
        ("mjpeg", "yuvj420p", "avi"),
    ],
)
def test_other_codecs(codec, pix_fmt, suffix, tmp_path, make):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = tmp_path / f"a.{suffix}"
    make.encode(path, make.numbered(6, 64, 64), codec=codec, pix_fmt=pix_fmt)
    assert make.numbers(read_media(path).frames) == list(range(6))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_frame_is_a_clip(suffix, tmp_path, make):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, make.numbered(1), 10)
    clip = read_media(path)
    assert clip.frames.shape == (1, 32, 48, 3)
    assert not clip.picture


def test_max_frames(tmp_path, make):
    path = tmp_path / "a.mp4"
    write_clip(path, make.numbered(20), 10)
    for limit in (1, 7, 20, 50):
        clip = read_media(path, max_frames=limit)
        assert make.numbers(clip.frames) == list(range(20))[:limit]
        assert clip.missing == 0
    assert make.numbers(read_media(path, fps=5, max_frames=3).frames) == [0, 2, 4]
    assert make.numbers(read_media(path, fps=40, max_frames=3).frames) == [0, 0, 0]
    with pytest.raises(ValueError, match="max_frames is 0"):
        read_media(path, max_frames=0)


@settings(max_examples=20)
@given(
    steps=st.lists(st.integers(1, 400), min_size=0, max_size=25),
    start=st.integers(0, 3000),
    fps=st.sampled_from([1, 2.5, 7.3, 8, 10, 24, 30, 30000 / 1001, 60]),
)
def test_variable_rate_is_resampled_by_time_stamps(steps, start, fps, tmp_path_factory, make):
    path = tmp_path_factory.getbasetemp() / "variable.mkv"
    times = np.cumsum([start, *steps]).tolist()
    make.encode(path, make.numbered(len(times)), codec="ffv1", times=times)
    with av.open(str(path)) as container:
        frames = [(frame.pts, frame.duration) for frame in container.decode(video=0)]
    assert [pts for pts, _ in frames] == times
    clip = read_media(path)
    assert make.numbers(clip.frames) == list(range(len(times)))
    last = Fraction(frames[-1][1] or 0, 1000)
    if last == 0:
        last = Fraction(times[-1] - times[-2], 1000) if len(times) > 1 else Fraction(1, 10)
    expected = on_screen([Fraction(t - start, 1000) for t in times], last, fps)
    clip = read_media(path, fps=fps)
    assert make.numbers(clip.frames) == expected
    assert clip.fps == fps


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("rate", "fps", "every"), [(24, 8, 3), (30, 10, 3), (10, 10, 1), (16, 8, 2)]
)
def test_whole_ratios_take_every_nth_frame(rate, fps, every, suffix, tmp_path, make):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, make.numbered(24), rate)
    assert make.numbers(read_media(path, fps=fps).frames) == list(range(0, 24, every))


@given(
    frames=st.integers(1, 40),
    rate=st.sampled_from([1, 7.5, 10, 23.976, 24, 25, 60, 500]),
    fps=st.sampled_from([0.4, 1, 3.3, 8, 10, 24, 60, 120]),
)
def test_frames_in_memory_are_resampled_by_the_same_rule(frames, rate, fps):
    step = 1 / Fraction(rate)
    assert shown(frames, rate, fps).tolist() == on_screen(
        [i * step for i in range(frames)], step, fps
    )


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory, make):
    """Thirty frames with a key frame every five and B-frames between, not starting at zero."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    make.encode(
        path,
        make.numbered(30),
        rate=24,
        times=[700 + 1000 * i // 24 for i in range(30)],
        options={"g": "5", "bf": "2", "crf": "10", "sc_threshold": "0"},
    )
    return path


@settings(max_examples=40)
@given(start=st.integers(0, 35), count=st.integers(1, 12), rate=st.sampled_from([8.0, 24.0, 31.0]))
def test_a_stretch_is_that_part_of_the_whole(start, count, rate, long_clip):
    probe = probe_clip(long_clip)
    whole = read_clip(long_clip, fps=rate).frames
    assert abs(probe.frames(rate) - len(whole)) <= 1
    stretch = read_stretch(long_clip, probe, rate=rate, start=start, count=count)
    assert (stretch == whole[start : start + count]).all()
    assert len(stretch) == len(whole[start : start + count])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stretches_in_every_container(suffix, tmp_path, make):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, make.numbered(30), 10)
    probe = probe_clip(path)
    assert (probe.start, probe.rate, probe.height, probe.width) == (0.0, 10.0, 32, 48)
    assert abs(probe.duration - 3.0) < 0.11
    for start in (0, 1, 13, 27):
        frames = read_stretch(path, probe, rate=10.0, start=start, count=3)
        assert make.numbers(frames) == [start, start + 1, start + 2]


def test_a_stretch_decodes_from_the_key_frame_only(long_clip, monkeypatch):
    decoded = []
    original = _clip._Reel._decoded

    def counting(self):
        for frame in original(self):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(_clip._Reel, "_decoded", counting)
    probe = probe_clip(long_clip)
    decoded.clear()
    read_stretch(long_clip, probe, rate=24.0, start=22, count=2)
    assert len(decoded) <= 10


@pytest.mark.parametrize("too_far", [0.5, 1000.0, None])
def test_an_index_that_leads_nowhere_is_not_believed(too_far, long_clip, monkeypatch):
    seek = _clip._Reel.seek

    def misled(self, time):
        return too_far is not None and seek(self, time + too_far)

    probe = probe_clip(long_clip)
    expected = read_clip(long_clip, fps=24).frames[7:10]
    monkeypatch.setattr(_clip._Reel, "seek", misled)
    frames = read_stretch(long_clip, probe, rate=24.0, start=7, count=3)
    assert (frames == expected).all()


def test_stretches_past_the_end_of_what_is_there(tmp_path, make):
    path = tmp_path / "a.mp4"
    write_clip(path, make.numbered(30), 10)
    probe = probe_clip(path)
    assert read_stretch(path, probe, rate=10.0, start=40, count=3).shape[0] == 0
    assert make.numbers(read_stretch(path, probe, rate=10.0, start=28, count=5)) == [28, 29]


# a, b, c, d of the display matrix, and the same in NumPy: (x, y) goes to (ax + cy, bx + dy).
TURNS = {
    (1, 0, 0, 1): lambda a: a,
    (0, 1, -1, 0): lambda a: np.rot90(a, -1),
    (-1, 0, 0, -1): lambda a: a[::-1, ::-1],
    (0, -1, 1, 0): lambda a: np.rot90(a, 1),
    (-1, 0, 0, 1): lambda a: a[:, ::-1],
    (1, 0, 0, -1): lambda a: a[::-1],
    (0, 1, 1, 0): lambda a: a.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda a: a[::-1, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_rotation_and_reflection_of_the_container(matrix, tmp_path, make):
    path = tmp_path / "a.mp4"
    stored = make.corners(32, 48)
    write_clip(path, np.stack([stored] * 3), 10)
    make.turn(path, matrix)
    expected = TURNS[matrix](stored)
    clip = read_media(path)
    assert clip.frames.shape == (3, *expected.shape)
    inside = np.abs(clip.frames.astype(int) - expected)
    assert np.median(inside) <= 4
    assert (inside > 60).mean() < 0.1
    probe = probe_clip(path)
    assert (probe.height, probe.width) == expected.shape[:2]
    small = read_clip(path, working=WorkingSize(((8, 8),), 1.0)).frames
    assert small.shape[1:3] == tuple(side // 4 for side in expected.shape[:2])
    assert np.abs(small[0, 1, 1].astype(int) - expected[0, 0]).max() < 40


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
@pytest.mark.parametrize("size", [(33, 47), (32, 47), (33, 48), (2, 2), (130, 2)])
def test_odd_sizes(size, suffix, tmp_path, make):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, make.numbered(5, *size), 8)
    clip = read_media(path)
    assert make.numbers(clip.frames) == list(range(5))
    even = tuple(side + side % 2 for side in size)
    assert clip.frames.shape[1:3] == (even if suffix == "mp4" else size)
    # What is added looks like what is beside it.
    assert np.abs(clip.frames[:, -1].mean((1, 2)) - make.numbered(5)[:, 0, 0, 0]).max() < 6
    assert np.abs(clip.frames[:, :, -1].mean((1, 2)) - make.numbered(5)[:, 0, 0, 0]).max() < 6


@pytest.mark.parametrize("matrix", ["ITU709", "ITU601"])
@pytest.mark.parametrize("full", [False, True])
def test_colours_follow_what_the_file_says(matrix, full, tmp_path):
    from av.video.reformatter import ColorRange, Colorspace

    colours = [(220, 30, 40), (30, 200, 50), (20, 40, 230), (128, 128, 128), (250, 250, 10)]
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=5, options={"crf": "4"})
        context = stream.codec_context
        context.height, context.width, context.pix_fmt = 16, 16, "yuv420p"
        context.colorspace = {"ITU709": 1, "ITU601": 6}[matrix]
        context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        for colour in colours:
            pixels = np.full((16, 16, 3), colour, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace[matrix],
                dst_color_range=context.color_range,
            )
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    frames = read_media(path).frames.astype(int)
    for frame, colour in zip(frames, colours, strict=True):
        assert np.abs(frame - colour).max() <= 5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_colours_that_are_written_come_back(suffix, tmp_path):
    colours = np.array([(220, 30, 40), (30, 200, 50), (20, 40, 230), (90, 90, 90)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 32, 3))
    write_clip(tmp_path / f"a.{suffix}", frames, 10)
    back = read_media(tmp_path / f"a.{suffix}").frames.astype(int)
    assert np.abs(back - frames).max() <= 8


def test_gif(tmp_path, make):
    """An animated GIF is a clip with its own pace; what is transparent is white."""
    frames = [Image.fromarray(frame) for frame in make.numbered(4)]
    path = tmp_path / "a.GIF"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 300, 200, 100])
    assert make.numbers(read_media(path).frames) == [0, 1, 2, 3]
    assert make.numbers(read_media(path, fps=10).frames) == [0, 1, 1, 1, 2, 2, 3]
    clear = Image.new("P", (8, 6), 1)
    clear.putpalette([10, 20, 30, 200, 100, 50])
    clear.putpixel((3, 2), 0)
    clear.save(tmp_path / "b.gif", transparency=0)
    clip = read_media(tmp_path / "b.gif")
    assert clip.frames.shape == (1, 6, 8, 3)
    assert not clip.picture
    assert (clip.frames[0, 2, 3] == 255).all()
    assert (clip.frames[0, 0, 0] == (200, 100, 50)).all()


def test_truncated_with_the_index_in_front_keeps_what_decodes(tmp_path, make):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8)
    write_clip(path, noise, 10)
    whole = read_media(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    clip = read_media(path)
    assert 5 < len(clip.frames) < 25
    assert clip.missing >= 30 - len(clip.frames) - 3
    assert (clip.frames[:5] == whole.frames[:5]).all()
    assert clip.fps == 10.0


def test_truncated_with_the_index_behind_is_an_error(tmp_path, make):
    path = tmp_path / "a.mp4"
    make.encode(path, make.numbered(10))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MediaError, match="Invalid data"):
        read_media(path)


def test_a_failing_packet_does_not_end_the_clip(tmp_path, make):
    """As a decoder reports it; ffmpeg hides most damage by concealing it."""
    path = tmp_path / "a.mkv"
    make.encode(path, make.numbered(10), codec="mjpeg", pix_fmt="yuvj420p")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = packets[4]
    start = data.index(b"\xff\xd8", position)
    data[start : start + size - 8] = bytes(size - 8)
    path.write_bytes(data)
    clip = read_media(path)
    assert make.numbers(clip.frames) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert clip.missing == 1
    # By its time stamps the frame before it stays on screen.
    assert make.numbers(read_media(path, fps=10).frames) == [0, 1, 2, 3, 3, 5, 6, 7, 8, 9]


def test_promises_that_are_not_kept_are_counted(tmp_path, make):
    path = tmp_path / "a.avi"
    write_clip(path, make.numbered(12), 8)
    data = bytearray(path.read_bytes())
    header = data.index(b"strh") + 8
    assert int.from_bytes(data[header + 32 : header + 36], "little") == 12
    data[header + 32 : header + 36] = (50).to_bytes(4, "little")
    path.write_bytes(data)
    clip = read_media(path)
    assert make.numbers(clip.frames) == list(range(12))
    assert clip.missing == 38


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.mp4", b"", "."),
        ("a.mp4", b"These are not pixels.\n" * 20, "."),
        ("a.webm", b"\x1aE\xdf\xa3", "."),
        ("a.gif", b"GIF89a", "."),
        ("a.mp4", None, "(?i)no such file"),
        ("a.mp4", b"#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", "."),
    ],
)
def test_what_is_no_clip_is_an_error_with_its_name(name, content, reason, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=reason) as caught:
        read_media(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert caught.value.reason


def test_a_list_of_other_files_is_not_followed(tmp_path, make):
    """ffmpeg would open what a file of this kind names, from this machine or the network."""
    write_clip(tmp_path / "secret.mp4", make.numbered(3), 8)
    for name in ("a.mp4", "a.webm"):
        (tmp_path / name).write_text("ffconcat version 1.0\nfile secret.mp4\n")
        with pytest.raises(MediaError, match="container"):
            read_media(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    (tmp_path / "b.jpg").rename(tmp_path / "b.mp4")
    with pytest.raises(MediaError, match="container"):
        read_media(tmp_path / "b.mp4")


def test_a_name_like_an_address_is_a_name(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("file:b.mp4", make.numbered(3), 8)
    assert len(read_media("file:b.mp4").frames) == 3


def test_tags_in_an_unknown_encoding_do_no_harm(tmp_path, make):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        output.metadata["title"] = "QQQQQQQQ"
        stream.metadata["title"] = "ZZZZZZZZ"
        output.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        output.mux(stream.encode())
    data = path.read_bytes()
    for title in (b"QQQQQQQQ", b"ZZZZZZZZ"):
        assert title in data
        path.write_bytes(data.replace(title, "Café ü!".encode("latin-1") + b"\xff"))
        assert read_media(path).frames.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("cover", [False, True])
def test_sound_alone_is_an_error(cover, tmp_path, make):
    path = tmp_path / "a.mp4"
    make.sound(path, cover=make.corners(16, 16) if cover else None)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == cover
    with pytest.raises(MediaError, match="no video"):
        read_media(path)


def test_limits(tmp_path, make):
    path = tmp_path / "a.mp4"
    write_clip(path, make.numbered(10), 10)
    exact = 10 * 32 * 48 * 3
    assert len(read_media(path, max_pixels=32 * 48, max_bytes=exact).frames) == 10
    with pytest.raises(MediaError, match="max_frames"):
        read_media(path, max_bytes=exact - 1)
    assert len(read_media(path, max_bytes=exact - 1, fps=5).frames) == 5
    assert len(read_media(path, max_bytes=exact - 1, max_frames=9).frames) == 9
    message = r"48 x 32 pixels.*limit of 1535.*max_pixels"
    with pytest.raises(MediaError, match=message):
        read_media(path, max_pixels=32 * 48 - 1)


def test_a_header_that_is_too_large_is_refused_before_decoding(tmp_path, make, monkeypatch):
    path = tmp_path / "a.mp4"
    write_clip(path, make.numbered(10), 10)
    monkeypatch.setattr(_clip._Reel, "frames", lambda self: pytest.fail("this decodes"))
    with pytest.raises(MediaError, match="max_pixels"):
        read_media(path, max_pixels=100)


def test_a_gap_of_years_is_refused_not_filled(tmp_path, make):
    path = tmp_path / "a.mkv"
    make.encode(path, make.numbered(3), codec="ffv1", times=[0, 100, 10**11])
    assert len(read_media(path).frames) == 3
    with pytest.raises(MediaError, match="max_bytes"):
        read_media(path, fps=30)


def test_bad_rates(tmp_path, make):
    path = tmp_path / "a.mp4"
    write_clip(path, make.numbered(2), 10)
    for fps in (0, -1, float("nan"), float("inf"), 1e6):
        with pytest.raises(ValueError, match="fps"):
            read_media(path, fps=fps)


@pytest.fixture(scope="module")
def samples(tmp_path_factory, make):
    folder = tmp_path_factory.mktemp("samples")
    for suffix in ("mp4", "webm", "avi", "mkv"):
        write_clip(folder / f"a.{suffix}", make.numbered(6, 16, 24), 8)
    frames = [Image.fromarray(frame) for frame in make.numbered(6, 16, 24)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


@settings(max_examples=150)
@given(
    pick=st.integers(0, 4),
    cut=st.floats(0, 1),
    spots=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
    fps=st.sampled_from([None, 8, 3.3]),
)
def test_damaged_bytes_give_a_clip_or_an_error(pick, cut, spots, fps, samples, tmp_path_factory):
    suffix, data = samples[pick]
    data = bytearray(data)
    for spot, noise in spots:
        at = round(spot * len(data))
        data[at : at + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(data[: round((1 - cut * cut) * len(data))])
    try:
        clip = read_media(path, fps=fps, max_bytes=2**24)
    except MediaError as error:
        assert error.path == path
    else:
        assert len(clip.frames) >= 1
    try:
        probe = probe_clip(path)
        stretch = read_stretch(path, probe, rate=8.0, start=2, count=3)
    except MediaError as error:
        assert error.path == path
    else:
        assert len(stretch) <= 3


@given(data=st.binary(max_size=200), suffix=st.sampled_from(["mp4", "webm", "avi", "gif"]))
def test_random_bytes_are_an_error(data, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"random.{suffix}"
    path.write_bytes(data)
    with pytest.raises(MediaError):
        read_media(path)
