"""From an item to a document: whole blocks of one size."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from elastictok.data._crop import AbstractCrop
from elastictok.data._errors import MediaError
from elastictok.data._source import AbstractSource, Request
from elastictok.data._types import Geometry


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Blocks of one picture or clip.

    **Arguments:**

    - `pixels`: `uint8[blocks frames height width 3]`.
    - `index`: the item of its source.
    - `tail_frames`: frames that were left over because they fill no block.
    - `missing`: see [`AbstractItem`][].
    """

    pixels: UInt8[np.ndarray, "blocks frames height width 3"]
    index: int
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
    - `crop`: draws the window.
    """

    def __init__(
        self, source: AbstractSource, geometry: Geometry, request: Request, crop: AbstractCrop
    ):
        self._source = source
        self._geometry = geometry
        self._request = request
        self._crop = crop

    def __call__(self, index: int, rng: np.random.Generator) -> Document | Failure:
        try:
            return self._document(index, rng)
        except MediaError as error:
            return Failure(self._source.name(index), index, error.reason)

    def _document(self, index: int, rng: np.random.Generator) -> Document:
        long = self._geometry.frames_per_block
        item = self._source.item(index, self._request)
        whole_blocks = max(1, item.frames // long)
        wanted = min(item.frames, min(whole_blocks, self._geometry.blocks) * long)
        start = int(rng.integers(item.frames - wanted + 1))
        frames = item.read(start, wanted)
        if len(frames) < min(wanted, long) and start > 0:
            # The container promised what is not there.
            frames = item.read(0, wanted)
        if len(frames) == 0:
            raise MediaError(self._source.name(index), "no frame of it can be decoded")
        blocks = max(1, len(frames) // long)
        _, height, width, _ = frames.shape
        window = self._crop.window(height, width, self._geometry.size, rng)
        pixels = window.show(frames[: blocks * long], self._geometry.size)
        left_over = max(0, item.frames - blocks * long)
        # A picture or a clip shorter than a block fills it with its last frame.
        order = np.minimum(np.arange(blocks * long), len(pixels) - 1)
        return Document(
            pixels=pixels[order].reshape(blocks, long, *pixels.shape[1:]),
            index=index,
            tail_frames=left_over if whole_blocks <= self._geometry.blocks else 0,
            missing=item.missing,
        )
