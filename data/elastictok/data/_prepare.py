"""From a file to a record: what every builder does to each file."""

import dataclasses
import math
import os
from pathlib import Path

from elastictok.data._clip import clip_frames, measure_clip
from elastictok.data._errors import MediaError
from elastictok.data._find import is_clip, is_picture, wanted
from elastictok.data._picture import describe, read_picture
from elastictok.data._record import Record
from elastictok.data._stored import Blob
from elastictok.data._types import check_fps
from elastictok.data._write import encode_jpeg, encode_mp4

MAX_RECORD_BYTES = 2**30
"""Largest file that is kept as it is: 1 GiB. A record is read into memory whole."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What is encoded anew on the way into a data set. By default nothing: the bytes stay.

    Pictures become JPEG of quality 95, clips H.264 of constant quality 16. What is small and slow
    enough already stays as it is.

    **Arguments:**

    - `resolution`: pictures and frames whose short side has more pixels are scaled down to it.
    - `fps`: clips of more frames per second are resampled to it, by time stamps.
    """

    resolution: int | None = None
    fps: float | int | None = None

    def __post_init__(self):
        if self.resolution is not None and self.resolution < 2:
            raise ValueError(f"resolution is {self.resolution}; it must be at least 2 pixels")
        check_fps(self.fps)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after scaling."""
        return self._scaled(height, width, 1)

    def even_size(self, height: int, width: int) -> tuple[int, int]:
        """The same for H.264, which knows even sides only."""
        return self._scaled(height, width, 2)

    def _scaled(self, height: int, width: int, step: int) -> tuple[int, int]:
        scale = min(
            1.0, math.inf if self.resolution is None else self.resolution / min(height, width)
        )
        high, wide = (max(step, step * round(side * scale / step)) for side in (height, width))
        return high, wide


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file that a data set is to be built of.

    **Arguments:**

    - `key`: see [`Record`][].
    - `path`: where it is.
    - `source`, `licence`: see [`Record`][].
    """

    key: str
    path: Path
    source: str = ""
    licence: str = ""


def make_record(listed: Listed, encoding: Encoding) -> Record:
    """Reads a file, decodes all of it to see what it is worth, and makes a record of it.

    **Raises:** `MediaError` with the reason if it cannot be used.
    """
    path = listed.path
    if not is_picture(path) and not is_clip(path):
        raise MediaError(path, f"its suffix is none of those read: {wanted()}")
    data = _read(path, whole=is_picture(path) or encoding == Encoding())
    if is_picture(path):
        return _picture(listed, encoding, Blob(str(path), data))
    return _clip(listed, encoding, Blob(str(path), data) if data else path)


def _read(path: Path, *, whole: bool) -> bytes:
    """The bytes of a file. Empty for a large one that may become smaller: it is read in place."""
    try:
        size = path.stat().st_size
        if size > MAX_RECORD_BYTES and not whole:
            return b""
        if size > MAX_RECORD_BYTES:
            raise _too_large(path, size)
        data = path.read_bytes()
    except OSError as error:
        raise MediaError(path, describe(error)) from error
    if not data:
        raise MediaError(path, "an empty file")
    return data


def _too_large(path: Path, size: int) -> MediaError:
    return MediaError(
        path,
        f"{size} bytes, above the limit of {MAX_RECORD_BYTES} for one record; cut it into pieces, "
        "or build with a resolution that makes it smaller",
    )


def _picture(listed: Listed, encoding: Encoding, blob: Blob) -> Record:
    shrunk = False

    def working(height: int, width: int) -> tuple[int, int]:
        nonlocal shrunk
        shrunk = encoding.size(height, width) != (height, width)
        return encoding.size(height, width)

    # Decoded once, and a large JPEG at a fraction of its size.
    pixels = read_picture(blob, working=working)
    height, width, _ = pixels.shape
    data = encode_jpeg(pixels) if shrunk else blob.data
    return Record(
        key=listed.key,
        kind="picture",
        height=height,
        width=width,
        frames=1,
        fps=None,
        duration=None,
        missing=0,
        source=listed.source,
        licence=listed.licence,
        data=data,
    )


def _clip(listed: Listed, encoding: Encoding, stored: Blob | Path) -> Record:
    measured = measure_clip(stored)
    missing = measured.missing
    height, width = measured.height, measured.width
    # A container's average may be off by a little without anything to resample.
    slower = encoding.fps is not None and measured.rate > 1.01 * encoding.fps
    if encoding.size(height, width) != (height, width) or slower:
        fps = float(encoding.fps) if slower and encoding.fps else None
        size = encoding.even_size(height, width)
        frames = clip_frames(stored, fps=fps, working=encoding.even_size)
        data = encode_mp4(frames, size, fps or measured.rate, steady=fps is not None)
        measured = measure_clip(Blob(listed.key, data))
    elif isinstance(stored, Blob):
        data = stored.data
    else:
        raise _too_large(stored, os.path.getsize(stored))
    if not math.isfinite(measured.duration):
        raise MediaError(listed.path, "its time stamps make no sense")
    return Record(
        key=listed.key,
        kind="clip",
        height=measured.height,
        width=measured.width,
        frames=measured.frames,
        fps=measured.rate,
        duration=measured.duration,
        missing=missing,
        source=listed.source,
        licence=listed.licence,
        data=data,
    )
