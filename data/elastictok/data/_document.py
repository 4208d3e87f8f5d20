"""From an item to a document: whole blocks of one size."""

import abc
import dataclasses

import numpy as np
from jaxtyping import UInt8

from elastictok.data._crop import AbstractCrop, nearest_size
from elastictok.data._errors import MediaError
from elastictok.data._source import AbstractSource, Request
from elastictok.data._types import Geometry


class AbstractExcerpt(abc.ABC):
    """Which frames of a clip make a document. Subclasses are frozen dataclasses, whose text is
    their identity when a run is resumed."""

    @property
    @abc.abstractmethod
    def in_order(self) -> bool:
        """Whether parts of one use follow each other from the beginning of the clip on, so that it
        is decoded once."""

    @abc.abstractmethod
    def parts(self, frames: int, geometry: Geometry) -> int:
        """How many documents one use of a clip gives, at least 1."""

    @abc.abstractmethod
    def span(
        self, part: int, frames: int, geometry: Geometry, rng: np.random.Generator
    ) -> tuple[int, int]:
        """The first frame of a part and how many it has: whole blocks, at most `geometry.blocks`;
        or all frames, if they fill no block.

        **Arguments:**

        - `part`: from 0 to `parts - 1`.
        - `frames`: of the clip, at the rate that it is read at.
        - `rng`: the only source of chance, in the same state for all parts of one use. As many
            numbers must be drawn for each of them: the window, which all share, is drawn next.
        """

    @abc.abstractmethod
    def left_over(self, part: int, frames: int, geometry: Geometry) -> int:
        """Frames of which no part of this use has any, because they fill no block; counted at the
        last part."""


@dataclasses.dataclass(frozen=True)
class RandomStretch(AbstractExcerpt):
    """One document per use: a random stretch of as many whole blocks as the clip has, at most as
    many as a sequence has."""

    @property
    def in_order(self) -> bool:
        return False

    def parts(self, frames: int, geometry: Geometry) -> int:
        return 1

    def span(
        self, part: int, frames: int, geometry: Geometry, rng: np.random.Generator
    ) -> tuple[int, int]:
        long = geometry.frames_per_block
        count = min(frames, min(max(1, frames // long), geometry.blocks) * long)
        return int(rng.integers(frames - count + 1)), count

    def left_over(self, part: int, frames: int, geometry: Geometry) -> int:
        blocks = frames // geometry.frames_per_block
        return frames % geometry.frames_per_block if 1 <= blocks <= geometry.blocks else 0


@dataclasses.dataclass(frozen=True)
class WholeClip(AbstractExcerpt):
    """All whole blocks of the clip, in order: a clip longer than a sequence goes on in a document
    of the next one, and so on. Where the first block begins is drawn, so that the frames left over
    are not always the same."""

    @property
    def in_order(self) -> bool:
        return True

    def parts(self, frames: int, geometry: Geometry) -> int:
        return max(1, -(-(frames // geometry.frames_per_block) // geometry.blocks))

    def span(
        self, part: int, frames: int, geometry: Geometry, rng: np.random.Generator
    ) -> tuple[int, int]:
        long = geometry.frames_per_block
        blocks = frames // long
        if not blocks:
            return 0, frames
        start = int(rng.integers(frames - blocks * long + 1))
        first = part * geometry.blocks
        return start + first * long, min(blocks - first, geometry.blocks) * long

    def left_over(self, part: int, frames: int, geometry: Geometry) -> int:
        last = part + 1 == self.parts(frames, geometry)
        return (
            frames % geometry.frames_per_block
            if last and frames >= geometry.frames_per_block
            else 0
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Blocks of one picture or clip.

    **Arguments:**

    - `pixels`: `uint8[blocks frames height width 3]`.
    - `bucket`: which of the geometry's sizes they have.
    - `name`, `index`: the item of its source.
    - `parts`: how many documents this use of the item gives.
    - `tail_frames`: frames that were left over because they fill no block.
    - `missing`: see [`AbstractItem`][].
    """

    pixels: UInt8[np.ndarray, "blocks frames height width 3"]
    bucket: int
    name: str
    index: int
    parts: int
    tail_frames: int
    missing: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """An item that cannot be used, and why."""

    name: str
    index: int
    reason: str


class DocumentMaker:
    """Draws a document from an item: which stretch, which window. One window for all frames.

    The result depends on the item and the random generator alone.

    **Arguments:**

    - `source`: where items come from.
    - `geometry`: of the blocks.
    - `request`: what is asked of the source.
    - `crop`: draws the window.
    - `excerpt`: draws the stretch.
    """

    def __init__(
        self,
        source: AbstractSource,
        geometry: Geometry,
        request: Request,
        crop: AbstractCrop,
        excerpt: AbstractExcerpt,
    ):
        self._source = source
        self._geometry = geometry
        self._request = request
        self._crop = crop
        self._excerpt = excerpt

    def __call__(
        self, index: int, part: int, rng: np.random.Generator
    ) -> Document | Failure | None:
        """A part of what one use of an item gives; `None` where a damaged clip ends before it."""
        try:
            return self._document(index, part, rng)
        except MediaError as error:
            return Failure(self._source.name(index), index, error.reason)

    def _document(self, index: int, part: int, rng: np.random.Generator) -> Document | None:
        geometry = self._geometry
        long = geometry.frames_per_block
        item = self._source.item(index, self._request)
        start, wanted = self._excerpt.span(part, item.frames, geometry, rng)
        frames = item.read(start, wanted)
        if len(frames) < min(wanted, long) and start > 0:
            # The container promised what is not there.
            if part > 0:
                return None
            frames = item.read(0, wanted)
        if len(frames) == 0:
            raise MediaError(self._source.name(index), "no frame of it can be decoded")
        blocks = max(1, len(frames) // long)
        _, height, width, _ = frames.shape
        bucket = nearest_size(height, width, geometry.sizes)
        size = geometry.sizes[bucket]
        window = self._crop.window(height, width, size, rng)
        pixels = window.show(frames[: blocks * long], size)
        # A picture or a clip shorter than a block fills it with its last frame.
        if len(pixels) < blocks * long:
            pixels = pixels[np.minimum(np.arange(blocks * long), len(pixels) - 1)]
        return Document(
            pixels=pixels.reshape(blocks, long, *pixels.shape[1:]),
            bucket=bucket,
            name=self._source.name(index),
            index=index,
            parts=self._excerpt.parts(item.frames, geometry),
            tail_frames=self._excerpt.left_over(part, item.frames, geometry),
            missing=item.missing,
        )
