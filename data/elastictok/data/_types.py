"""The plain values that this package hands out."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, UInt8

MAX_FPS = 1000.0
"""Rates above this many frames per second are taken for damage."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A picture or a clip in memory.

    **Arguments:**

    - `frames`: `uint8[frames height width 3]`, sRGB as stored in the file, upright.
    - `fps`: frames per second; `None` for a picture, which has exactly one frame.
    - `path`: where it was read from, `None` if it was made in memory.
    - `missing`: how many frames the container promises, at least, that could not be decoded.

    **Raises:** `ValueError` where the fields contradict each other.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    fps: float | int | None
    path: Path | None = None
    missing: int = 0

    def __post_init__(self):
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(
                f"Clip.frames is {self.frames.dtype}{list(shape)}; "
                "it must be uint8[frames height width 3]"
            )
        if 0 in shape:
            raise ValueError(f"Clip.frames has the shape {list(shape)}; no dimension may be empty")
        if self.fps is None and shape[0] != 1:
            raise ValueError(
                f"a Clip without fps is a picture, which has one frame, not {shape[0]}; "
                "give the frames per second of a clip"
            )
        check_fps(self.fps)

    @property
    def picture(self) -> bool:
        """True for a picture, false for a clip, be it one frame long."""
        return self.fps is None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences of blocks.

    **Arguments:**

    - `pixels`: `uint8[batch blocks frames height width 3]`; zero where `valid` is false.
    - `segments`: `int32[batch blocks]`, the document that a block belongs to: 1, 2, ... within
        its sequence, 0 where `valid` is false.
    - `valid`: `bool[batch blocks]`, false for blocks that no document filled.
    - `names`: for each sequence the names of its documents, that of segment 1 first; for messages.
    """

    pixels: UInt8[np.ndarray, "batch blocks frames height width 3"]
    segments: Int32[np.ndarray, "batch blocks"]
    valid: Bool[np.ndarray, "batch blocks"]
    names: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The shape of a training sequence.

    **Arguments:**

    - `size`: height and width of a frame in pixels.
    - `frames_per_block`: frames in a block, the unit of adaptivity.
    - `blocks`: blocks in a sequence; no document is longer.
    - `fps`: the rate that clips are resampled to, in frames per second; `None` keeps the average
        rate of each clip.
    - `buckets`: further sizes (height, width). A document then gets the size whose aspect is
        nearest to that of its frames, and all sequences of a batch have one size. See
        [`aspect_buckets`][].
    """

    size: tuple[int, int]
    frames_per_block: int
    blocks: int = 1
    fps: float | int | None = 8.0
    buckets: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for size in self.sizes:
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"size is {size}; it must be (height, width), both at least 1")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"the sizes are {self.sizes}; each may be given once")
        if self.frames_per_block < 1:
            raise ValueError(f"frames_per_block is {self.frames_per_block}; it must be at least 1")
        if self.blocks < 1:
            raise ValueError(f"blocks is {self.blocks}; it must be at least 1")
        check_fps(self.fps)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """All sizes of frames, `size` first."""
        return (self.size, *self.buckets)

    @property
    def frames(self) -> int:
        """Frames in a whole sequence."""
        return self.blocks * self.frames_per_block


def check_fps(fps: float | int | None) -> None:
    """Refuses rates that no clip can have; `None` passes."""
    if fps is not None and not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
        raise ValueError(f"fps is {fps}; it must be above 0 and at most {MAX_FPS:g}")
