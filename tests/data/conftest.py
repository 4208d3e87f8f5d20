"""Media for the tests, made on the spot: nothing binary is kept in the repository."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

STEP = 8  # grey levels between two numbered frames: far above what a codec gets wrong


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames whose grey tells their number, whatever a codec does to them."""
    levels = (np.arange(count) * STEP + 4).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """The inverse of `numbered`."""
    return [round((frame.mean() - 4) / STEP) for frame in frames]


def corners(height: int, width: int) -> np.ndarray:
    """A picture that no turn or reflection maps to itself."""
    frame = np.full((height, width, 3), 60, np.uint8)
    frame[: height // 2, : width // 2] = (240, 20, 20)
    frame[: height // 2, width // 2 :] = (20, 240, 20)
    frame[height // 2 :, : width // 2] = (20, 20, 240)
    return frame


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 1000),
    rate: int = 10,
    options: dict[str, str] | None = None,
) -> None:
    """Writes frames with PyAV alone; `times` are time stamps in units of `time_base`."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        context = stream.codec_context
        context.height, context.width = frames.shape[1:3]
        context.pix_fmt = pix_fmt
        if times is not None:
            context.time_base = stream.time_base = time_base
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format=pix_fmt)
            if times is None:
                picture.pts, picture.time_base = index, Fraction(1, rate)
            else:
                picture.pts, picture.time_base = times[index], time_base
            output.mux(stream.encode(picture))
        output.mux(stream.encode())


def sound(path: Path, *, cover: np.ndarray | None = None) -> None:
    """A file with sound and no video, perhaps with the cover picture of an album."""
    with av.open(str(path), "w") as output:
        audio = output.add_stream("aac", rate=44100)
        picture = None
        if cover is not None:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = *cover.shape[1::-1], "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(cover, format="rgb24")
            output.mux(picture.encode(frame.reformat(format="yuvj420p")))
        samples = np.zeros((2, 1024), np.float32)
        for index in range(20):
            piece = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            piece.sample_rate, piece.pts = 44100, index * 1024
            output.mux(audio.encode(piece))
        output.mux(audio.encode())


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Puts (a, b, c, d) into the display matrix of an mp4's only track (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    body = data.index(b"tkhd") + 4
    assert data[body] == 0, "a track header of version 0"
    start = body + 40
    a, b, c, d = matrix
    width, height = np.frombuffer(data[start + 36 : start + 44], ">u4")
    # The picture is moved back to where its corner is the origin, as cameras do.
    x = int(width) * (a < 0) + int(height) * (c < 0)
    y = int(width) * (b < 0) + int(height) * (d < 0)
    entries = [a << 16, b << 16, 0, c << 16, d << 16, 0, x, y, 1 << 30]
    data[start : start + 36] = np.array(entries, ">i4").tobytes()
    path.write_bytes(data)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Maker:
    """The functions above; a fixture, because test modules cannot import each other."""

    numbered: Callable = numbered
    numbers: Callable = numbers
    corners: Callable = corners
    encode: Callable = encode
    sound: Callable = sound
    turn: Callable = turn
    png: Callable = png


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()
