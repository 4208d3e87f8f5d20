"""Documents to packed batches, as Grain datasets.

Importing Grain imports jax where that is installed, so this module is imported when the first
iterator is made and not before.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from elastictok.data._document import Document, DocumentMaker, Failure
from elastictok.data._errors import MediaError
from elastictok.data._order import EpochOrder
from elastictok.data._types import Geometry

# Grain counts positions in this range; no run comes near its end.
_ENDLESS = 2**62


@dataclasses.dataclass(frozen=True)
class Stream:
    """One kind of documents and how much of the blocks it gets.

    **Arguments:**

    - `order`: which items, one after the other.
    - `maker`: makes a document of an item.
    - `share`: of all blocks, above 0.
    - `seed`: of what the maker draws.
    """

    order: EpochOrder
    maker: DocumentMaker
    share: float
    seed: int


def batches(
    streams: Sequence[Stream],
    geometry: Geometry,
    *,
    batch_size: int,
    workers: int,
) -> grain.DatasetIterator:
    """An endless iterator of batches, made ahead of time by a thread or by worker processes.

    Elements are dictionaries: `pixels`, `segments`, `valid` as in [`Batch`][]; `drawn`
    `int64[documents 4]`: stream, index, tail frames and missing frames of each document that was
    drawn; `skipped`: (stream, index, reason) of each item that could not be used; `retired`: the
    streams that turned out to have no usable item at all.
    """
    parents = [
        grain.MapDataset.range(_ENDLESS)
        .map(stream.order)
        .random_map(stream.maker, seed=stream.seed)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        for stream in streams
    ]
    packed = _PackedDataset(
        parents,
        [len(stream.order.items) for stream in streams],
        [stream.share for stream in streams],
        geometry,
        batch_size,
    )
    if workers == 0:
        return iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=2))
    if not flags.FLAGS.is_parsed():
        # Grain reads a flag when it starts workers, and outside of absl's own `app.run` nobody
        # has parsed them.
        flags.FLAGS(sys.argv[:1], known_only=True)
    return iter(
        packed.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    )


class _PackedDataset(grain.IterDataset):
    """Whole batches of documents from several streams."""

    def __init__(
        self,
        parents: Sequence[grain.IterDataset],
        items: Sequence[int],
        shares: Sequence[float],
        geometry: Geometry,
        batch_size: int,
    ):
        super().__init__(parents)
        self._items = tuple(items)
        self._shares = tuple(shares)
        self._geometry = geometry
        self._batch_size = batch_size

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(
            [iter(parent) for parent in self._parents],
            self._items,
            self._shares,
            self._geometry,
            self._batch_size,
        )


class _PackedIterator(grain.DatasetIterator):
    """Draws documents by running share of blocks and packs them first-fit into the rows of a
    batch. The first one that fits nowhere opens the next batch.

    The state is that from before this last document was drawn, which is then drawn again.
    """

    def __init__(
        self,
        parents: Sequence[grain.DatasetIterator],
        items: Sequence[int],
        shares: Sequence[float],
        geometry: Geometry,
        batch_size: int,
    ):
        super().__init__(parents)
        self._items = items
        self._shares = shares
        self._geometry = geometry
        self._batch_size = batch_size
        self._blocks = [0] * len(parents)
        self._retired = [False] * len(parents)
        self._waiting: _Drawn | None = None
        self._state = self._now()

    def __next__(self) -> dict[str, Any]:
        packer = _Packer(self._geometry, self._batch_size)
        while True:
            if self._waiting is None:
                self._state = self._now()
                self._waiting = self._draw()
            if not packer.add(self._waiting):
                return packer.result()
            self._waiting = None

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._blocks = list(state["blocks"])
        self._retired = list(state["retired"])
        self._waiting = None
        self._state = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            "parents": [parent.get_state() for parent in self._parents],
            "blocks": list(self._blocks),
            "retired": list(self._retired),
        }

    def _draw(self) -> "_Drawn":
        """The next document, of the stream that is furthest behind its share."""
        failures: list[tuple[int, Failure]] = []
        retired: list[int] = []
        while not all(self._retired):
            stream = self._furthest_behind()
            document = self._good_document(stream, failures)
            if document is not None:
                self._blocks[stream] += len(document.pixels)
                return _Drawn(stream, document, tuple(failures), tuple(retired))
            self._retired[stream] = True
            retired.append(stream)
        _, first = failures[0]
        reason = f"{first.reason}; none of the {sum(self._items)} files here can be used"
        raise MediaError(first.name, reason)

    def _furthest_behind(self) -> int:
        """Never lets a share of the blocks be off by more than one document."""
        active = [stream for stream, retired in enumerate(self._retired) if not retired]
        total = sum(self._blocks[stream] for stream in active)
        shares = sum(self._shares[stream] for stream in active)
        return max(active, key=lambda s: self._shares[s] * total / shares - self._blocks[s])

    def _good_document(self, stream: int, failures: list[tuple[int, Failure]]) -> Document | None:
        """Draws until an item can be used; `None` when every single one has failed."""
        failed = set()
        while len(failed) < self._items[stream]:
            document = next(self._parents[stream])
            if isinstance(document, Document):
                return document
            if document.index not in failed:
                failed.add(document.index)
                failures.append((stream, document))
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
    """A document, what failed on the way to it, and the streams given up because all of it did."""

    stream: int
    document: Document
    failures: tuple[tuple[int, Failure], ...]
    retired: tuple[int, ...]


class _Packer:
    """Fills the rows of one batch."""

    def __init__(self, geometry: Geometry, batch_size: int):
        shape = (batch_size, geometry.blocks)
        self._pixels = np.zeros((*shape, geometry.frames_per_block, *geometry.size, 3), np.uint8)
        self._segments = np.zeros(shape, np.int32)
        self._used = [0] * batch_size
        self._documents = [0] * batch_size
        self._drawn: list[tuple[int, int, int, int]] = []
        self._skipped: list[tuple[int, int, str]] = []
        self._retired: list[int] = []

    def add(self, drawn: _Drawn) -> bool:
        """Puts a document into the first row that has room; false if there is none."""
        document = drawn.document
        blocks = len(document.pixels)
        room = self._segments.shape[1] - blocks
        row = next((row for row, used in enumerate(self._used) if used <= room), None)
        if row is None:
            return False
        span = slice(self._used[row], self._used[row] + blocks)
        self._used[row] += blocks
        self._documents[row] += 1
        self._pixels[row, span] = document.pixels
        self._segments[row, span] = self._documents[row]
        self._drawn.append((drawn.stream, document.index, document.tail_frames, document.missing))
        self._skipped += [(s, failure.index, failure.reason) for s, failure in drawn.failures]
        self._retired += drawn.retired
        return True

    def result(self) -> dict[str, Any]:
        return {
            "pixels": self._pixels,
            "segments": self._segments,
            "valid": self._segments > 0,
            "drawn": np.array(self._drawn, np.int64),
            "skipped": self._skipped,
            "retired": self._retired,
        }
