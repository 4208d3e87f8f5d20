"""Any 8-bit frames to what a codec takes: three channels, a size that it knows, whole blocks."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def check_frames(frames: np.ndarray) -> None:
    """**Raises:** `ValueError` unless the frames are `u8[frames height width channels]`."""
    if frames.dtype != np.uint8:
        raise ValueError(
            f"frames are {frames.dtype}; give uint8 from 0 to 255 (from floats x in [-1, 1]: "
            "np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8))"
        )
    if frames.ndim != 4 or frames.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"frames have shape {frames.shape}; give (frames, height, width, channels) with 1 "
            "(grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels; of one picture, "
            "picture[None], of grey frames, frames[..., None]"
        )
    if 0 in frames.shape:
        raise ValueError(f"frames have shape {frames.shape}: there is no pixel in them")


def to_rgb(
    frames: UInt8[np.ndarray, "frames height width channels"],
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Grey to three equal channels, alpha composited on white."""
    colours, alpha = frames, None
    if frames.shape[-1] in (2, 4):
        colours, alpha = frames[..., :-1], frames[..., -1:].astype(np.uint32)
    if alpha is not None:
        over_white = colours * alpha + 255 * (255 - alpha)
        colours = ((over_white + 127) // 255).astype(np.uint8)  # rounded to the nearest
    return np.ascontiguousarray(np.broadcast_to(colours, (*frames.shape[:3], 3)))


def fitted_size(height: int, width: int, short: int) -> tuple[int, int]:
    """The size with the short side at `short` and the shape kept, to the nearest pixel."""
    if height <= width:
        return short, _nearest(width * short, height)
    return _nearest(height * short, width), short


def _nearest(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def resize(
    frames: UInt8[np.ndarray, "frames height width 3"], height: int, width: int
) -> UInt8[np.ndarray, "frames new_height new_width 3"]:
    """Pillow's bicubic filter, which averages over all source pixels when it shrinks."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in frames
    ]
    return np.stack(resized)


def pad(
    frames: UInt8[np.ndarray, "frames height width 3"], count: int, height: int, width: int
) -> UInt8[np.ndarray, "count new_height new_width 3"]:
    """Repeats the last frame, the lowest row and the rightmost column."""
    have = frames.shape
    extra = (count - have[0], height - have[1], width - have[2])
    return np.pad(frames, [*((0, n) for n in extra), (0, 0)], mode="edge")


def multiple(value: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `value`."""
    return -(-value // divisor) * divisor
