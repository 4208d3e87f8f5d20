"""Training data from folders or from memory, and where a run stands in it."""

import dataclasses
import functools
import json
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from elastictok.data._cache import Cache
from elastictok.data._crop import AbstractCrop, RandomCrop, WorkingSize
from elastictok.data._document import DocumentMaker
from elastictok.data._errors import MediaWarning
from elastictok.data._find import find_media
from elastictok.data._order import EpochOrder
from elastictok.data._report import Damaged, Report, Skipped
from elastictok.data._source import AbstractSource, ClipFiles, MemorySource, PictureFiles, Request
from elastictok.data._types import Batch, Clip, Geometry

if TYPE_CHECKING:
    import grain

_STATE_VERSION = 1
_CROP = RandomCrop()


@dataclasses.dataclass(frozen=True, eq=False)
class PackedDataset:
    """Endless batches of packed sequences, of pictures and clips.

    Each use of a file is a *document*: for a picture one block, its frame repeated; for a clip,
    resampled to `geometry.fps`, a random stretch of as many whole blocks as it has, at most
    `geometry.blocks`. A clip shorter than a block fills it with its last frame; frames that are
    left over because they fill no block are counted. One window is drawn per document. Documents
    are packed first-fit into the rows of a batch and never cut.

    An iterator goes over all items in random order, then again in another order with other
    windows, and so on. Pictures and clips take turns by their running share of the blocks, which
    is never off by more than one document; with workers, in each of them.

    The same settings and files give the same batches. Nothing else matters: not the speed of the
    machine, nor what is cached.

    **Arguments:**

    - `pictures`, `clips`: the sources; at least one must have items.
    - `geometry`: see [`Geometry`][].
    - `crop`: see [`RandomCrop`][] and [`CentreCrop`][].
    - `batch_size`: sequences in a batch.
    - `image_share`: the share of all blocks that pictures get, if there are clips too; 0 or 1
        leaves out one of them.
    - `seed`: of the order and of the windows.
    - `shard`: (index, count) of this process if several read the same data. The items of each
        are its own; together they are all.
    - `workers`: processes that prepare batches; 0 for one thread of this process. Each worker
        packs batches of its own, so their number is part of what a run must keep to resume.
        Programs that use workers must protect their main module by
        `if __name__ == "__main__":`.

    **Raises:** `ValueError` for settings that contradict each other or the number of items.
    """

    pictures: AbstractSource
    clips: AbstractSource
    geometry: Geometry
    crop: AbstractCrop
    batch_size: int = 8
    image_share: float | int = 0.5
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share is {self.image_share}; it must lie between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 or more")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard is {self.shard}; it must be (index, count), index < count")
        if not len(self.pictures) + len(self.clips):
            raise ValueError("there are neither pictures nor clips to read")
        used = self._shares()
        if not used:
            kind = "clips" if len(self.clips) else "pictures"
            raise ValueError(
                f"image_share is {self.image_share}, which leaves out all there is ({kind}); "
                "leave it at its default"
            )
        for name, _, source in used:
            if len(source) < count:
                raise ValueError(
                    f"{len(source)} {name} cannot be divided among {count} processes; use fewer "
                    f"processes or more files, or leave them out (image_share)"
                )

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def settings(self) -> dict[str, Any]:
        """All that the batches depend on, as JSON: saved with the state of an iterator."""
        settings = {
            "size": self.geometry.size,
            "frames_per_block": self.geometry.frames_per_block,
            "blocks": self.geometry.blocks,
            "fps": None if self.geometry.fps is None else float(self.geometry.fps),
            "crop": repr(self.crop),
            "batch_size": self.batch_size,
            "image_share": float(self.image_share),
            "seed": self.seed,
            "shard": self.shard,
            "workers": self.workers,
            "pictures": self.pictures.fingerprint(),
            "clips": self.clips.fingerprint(),
        }
        return json.loads(json.dumps(settings))

    def _shares(self) -> list[tuple[str, float, AbstractSource]]:
        """The sources that are used, with their share of the blocks."""
        both = [
            ("pictures", float(self.image_share), self.pictures),
            ("clips", 1 - float(self.image_share), self.clips),
        ]
        filled = [entry for entry in both if len(entry[2])]
        if len(filled) == 1 and 0 < self.image_share < 1:
            return [(filled[0][0], 1.0, filled[0][2])]
        return [entry for entry in filled if entry[1] > 0]

    def _open(self) -> "grain.DatasetIterator":
        # Not at the top: it takes a second or two, and brings jax along where that is installed.
        from elastictok.data import _pipeline

        request = Request(
            fps=self.geometry.fps,
            frames=self.geometry.frames,
            working=WorkingSize(self.geometry.size, self.crop.smallest_scale),
        )
        streams = []
        for name, share, source in self._shares():
            # Every kind draws numbers of its own, and so does every process. Orders are the same
            # for all, since each has its own items.
            kind = ("pictures", "clips").index(name)
            streams.append(
                _pipeline.Stream(
                    order=EpochOrder(len(source), self.shard, _seed(self.seed, kind)),
                    maker=DocumentMaker(source, self.geometry, request, self.crop),
                    share=share,
                    seed=_seed(self.seed, kind, self.shard[0]),
                )
            )
        return _pipeline.batches(
            streams,
            self.geometry,
            batch_size=self.batch_size,
            workers=self.workers,
        )


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class BatchIterator(Iterator[Batch]):
    """Batches without end, and where they stand. Made by iterating over a [`PackedDataset`][].

    Batches are prepared ahead of time. Close the iterator when done, or use it in a `with`
    statement: it holds a thread or processes. A file that cannot be used is skipped with one
    [`MediaWarning`][] when the batch for which it was tried is handed out.
    """

    def __init__(self, dataset: PackedDataset):
        self._dataset = dataset
        self._sources = dataset._shares()
        # Closed at the latest when the interpreter begins to end. Grain closes its iterators later
        # than that, when half of what it needs for it is gone, and prints exceptions.
        self._stream = _Stream(dataset._open())
        self._end = weakref.finalize(self, self._stream.close)
        self._used = [bytearray(len(source)) for _, _, source in self._sources]
        self._documents = 0
        self._tail_frames = 0
        self._skipped: dict[tuple[int, int], Skipped] = {}
        self._damaged: dict[tuple[int, int], Damaged] = {}

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def __next__(self) -> Batch:
        """The next batch; it is the caller's to keep and to change.

        **Raises:** `MediaError` if no file at all can be used.
        """
        element = next(self._stream.open())
        news = self._record(element)
        # Copies, because those of a worker lie in memory that it shares, which must not outlive it.
        shared = self._dataset.workers > 0
        batch = Batch(
            pixels=np.array(element["pixels"], copy=shared or None),
            segments=np.array(element["segments"], copy=shared or None),
            valid=np.array(element["valid"], copy=shared or None),
        )
        for text in news:
            warnings.warn(text, MediaWarning, stacklevel=2)
        return batch

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        return self._dataset.settings()

    def _record(self, element: dict[str, Any]) -> list[str]:
        """Counts what went into a batch; returns what is worth a warning."""
        news = []
        for stream, index, tail_frames, missing in element["drawn"].tolist():
            self._used[stream][index] = 1
            self._documents += 1
            self._tail_frames += tail_frames
            if missing:
                self._damaged[stream, index] = Damaged(self._name(stream, index), missing)
        for stream, index, reason in element["skipped"]:
            if (stream, index) not in self._skipped:
                self._skipped[stream, index] = Skipped(self._name(stream, index), reason)
                news.append(f"skipped {self._name(stream, index)}: {reason}")
        for stream in element["retired"]:
            kind = self._sources[stream][0]
            news.append(f"none of the {kind} can be used; the rest of the run does without")
        return news

    def _name(self, stream: int, index: int) -> str:
        return self._sources[stream][2].name(index)

    def report(self) -> Report:
        """What has been used and skipped since this iterator was made."""
        counts = {
            name: sum(used) for (name, _, _), used in zip(self._sources, self._used, strict=True)
        }
        return Report(
            pictures=counts.get("pictures", 0),
            clips=counts.get("clips", 0),
            documents=self._documents,
            tail_frames=self._tail_frames,
            skipped=tuple(self._skipped.values()),
            damaged=tuple(self._damaged.values()),
        )

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, for `set_state` of another one; can be written as JSON."""
        return {
            "version": _STATE_VERSION,
            "settings": self._settings,
            "stream": self._stream.open().get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues with the batch that would have come next when the state was taken.

        **Raises:** `ValueError` if it was taken with other settings or other files, naming them.
        """
        version = state.get("version")
        if version != _STATE_VERSION:
            raise ValueError(
                f"this state of a data iterator has the version {version}, and only "
                f"{_STATE_VERSION} can be read; use the elastictok that wrote it"
            )
        theirs = state["settings"]
        differ = [name for name, ours in self._settings.items() if theirs.get(name) != ours]
        if differ:
            raise ValueError(
                "this state of a data iterator belongs to other data or settings: "
                + "; ".join(_difference(name, theirs.get(name), self._settings) for name in differ)
                + ". Resume with the same, or start anew without the state"
            )
        self._stream.open().set_state(state["stream"])

    def close(self) -> None:
        """Ends the thread or the worker processes. The iterator cannot be used any more."""
        self._end()


class _Stream:
    """A Grain iterator that is let go of when it is closed."""

    def __init__(self, batches: "grain.DatasetIterator"):
        self._batches: grain.DatasetIterator | None = batches

    def open(self) -> "grain.DatasetIterator":
        if self._batches is None:
            raise ValueError("this iterator was closed; make another one and give it the state")
        return self._batches

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def _difference(name: str, theirs: object, ours: dict[str, Any]) -> str:
    if name in ("pictures", "clips"):
        return f"the {name} are not the same"
    return f"{name} was {theirs} and is now {ours[name]}"


def load_folders(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    geometry: Geometry,
    *,
    crop: AbstractCrop = _CROP,
    batch_size: int = 8,
    image_share: float | int = 0.5,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    cache_bytes: int = 2**30,
) -> PackedDataset:
    """Training data from folders of pictures and clips.

    Pictures, and clips that are short or few, are kept in memory after they were first decoded,
    no larger than the crops can use. Decoding is the slow part, so a data set that fits is
    fast from its second epoch on.

    **Arguments:**

    - `folders`: as for [`find_media`][].
    - `geometry`, `crop`, `batch_size`, `image_share`, `seed`, `shard`, `workers`: see
        [`PackedDataset`][].
    - `cache_bytes`: memory for decoded files, divided among the workers. Beside it there are, for
        the thread or each worker, four batches and the file in hand.

    **Returns:** a [`PackedDataset`][] to iterate over.

    **Raises:** `MediaError` as [`find_media`][] does; `ValueError` as [`PackedDataset`][] does.
    """
    media = find_media(folders)
    cache = Cache(cache_bytes // max(1, workers))
    return PackedDataset(
        pictures=PictureFiles(media.pictures, cache),
        clips=ClipFiles(media.clips, cache),
        geometry=geometry,
        crop=crop,
        batch_size=batch_size,
        image_share=image_share,
        seed=seed,
        shard=shard,
        workers=workers,
    )


def load_clips(
    clips: Sequence[Clip],
    geometry: Geometry,
    *,
    crop: AbstractCrop = _CROP,
    batch_size: int = 8,
    image_share: float | int = 0.5,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> PackedDataset:
    """Training data from pictures and clips in memory, through the same pipeline as files.

    **Arguments:**

    - `clips`: pictures (those without `fps`) and clips, mixed as you like.
    - `geometry`, `crop`, `batch_size`, `image_share`, `seed`, `shard`, `workers`: see
        [`PackedDataset`][].

    **Returns:** a [`PackedDataset`][] to iterate over.

    **Raises:** `ValueError` as [`PackedDataset`][] does.
    """
    return PackedDataset(
        pictures=MemorySource([clip for clip in clips if clip.picture]),
        clips=MemorySource([clip for clip in clips if not clip.picture]),
        geometry=geometry,
        crop=crop,
        batch_size=batch_size,
        image_share=image_share,
        seed=seed,
        shard=shard,
        workers=workers,
    )
