"""Clips, through PyAV: frames by time stamps, what can be saved of damaged files, and stretches
of long clips.

Everything is decoded by one thread, and converted by another with swscale's bit-exact code, so that
a file gives the same pixels every time.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Int64, UInt8

from elastictok.data._crop import WorkingSize
from elastictok.data._errors import MediaError
from elastictok.data._picture import MAX_PIXELS, describe
from elastictok.data._stored import Blob, Stored, readable
from elastictok.data._types import MAX_FPS, Clip, check_fps

MAX_BYTES = 2**33
"""Most memory that the frames of one clip may take unless asked otherwise: 8 GiB."""

_MOST_FRAMES = 2**20  # twelve hours at 24 frames per second

_MOST_WAITING = 16  # decoded frames that wait for their conversion

# Some containers round time stamps to milliseconds, so that a frame seems to come a little late.
# Not a whole number of them, so that rounded sums never decide.
_TOLERANCE = 0.0025

# What a file may be, whatever its suffix says. Play lists and the like are left out: they name
# other files and addresses, which ffmpeg would open.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg",
    "protocol_whitelist": "file",
}

_FAILURES = (av.error.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError)

# Flags of libswscale (swscale.h); as numbers, because PyAV names all of them only from 18 on.
BILINEAR = 0x2
AREA = 0x20
EXACT = 0x40000 | 0x80000
"""Accurate rounding and bit exactness: every machine computes the same pixels."""

# Tags of songs and cameras in unknown encodings are nobody's business here. From PyAV 19 on they
# do no harm, and the argument is gone.
_BEFORE_19 = int(av.__version__.split(".")[0]) < 19
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if _BEFORE_19 else {}


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a clip says of itself, and its first frame confirms.

    **Arguments:**

    - `start`: time stamp of the first frame, seconds.
    - `duration`: seconds from there to the end, as the container promises.
    - `rate`: average frames per second.
    - `height`, `width`: of the upright frame.
    """

    start: float
    duration: float
    rate: float
    height: int
    width: int

    def frames(self, rate: float) -> int:
        """How many frames the clip has when it is resampled to `rate`."""
        return max(1, math.ceil((self.duration - _TOLERANCE) * rate))


def probe_clip(stored: Stored, *, max_pixels: int = MAX_PIXELS) -> Probe:
    """Reads the header and the first frame.

    **Raises:** `MediaError`.
    """
    with _opened(stored, max_pixels) as reel:
        first = next(reel.frames(), None)
        if first is None:
            raise MediaError(str(stored), "no frame of it can be decoded")
        height, width = _Turn.of(first.frame).size(first.frame.height, first.frame.width)
        rate = min(reel.rate or 1 / first.duration, MAX_FPS)
        return Probe(first.time, reel.duration(first.time), rate, height, width)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a clip turns out to hold when all of it is decoded.

    **Arguments:**

    - `height`, `width`: of the upright frame.
    - `frames`: how many were decoded.
    - `rate`: average frames per second.
    - `duration`: seconds from the first frame to the end of the last.
    - `missing`: how many frames the container promises, at least, that could not be decoded.
    """

    height: int
    width: int
    frames: int
    rate: float
    duration: float
    missing: int


def measure_clip(stored: Stored, *, max_pixels: int = MAX_PIXELS) -> Measured:
    """Decodes a clip and keeps nothing of it.

    **Raises:** `MediaError` if no frame can be decoded.
    """
    with _opened(stored, max_pixels) as reel:
        first = last = None
        count = 0
        for timed in reel.frames():
            if first is None:
                first = timed
                # Whether its pixels can be converted shows only now.
                _Converter(timed.frame, None)(timed.frame)
            last = timed
            count += 1
        if first is None or last is None:
            raise MediaError(str(stored), "no frame of it can be decoded")
        height, width = _Turn.of(first.frame).size(first.frame.height, first.frame.width)
        return Measured(
            height=height,
            width=width,
            frames=count,
            rate=float(reel.measured_rate),
            duration=last.time + last.duration - first.time,
            missing=reel.failures + max(0, reel.promised - reel.packets),
        )


def clip_frames(
    stored: Stored,
    *,
    fps: float | int | None,
    working: Callable[[int, int], tuple[int, int]],
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[UInt8[np.ndarray, "height width 3"], float]]:
    """The frames of a clip one by one, and the seconds since the first.

    See [`read_clip`][], which holds them all.

    **Raises:** `MediaError`; also where time stamps would have more than 2^20 frames filled in.
    """
    with _opened(stored, max_pixels) as reel:
        convert = None
        if fps is None:
            start = None
            for timed in reel.frames():
                convert = convert or _Converter(timed.frame, working)
                start = timed.time if start is None else start
                yield convert(timed.frame), timed.time - start
            return
        for run in _runs(reel.frames(), fps):
            convert = convert or _Converter(run.frame, working)
            if run.stop > _MOST_FRAMES:
                raise MediaError(
                    str(stored), f"it has more than {_MOST_FRAMES} frames; cut it or lower fps"
                )
            frame = convert(run.frame)
            for k in range(run.first, run.stop):
                yield frame, k / fps


def read_clip(
    stored: Stored,
    *,
    fps: float | int | None = None,
    max_frames: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    working: WorkingSize | None = None,
) -> Clip:
    """Reads a clip from its first frame on; see [`read_media`][] for the arguments.

    `working`, if given, scales the frames down while they are converted.
    """
    check_fps(fps)
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; it must be at least 1, or None for all")
    with _opened(stored, max_pixels) as reel, _Film(working) as film:
        to_the_end = True
        for run in _runs(reel.frames(), fps):
            if max_frames is not None and run.first >= max_frames:
                to_the_end = False
                break
            stop = run.stop if max_frames is None else min(run.stop, max_frames)
            if stop * film.frame_bytes(run.frame) > max_bytes:
                reason = (
                    f"its frames take more than {max_bytes} bytes; "
                    "lower fps, set max_frames or raise max_bytes"
                )
                raise MediaError(str(stored), reason)
            film.add(run.frame, stop - run.first)
        frames = film.develop()
        if frames is None:
            raise MediaError(str(stored), "no frame of it can be decoded")
        missing = reel.failures + (max(0, reel.promised - reel.packets) if to_the_end else 0)
        return Clip(frames, float(fps or reel.measured_rate), _path(stored), missing)


def read_stretch(
    stored: Stored,
    probe: Probe,
    *,
    rate: float,
    start: int,
    count: int,
    max_pixels: int = MAX_PIXELS,
    working: WorkingSize | None = None,
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Reads a part of a clip, without decoding what comes before its key frame.

    **Arguments:**

    - `stored`, `probe`: the file and what [`probe_clip`][] said of it.
    - `rate`: the frames per second that the clip is resampled to.
    - `start`, `count`: the first frame and how many, at that rate.
    - `max_pixels`, `working`: as for [`read_clip`][].

    **Returns:** the same frames as `read_clip(stored, fps=rate)[start : start + count]` of an
    intact file; fewer, perhaps none, where the clip ends before the container says.

    **Raises:** `MediaError`.
    """
    time = probe.start + start / rate
    with _opened(stored, max_pixels) as reel:
        if start > 0 and reel.seek(time):
            frames = reel.frames()
            first = next(frames, None)
            if first is not None and first.time <= time + _TOLERANCE:
                runs = _runs(_chain(first, frames), rate, probe.start)
                return _collect(runs, start, count, probe, working)
    # The index of the file led nowhere or too far: decode from its beginning.
    with _opened(stored, max_pixels) as reel:
        return _collect(_runs(reel.frames(), rate, probe.start), start, count, probe, working)


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A decoded frame, its time stamp and how long it stays on screen, in seconds."""

    frame: VideoFrame
    time: float
    duration: float


@dataclasses.dataclass(frozen=True)
class _Run:
    """A decoded frame and the range of output frames that show it."""

    frame: VideoFrame
    first: int
    stop: int


class ClipReader:
    """Reads a clip from its beginning on, stretch by stretch, without ever going back.

    **Arguments:**

    - `stored`, `probe`: the clip and what [`probe_clip`][] said of it.
    - `rate`: the frames per second that the clip is resampled to.
    - `working`: as for [`read_clip`][].

    **Raises:** `MediaError`, in `read` too.
    """

    def __init__(self, stored: Stored, probe: Probe, rate: float, working: WorkingSize):
        self.position = 0
        self._probe = probe
        self._runs = self._open(stored, rate)
        self._run: _Run | None = next(self._runs, None)
        self._working = working

    def _open(self, stored: Stored, rate: float) -> Iterator[_Run]:
        with _opened(stored, MAX_PIXELS) as reel:
            yield from _runs(reel.frames(), rate, self._probe.start)

    def read(self, start: int, count: int) -> UInt8[np.ndarray, "frames height width 3"]:
        """Frames `start` to `start + count`; fewer, perhaps none, where the clip ends before.

        **Raises:** `ValueError` if `start` lies before what was read last.
        """
        if start < self.position:
            raise ValueError(f"frame {start} has gone by; the next one is {self.position}")
        self.position = start + count
        taken = 0
        with _Film(self._working) as film:
            while self._run is not None and taken < count:
                run = self._run
                shown = min(run.stop, start + count) - max(run.first, start + taken)
                if shown > 0:
                    film.add(run.frame, shown)
                    taken += shown
                if run.stop <= start + count:
                    self._run = next(self._runs, None)
            return _or_none(film.develop(), self._probe)


@contextlib.contextmanager
def _opened(stored: Stored, max_pixels: int) -> Iterator["_Reel"]:
    """Opens a clip; what goes wrong with the file while it is open becomes a `MediaError`."""
    try:
        with readable(stored) as encoded, _container(stored, encoded) as container:
            stream = _video_stream(stored, container, max_pixels)
            yield _Reel(stored, container, stream, max_pixels)
    except MediaError:
        raise
    except _FAILURES as error:
        raise MediaError(str(stored), _reason(error)) from error


def _container(stored: Stored, encoded: io.RawIOBase | io.BytesIO) -> InputContainer:
    try:
        return av.open(encoded, "r", options=_OPTIONS, **_LENIENT)
    except av.error.ArgumentError as error:
        reason = "not a clip in a container that is read (mp4, mov, mkv, webm, avi, gif)"
        raise MediaError(str(stored), reason) from error


def _video_stream(stored: Stored, container: InputContainer, max_pixels: int) -> VideoStream:
    for stream in container.streams.video:
        # A cover picture in a music file is a video stream of one frame.
        if not stream.disposition & Disposition.attached_pic:
            # PyAV's types do not say so, but there is none for a codec that is not known.
            if stream.codec_context is None:
                raise MediaError(str(stored), "its video has an unknown codec")
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1
            # Against frames that are larger than the header says. Not exact, because ffmpeg
            # counts its padding too.
            stream.codec_context.options = {"max_pixels": str(2 * max_pixels + 2**20)}
            _check_size(stored, stream.codec_context.width, stream.codec_context.height, max_pixels)
            return stream
    raise MediaError(str(stored), "no video in this file (sound only?)")


def _check_size(stored: Stored, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        size = f"frames of {width} x {height} pixels"
        raise MediaError(str(stored), f"{size}, above the limit of {limit}; raise max_pixels")


def _path(stored: Stored) -> Path:
    return Path(stored.name) if isinstance(stored, Blob) else stored


def _reason(error: Exception) -> str:
    if isinstance(error, av.error.FFmpegError) and error.strerror:
        return f"cannot be decoded ({error.strerror})"
    return describe(error)


class _Reel:
    """An open clip, decoded from where it stands."""

    def __init__(self, stored: Stored, container: InputContainer, stream: VideoStream, limit: int):
        self.packets = 0
        self.failures = 0
        self._stored = stored
        self._container = container
        self._stream = stream
        self._limit = limit
        self._tick = float(stream.time_base or Fraction(1, av.time_base))
        self._decoded_frames = 0
        self._span = 0.0

    @property
    def rate(self) -> float | None:
        """Average frames per second as the container has it."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        return float(rate) if rate else None

    @property
    def measured_rate(self) -> float:
        """The container's rate, unless what was decoded contradicts it by more than a tenth."""
        if self._decoded_frames < 2:
            return min(self.rate or 1.0, MAX_FPS)
        measured = (self._decoded_frames - 1) / self._span
        rate = self.rate or measured
        return min(rate if abs(rate / measured - 1) < 0.1 else measured, MAX_FPS)

    @property
    def promised(self) -> int:
        """Frames that the container promises, 0 where it does not say."""
        return self._stream.frames

    def seek(self, time: float) -> bool:
        """Goes to the last key frame at or before a time stamp in seconds; false if it cannot."""
        try:
            self._container.seek(math.floor(time / self._tick), stream=self._stream)
        except av.error.FFmpegError:
            return False
        return True

    def duration(self, start: float) -> float:
        """Seconds from `start` to the end; reads on to the end if no header says it."""
        if self._stream.duration:
            return self._stream.duration * self._tick
        if self._container.duration:
            return self._container.duration / av.time_base
        end = start
        for packet in self._demuxed():
            if packet is not None and packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * self._tick)
        return end - start

    def frames(self) -> Iterator[_Timed]:
        """Decodes on from here. Time stamps rise, also where those of the file do not."""
        step = 1 / (self.rate or 25.0)
        start = last = None
        for frame in self._decoded():
            time = 0.0 if frame.pts is None else frame.pts * self._tick
            if last is not None and (frame.pts is None or time <= last):
                time = last + step
            start = time if start is None else start
            duration = (frame.duration or 0) * self._tick
            if duration <= 0:
                duration = step if last is None else time - last
            self._decoded_frames += 1
            self._span = time - start
            last = time
            yield _Timed(frame, time, duration)

    def _decoded(self) -> Iterator[VideoFrame]:
        for packet in self._demuxed():
            try:
                frames = self._stream.decode(packet)
            except av.error.FFmpegError:
                # One damaged packet; the decoder goes on with the next.
                self.failures += 1
                continue
            for frame in frames:
                _check_size(self._stored, frame.width, frame.height, self._limit)
                yield frame

    def _demuxed(self) -> Iterator[Packet | None]:
        """Yields packets, at the end `None`, on which the decoder gives out what it still holds."""
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    self.packets += 1
                    yield packet
        except av.error.FFmpegError:
            # The file ends in the middle of something; what came before is kept.
            self.failures += 1
        yield None


def _runs(
    frames: Iterator[_Timed], fps: float | int | None, start: float | None = None
) -> Iterator[_Run]:
    """Says which output frames show which decoded frame.

    Output frame `k` shows what is on screen `k / fps` seconds after `start` (the first frame's
    time stamp if not given); with `fps=None`, every decoded frame is shown once.
    """
    if fps is None:
        yield from (_Run(timed.frame, k, k + 1) for k, timed in enumerate(frames))
        return
    held = None
    first = 0
    for timed in frames:
        start = timed.time if start is None else start
        begin = max(0, math.ceil((timed.time - start - _TOLERANCE) * fps))
        if held is not None and begin > first:
            yield _Run(held.frame, first, begin)
        held, first = timed, begin
    if held is not None and start is not None:
        end = held.time + held.duration - start
        stop = max(math.ceil((end - _TOLERANCE) * fps), 1)
        if stop > first:
            yield _Run(held.frame, first, stop)


def _chain(first: _Timed, rest: Iterator[_Timed]) -> Iterator[_Timed]:
    yield first
    yield from rest


def _collect(
    runs: Iterator[_Run], start: int, count: int, probe: Probe, working: WorkingSize | None
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Converts the runs that show output frames `start` to `start + count`."""
    with _Film(working) as film:
        for run in runs:
            shown = min(run.stop, start + count) - max(run.first, start)
            if shown > 0:
                film.add(run.frame, shown)
            if run.stop >= start + count:
                break
        return _or_none(film.develop(), probe)


def _or_none(
    frames: UInt8[np.ndarray, "frames height width 3"] | None, probe: Probe
) -> UInt8[np.ndarray, "frames height width 3"]:
    return np.empty((0, probe.height, probe.width, 3), np.uint8) if frames is None else frames


class _Film:
    """Frames that are converted in a thread while the next ones are decoded: for small frames the
    one takes as long as the other.

    **Arguments:**

    - `working`: see [`read_clip`][].
    """

    def __init__(self, working: WorkingSize | None):
        self._working = working
        self._converter: _Converter | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "elastictok-convert")
        self._waiting: collections.deque[tuple[concurrent.futures.Future[np.ndarray], int]]
        self._waiting = collections.deque()
        self._frames: list[np.ndarray] = []

    def __enter__(self) -> "_Film":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def frame_bytes(self, frame: VideoFrame) -> int:
        """What a frame will take."""
        return self._convert(frame).bytes

    def add(self, frame: VideoFrame, times: int) -> None:
        """Shows a frame so many times."""
        self._waiting.append((self._thread.submit(self._convert(frame), frame), times))
        if len(self._waiting) > _MOST_WAITING:
            self._take()

    def develop(self) -> UInt8[np.ndarray, "frames height width 3"] | None:
        """All frames; `None` if there are none."""
        while self._waiting:
            self._take()
        return _stack(self._frames) if self._frames else None

    def _convert(self, frame: VideoFrame) -> "_Converter":
        if self._converter is None:
            self._converter = _Converter(frame, self._working)
        return self._converter

    def _take(self) -> None:
        converted, times = self._waiting.popleft()
        self._frames += [converted.result()] * times


def _stack(frames: list[np.ndarray]) -> UInt8[np.ndarray, "frames height width 3"]:
    """Stacks frames and lets go of each on the way, so that the clip is not in memory twice."""
    result = np.empty((len(frames), *frames[0].shape), np.uint8)
    for index in range(len(frames)):
        result[index] = frames[index]
        frames[index] = result[index]
    return result


@dataclasses.dataclass(frozen=True)
class _Turn:
    """How a stored frame is turned upright: transposed first, then mirrored."""

    transpose: bool
    mirror_x: bool
    mirror_y: bool

    @classmethod
    def of(cls, frame: VideoFrame) -> "_Turn":
        """From the display matrix `[a b u; c d v; x y w]` (ISO 14496-12, 6.2.2), by which a
        point moves to (a x + c y, b x + d y). Angles between right angles are rounded."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls(False, False, False)
        a, b, _, c, d = (int(entry) for entry in np.frombuffer(matrix, np.int32)[:5])
        if abs(b) > abs(a):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after turning, or before."""
        return (width, height) if self.transpose else (height, width)

    def apply(
        self, frame: UInt8[np.ndarray, "height width 3"]
    ) -> UInt8[np.ndarray, "out_height out_width 3"]:
        if self.transpose:
            frame = frame.swapaxes(0, 1)
        if self.mirror_x:
            frame = frame[:, ::-1]
        if self.mirror_y:
            frame = frame[::-1]
        return np.ascontiguousarray(frame)


class _Converter:
    """Turns decoded frames into upright RGB of one size, that of the first frame.

    A stream that changes its size midway is scaled to it.
    """

    def __init__(self, first: VideoFrame, working: Callable[[int, int], tuple[int, int]] | None):
        self._turn = _Turn.of(first)
        size = self._turn.size(first.height, first.width)
        height, width = size if working is None else working(*size)
        self.bytes = height * width * 3
        self._size = self._turn.size(height, width)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
        height, width = self._size
        shrinks = height * width < frame.height * frame.width
        seen_through = any(component.is_alpha for component in frame.format.components)
        converted = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgba" if seen_through else "rgb24",
            interpolation=(AREA if shrinks else BILINEAR) | EXACT,
            threads=1,
        )
        # A view: what is made of it is copied once, into the whole.
        plane: Any = converted.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        channels = 4 if seen_through else 3
        pixels = rows[:, : width * channels].reshape(height, width, channels)
        return self._turn.apply(_on_white(pixels) if seen_through else pixels)


def _on_white(
    pixels: UInt8[np.ndarray, "height width 4"],
) -> UInt8[np.ndarray, "height width 3"]:
    alpha = pixels[..., 3:].astype(np.uint32)
    mixed = pixels[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def shown(frames: int, rate: float | int, fps: float | int) -> Int64[np.ndarray, " out_frames"]:
    """Which of `frames` frames at a constant `rate` is on screen at each frame of `fps`.

    The rule of [`read_clip`][] for frames that are in memory.
    """
    begins = np.ceil((np.arange(frames + 1) / rate - _TOLERANCE) * fps).astype(np.int64)
    begins[0], begins[-1] = 0, max(begins[-1], 1)
    return np.repeat(np.arange(frames), np.diff(begins))
