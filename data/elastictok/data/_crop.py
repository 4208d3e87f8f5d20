"""Which part of a frame a document shows, and how large a frame needs to be kept for that."""

import abc
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels in a frame, shown mirrored if `flip`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False

    def show(
        self, frames: UInt8[np.ndarray, "frames height width 3"], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "frames out_height out_width 3"]:
        """Cuts the window out of every frame and scales it to `size` (height, width).

        Bicubic with antialiasing; a window that has the size already is copied bit for bit.
        """
        cut = frames[:, self.top : self.top + self.height, self.left : self.left + self.width]
        if (self.height, self.width) != size:
            cut = np.stack([resize(frame, size) for frame in cut])
        if not self.flip:
            return np.ascontiguousarray(cut)
        # Channel by channel: NumPy copies reversed pixels of three bytes four times slower.
        mirrored = np.empty(cut.shape, np.uint8)
        for channel in range(3):
            mirrored[..., channel] = cut[:, :, ::-1, channel]
        return mirrored


def resize(
    frame: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "out_height out_width 3"]:
    """Scales a frame to `size` (height, width), bicubic with antialiasing."""
    height, width = size
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


class AbstractCrop(abc.ABC):
    """Draws one window per document. Subclasses are frozen dataclasses, whose text is their
    identity when a run is resumed."""

    @property
    @abc.abstractmethod
    def smallest_scale(self) -> float:
        """The smallest side of a window that is ever drawn, as a share of the largest possible."""

    @abc.abstractmethod
    def window(
        self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator
    ) -> Window:
        """Draws a window.

        **Arguments:**

        - `height`, `width`: of the frame.
        - `size`: height and width that the window will be scaled to; it has their aspect.
        - `rng`: the only source of chance.
        """


@dataclasses.dataclass(frozen=True)
class CentreCrop(AbstractCrop):
    """The largest window of the right aspect, in the middle; nothing is random."""

    @property
    def smallest_scale(self) -> float:
        return 1.0

    def window(
        self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator
    ) -> Window:
        high, wide = largest_window(height, width, size)
        return Window((height - high) // 2, (width - wide) // 2, high, wide)


@dataclasses.dataclass(frozen=True)
class RandomCrop(AbstractCrop):
    """A window of random size and place, mirrored left to right half of the time.

    **Arguments:**

    - `smallest`, `largest`: the side of a window is drawn uniformly between these shares of the
        largest window of the right aspect that fits into the frame. `RandomCrop(1.0, 1.0)` keeps
        the size and draws the place only.
    - `flip`: whether to mirror.
    """

    smallest: float | int = 0.5
    largest: float | int = 1.0
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(
                f"smallest is {self.smallest} and largest {self.largest}; "
                "they must obey 0 < smallest <= largest <= 1"
            )

    @property
    def smallest_scale(self) -> float:
        return float(self.smallest)

    def window(
        self, height: int, width: int, size: tuple[int, int], rng: np.random.Generator
    ) -> Window:
        scale = rng.uniform(self.smallest, self.largest)
        high, wide = largest_window(height, width, size)
        high, wide = max(1, round(scale * high)), max(1, round(scale * wide))
        top, left = rng.integers(height - high + 1), rng.integers(width - wide + 1)
        return Window(int(top), int(left), high, wide, flip=self.flip and rng.random() < 0.5)


def largest_window(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest window in a frame that has the aspect of `size`."""
    high, wide = size
    if width * high >= height * wide:
        return height, min(width, max(1, round(height * wide / high)))
    return min(height, max(1, round(width * high / wide))), width


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Which of `sizes` (height, width) has the aspect nearest to that of a frame, by ratio; the
    first of those equally near."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(aspect - math.log(sizes[i][1] / sizes[i][0])))


def aspect_buckets(
    size: tuple[int, int],
    *,
    multiple: int,
    ratios: Sequence[float | int] = (9 / 16, 3 / 4, 1, 4 / 3, 16 / 9),
) -> tuple[tuple[int, int], ...]:
    """Frame sizes of other aspects than `size`, and of no larger area: for the `buckets` of
    [`Geometry`][]. A compiled training step is compiled once more for each.

    **Arguments:**

    - `size`: height and width in pixels, multiples of `multiple`.
    - `multiple`: of both sides, in pixels: the patch.
    - `ratios`: widths divided by heights, met as nearly as the multiple allows.

    **Returns:** sizes (height, width), without `size` and without duplicates.

    **Raises:** `ValueError` for a size that is no multiple, or a ratio that is not above 0.
    """
    if multiple < 1 or min(size) < 1 or size[0] % multiple or size[1] % multiple:
        raise ValueError(f"size is {size}; both sides must be positive multiples of {multiple}")
    cells = size[0] * size[1] // multiple**2
    found = []
    for ratio in ratios:
        if not 0 < ratio < math.inf:
            raise ValueError(f"a ratio is {ratio}; it must be above 0, width divided by height")
        ideal = min(float(cells), max(1.0, math.sqrt(cells * ratio)))
        pairs = [(cells // wide, wide) for wide in (math.floor(ideal), math.ceil(ideal))]
        high, wide = min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / ratio)))
        found.append((high * multiple, wide * multiple))
    return tuple(other for other in dict.fromkeys(found) if other != size)


@dataclasses.dataclass(frozen=True)
class WorkingSize:
    """The size at which frames are kept in memory: no larger than the crops can use.

    It is the smallest at which a window of the smallest scale still has the size wanted, so a
    crop never scales up what the file holds in full; frames below it keep their size.

    **Arguments:**

    - `sizes`: heights and widths of the frames asked for; that of the nearest aspect counts.
    - `smallest_scale`: see [`AbstractCrop`][].
    """

    sizes: tuple[tuple[int, int], ...]
    smallest_scale: float

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        size = self.sizes[nearest_size(height, width, self.sizes)]
        high, wide = largest_window(height, width, size)
        scale = max(size[0] / high, size[1] / wide) / self.smallest_scale
        if scale >= 1:
            return height, width
        return math.ceil(height * scale), math.ceil(width * scale)
