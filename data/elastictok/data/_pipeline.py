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
    """Documents of one source and how much of the blocks it gets.

    **Arguments:**

    - `order`: which items, one after the other.
    - `maker`: makes documents of an item.
    - `share`: of all blocks, above 0.
    - `seed`: of what the maker draws.
    """

    order: EpochOrder
    maker: DocumentMaker
    share: float
    seed: int

    def document(self, position: int, part: int) -> Document | Failure | None:
        """Part of what the item at a position of the order gives; always the same."""
        # Counter-based, so that any position has numbers of its own at once. They are those that
        # Grain's random_map gives: seeds mean what they meant when it was used here.
        rng = np.random.Generator(np.random.Philox(self.seed, counter=[0, 0, 0, position]))
        return self.maker(self.order(position), part, rng)


def batches(
    streams: Sequence[Stream],
    geometry: Geometry,
    *,
    batch_size: int,
    workers: int,
) -> grain.DatasetIterator:
    """An endless iterator of batches, made ahead of time by a thread or by worker processes.

    Elements are dictionaries: `pixels`, `segments`, `valid`, `names` as in [`Batch`][]; `drawn`
    `int64[documents 5]`: stream, index, blocks, tail frames and missing frames of each document;
    `skipped`: (stream, index, reason) of each item that could not be used; `retired`: the streams
    that turned out to have no usable item at all.
    """
    # Positions, because those are what Grain divides among workers. Shares and packing come after
    # it, in each worker: dividing what was mixed would give every worker documents of one kind.
    parents = [
        grain.MapDataset.range(_ENDLESS).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        for _ in streams
    ]
    packed = _PackedDataset(parents, streams, geometry, batch_size)
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
        streams: Sequence[Stream],
        geometry: Geometry,
        batch_size: int,
    ):
        super().__init__(parents)
        self._streams = tuple(streams)
        self._geometry = geometry
        self._batch_size = batch_size

    def __iter__(self) -> grain.DatasetIterator:
        parents = [iter(parent) for parent in self._parents]
        return _PackedIterator(parents, self._streams, self._geometry, self._batch_size)


class _PackedIterator(grain.DatasetIterator):
    """Draws documents by running share of blocks and packs them first-fit into the rows of an open
    batch, one for each size of frames. The first document that fits nowhere sends its batch off and
    opens the next.

    The state says which documents the open batches hold; they are made again from that.
    """

    def __init__(
        self,
        parents: Sequence[grain.DatasetIterator],
        streams: Sequence[Stream],
        geometry: Geometry,
        batch_size: int,
    ):
        super().__init__(parents)
        self._streams = streams
        self._geometry = geometry
        self._batch_size = batch_size
        self._blocks = [0] * len(streams)
        self._retired = [False] * len(streams)
        # Position and next part of the clip that a stream is in the middle of.
        self._within: list[tuple[int, int] | None] = [None] * len(streams)
        self._open = self._empty()
        self._state = self._now()

    def __next__(self) -> dict[str, Any]:
        while True:
            drawn = self._draw()
            bucket = drawn.document.bucket
            if self._open[bucket].add(drawn):
                continue
            full, self._open[bucket] = self._open[bucket], self._packer(bucket)
            self._open[bucket].add(drawn)
            self._state = self._now()
            return full.result()

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._blocks = list(state["blocks"])
        self._retired = list(state["retired"])
        self._within = [None if at is None else (at[0], at[1]) for at in state["within"]]
        self._open = self._empty()
        for bucket, places in enumerate(state["open"]):
            for stream, position, part in places:
                self._open[bucket].add(self._again(stream, position, part))
        self._state = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            "parents": [parent.get_state() for parent in self._parents],
            "blocks": list(self._blocks),
            "retired": list(self._retired),
            "within": list(self._within),
            "open": [list(packer.places) for packer in self._open],
        }

    def _packer(self, bucket: int) -> "_Packer":
        return _Packer(self._geometry, self._geometry.sizes[bucket], self._batch_size)

    def _empty(self) -> "list[_Packer]":
        return [self._packer(bucket) for bucket in range(len(self._geometry.sizes))]

    def _again(self, stream: int, position: int, part: int) -> "_Drawn":
        document = self._streams[stream].document(position, part)
        if isinstance(document, Document):
            return _Drawn(stream, position, part, document)
        reason = "it is cut off" if document is None else document.reason
        name = f"item {position}" if document is None else document.name
        raise MediaError(
            name, f"{reason}; it could be used when the state was taken that is to be resumed"
        )

    def _draw(self) -> "_Drawn":
        """The next document, of the stream whose turn it is."""
        failures: list[tuple[int, Failure]] = []
        retired: list[int] = []
        while not all(self._retired):
            stream = self._next_stream()
            found = self._good_document(stream, failures)
            if found is not None:
                position, part, document = found
                self._blocks[stream] += len(document.pixels)
                return _Drawn(stream, position, part, document, tuple(failures), tuple(retired))
            self._retired[stream] = True
            retired.append(stream)
        _, first = failures[0]
        total = sum(len(stream.order.items) for stream in self._streams)
        reason = f"{first.reason}; none of the {total} files here can be used"
        raise MediaError(first.name, reason)

    def _next_stream(self) -> int:
        """Never lets a share of the blocks be off by more than one document, the longest possible.

        Of the streams that do not have more than their share, the one that is the first to fall
        behind by a document. Taking the one that is furthest behind would let small shares fall
        behind by nearly two. (Tijdeman, The chairman assignment problem, Discrete Mathematics 32,
        1980, for documents of one length.)
        """
        active = [stream for stream, retired in enumerate(self._retired) if not retired]
        total = sum(self._blocks[stream] for stream in active)
        shares = sum(self._streams[stream].share for stream in active)
        share = {stream: self._streams[stream].share / shares for stream in active}
        # One at least, but for rounding.
        waiting = [s for s in active if self._blocks[s] <= share[s] * total + 1e-9 * (total + 1)]
        return min(waiting, key=lambda s: (self._blocks[s] + self._geometry.blocks) / share[s])

    def _good_document(
        self, stream: int, failures: list[tuple[int, Failure]]
    ) -> tuple[int, int, Document] | None:
        """Draws until an item can be used; `None` when every single one has failed."""
        failed = set()
        while len(failed) < len(self._streams[stream].order.items):
            position, part = self._within[stream] or (next(self._parents[stream]), 0)
            document = self._streams[stream].document(position, part)
            self._within[stream] = None
            if isinstance(document, Document):
                if part + 1 < document.parts:
                    self._within[stream] = (position, part + 1)
                return position, part, document
            if document is not None and document.index not in failed:
                failed.add(document.index)
                failures.append((stream, document))
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn:
    """A document and where it comes from; what failed on the way to it, and the streams given up
    because all of it did."""

    stream: int
    position: int
    part: int
    document: Document
    failures: tuple[tuple[int, Failure], ...] = ()
    retired: tuple[int, ...] = ()


class _Packer:
    """Fills the rows of one batch."""

    def __init__(self, geometry: Geometry, size: tuple[int, int], batch_size: int):
        self._geometry = geometry
        self._size = size
        self._used = [0] * batch_size
        self._documents: list[tuple[int, int, _Drawn]] = []

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Stream, position and part of the documents added."""
        return [(d.stream, d.position, d.part) for _, _, d in self._documents]

    def add(self, drawn: _Drawn) -> bool:
        """Puts a document into the first row that has room; false if there is none."""
        blocks = len(drawn.document.pixels)
        room = self._geometry.blocks - blocks
        row = next((row for row, used in enumerate(self._used) if used <= room), None)
        if row is None:
            return False
        self._documents.append((row, self._used[row], drawn))
        self._used[row] += blocks
        return True

    def result(self) -> dict[str, Any]:
        shape = (len(self._used), self._geometry.blocks)
        # Not of zeros: clearing what is filled anyway takes as long as filling it.
        pixels = np.empty((*shape, self._geometry.frames_per_block, *self._size, 3), np.uint8)
        segments = np.zeros(shape, np.int32)
        names: list[list[str]] = [[] for _ in self._used]
        for row, start, drawn in self._documents:
            span = slice(start, start + len(drawn.document.pixels))
            pixels[row, span] = drawn.document.pixels
            names[row].append(drawn.document.name)
            segments[row, span] = len(names[row])
        for row, used in enumerate(self._used):
            pixels[row, used:] = 0
        every = [drawn for _, _, drawn in self._documents]
        return {
            "pixels": pixels,
            "segments": segments,
            "valid": segments > 0,
            "names": names,
            "drawn": np.array(
                [
                    (
                        d.stream,
                        d.document.index,
                        len(d.document.pixels),
                        d.document.tail_frames,
                        d.document.missing,
                    )
                    for d in every
                ],
                np.int64,
            ),
            "skipped": [(s, f.index, f.reason) for d in every for s, f in d.failures],
            "retired": [stream for d in every for stream in d.retired],
        }
