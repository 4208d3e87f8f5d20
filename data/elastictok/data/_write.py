"""Writing clips and pictures: whole or not at all."""

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from elastictok.data._clip import BILINEAR, EXACT
from elastictok.data._errors import MediaError
from elastictok.data._types import check_fps

# Container, and encoders by preference with their settings. The first encoder that this build of
# PyAV has is used: builds without GPL parts lack x264.
# x264's macroblock tree gave another file every time, out of six for the same frames.
# A fixed quantizer of 2, the finest that MPEG-4 has, times ffmpeg's 118 per step.
_FINEST = {"flags": "+qscale", "global_quality": "236"}
_H264 = {"libx264": {"crf": "16", "x264-params": "mbtree=0"}, "libopenh264": {}, "mpeg4": _FINEST}
_VP9 = {"libvpx-vp9": {"crf": "16", "b": "0", "cpu-used": "4"}}
_MPEG4 = {"mpeg4": _FINEST}
_CLIP_FORMATS: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    ".avi": ("avi", _MPEG4),
    ".m4v": ("mp4", _H264),
    ".mkv": ("matroska", _H264),
    ".mov": ("mov", _H264),
    ".mp4": ("mp4", _H264),
    ".webm": ("webm", _VP9),
}
_PICTURE_FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    ".bmp": ("BMP", {}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": 1}),
}
_BT709 = 1
# MPEG-4 cannot say which matrix it was made with, so it must be the one assumed by default.
_SAYS_MATRIX = ("libx264", "libopenh264", "libvpx-vp9")


def write_clip(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "frames height width 3"],
    fps: float | int,
) -> None:
    """Writes a clip that browsers play: H.264 in `.mp4` (also `.m4v`, `.mov`, `.mkv`), VP9 in
    `.webm`; MPEG-4 in `.avi`.

    High quality, not lossless; colours at half the resolution, as BT.709 (BT.601 in `.avi`).
    H.264 and MPEG-4 need even sides: an odd height or width gains a copy of its last row or
    column, which is there when the file is read again. VP9 keeps odd sides. The same frames give
    the same file.

    The file appears under its name when it is complete; an older one is replaced then.

    **Arguments:**

    - `path`: the suffix chooses the format.
    - `frames`: `uint8[frames height width 3]`.
    - `fps`: frames per second.

    **Raises:** `MediaError` for another suffix, a missing folder or a failed write; `ValueError`
    for a rate that is not possible or frames that are empty.
    """
    path = Path(path)
    check_fps(fps)
    _check_not_empty(frames)
    if path.suffix.lower() not in _CLIP_FORMATS:
        known = " ".join(_CLIP_FORMATS)
        raise MediaError(path, f"no clip can be written under this suffix; use one of {known}")
    container, encoders = _CLIP_FORMATS[path.suffix.lower()]
    encoder = next(name for name in encoders if name in av.codecs_available)
    if encoder != "libvpx-vp9":
        frames = _even(frames)
    with replacing(path) as temporary:
        settings = encoders[encoder]
        timed = ((frame, index / fps) for index, frame in enumerate(frames))
        size = frames.shape[1:3]
        _encode(temporary, timed, size, fps, 1 / _rate(fps), container, encoder, settings)


def write_picture(path: str | os.PathLike[str], frame: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes a picture: `.png`, `.bmp`, `.webp` without loss, `.jpg` at quality 95.

    The file appears under its name when it is complete; an older one is replaced then.

    **Arguments:**

    - `path`: the suffix chooses the format.
    - `frame`: `uint8[height width 3]`.

    **Raises:** `MediaError` for another suffix, a missing folder or a failed write; `ValueError`
    for a picture that is empty.
    """
    path = Path(path)
    _check_not_empty(frame)
    if path.suffix.lower() not in _PICTURE_FORMATS:
        known = " ".join(_PICTURE_FORMATS)
        raise MediaError(path, f"no picture can be written under this suffix; use one of {known}")
    kind, options = _PICTURE_FORMATS[path.suffix.lower()]
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(frame)).save(temporary, format=kind, **options)


def _check_not_empty(pixels: np.ndarray) -> None:
    if 0 in pixels.shape:
        raise ValueError(f"nothing to write: the pixels have the shape {list(pixels.shape)}")


def _even(
    frames: UInt8[np.ndarray, "frames height width 3"],
) -> UInt8[np.ndarray, "frames even_height even_width 3"]:
    height, width = frames.shape[1:3]
    if height % 2 == 0 and width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(
    path: Path,
    frames: Iterable[tuple[UInt8[np.ndarray, "height width 3"], float]],
    size: tuple[int, int],
    fps: float | int,
    tick: Fraction,
    container: str,
    encoder: str,
    settings: dict[str, str],
) -> None:
    """`tick` is what time stamps are rounded to, in seconds."""
    # The index in front lets a browser start before it has the whole file.
    options = {"fflags": "+bitexact"}
    if container in ("mp4", "mov"):
        options["movflags"] = "+faststart"
    with av.open(str(path), "w", format=container, options=options) as output:
        stream = output.add_stream(encoder, rate=_rate(fps), options=settings)
        if not isinstance(stream, VideoStream):
            raise TypeError(f"{encoder} is no encoder of video")
        context = stream.codec_context
        context.height, context.width = size
        context.pix_fmt = "yuv420p"
        context.time_base = tick
        matrix = Colorspace.ITU601
        if encoder in _SAYS_MATRIX:
            # Where a file says nothing, players guess, and differently.
            matrix = Colorspace.ITU709
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = ColorRange.MPEG
        last = -1
        for frame, seconds in frames:
            picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            coded = picture.reformat(
                format="yuv420p",
                dst_colorspace=matrix,
                dst_color_range=ColorRange.MPEG,
                interpolation=BILINEAR | EXACT,
                threads=1,
            )
            last = max(last + 1, round(seconds / float(tick)))
            coded.pts, coded.time_base = last, tick
            output.mux(stream.encode(coded))
        output.mux(stream.encode())


def _rate(fps: float | int) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def encode_mp4(
    frames: Iterable[tuple[UInt8[np.ndarray, "height width 3"], float]],
    size: tuple[int, int],
    fps: float | int,
    *,
    steady: bool,
) -> bytes:
    """An MP4 as [`write_clip`][] writes them, of frames that come one by one, at any times.

    **Arguments:**

    - `frames`: all of the size, with the seconds since the first, which rise.
    - `size`: height and width, both even.
    - `fps`: frames per second, on average.
    - `steady`: whether all frames are as long; else times are kept to 1/90000 second.
    """
    container, encoders = _CLIP_FORMATS[".mp4"]
    encoder = next(name for name in encoders if name in av.codecs_available)
    # On the disk, because the index is moved to the front by reading the file again.
    with tempfile.TemporaryDirectory(prefix="elastictok-") as folder:
        path = Path(folder) / "clip.mp4"
        tick = 1 / _rate(fps) if steady else Fraction(1, 90_000)
        _encode(path, frames, size, fps, tick, container, encoder, encoders[encoder])
        return path.read_bytes()


def encode_jpeg(frame: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The bytes of the file that [`write_picture`][] writes under the suffix `.jpg`."""
    kind, options = _PICTURE_FORMATS[".jpg"]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(buffer, format=kind, **options)
    return buffer.getvalue()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, hidden from `find_media`, that becomes `path` at the end."""
    if not path.parent.is_dir():
        raise MediaError(path, "its folder does not exist; create it first")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(path, f"cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
