"""Training data from folders or from memory, and where a run stands in it."""

import dataclasses
import functools
import json
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elastictok.data._built import BuiltDataset, is_built
from elastictok.data._cache import Cache
from elastictok.data._crop import AbstractCrop, RandomCrop, WorkingSize
from elastictok.data._document import AbstractExcerpt, DocumentMaker, RandomStretch
from elastictok.data._errors import MediaWarning
from elastictok.data._find import find_media
from elastictok.data._order import EpochOrder
from elastictok.data._report import Damaged, Report, Skipped, Used
from elastictok.data._source import (
    AbstractLibrary,
    AbstractSource,
    Chain,
    ClipSource,
    Files,
    MemorySource,
    PictureSource,
    Request,
)
from elastictok.data._types import Batch, Clip, Geometry

if TYPE_CHECKING:
    import grain

_STATE_VERSION = 2
_CROP = RandomCrop()
_EXCERPT = RandomStretch()
_CACHE_BYTES = 2**30

Folder = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Component:
    """A source and its weight in the mix.

    **Arguments:**

    - `name`: what to call it in messages and reports.
    - `source`: see [`AbstractSource`][].
    - `weight`: its share of the blocks, relative to the weights of the others; 0 leaves it out.
    """

    name: str
    source: AbstractSource
    weight: float | int = 1.0

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(
                f"the weight of {self.name} is {self.weight}; it must be a number of at least 0"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class PackedDataset:
    """Endless batches of packed sequences, mixed of several sources of pictures and clips.

    Each use of a file is a *document*: for a picture one block, its frame repeated; for a clip,
    resampled to `geometry.fps`, whole blocks of it, at most `geometry.blocks`. A clip shorter than
    a block fills it with its last frame; frames that are left over because they fill no block are
    counted. One window is drawn per clip. Documents are packed first-fit into the rows of a batch
    and never cut.

    An iterator goes over all items of a source in random order, then again in another order with
    other windows, and so on. Sources take turns by their running share of the blocks, which is
    never off by more than the longest document; in every process, and in every worker.

    The same settings and files give the same batches. Nothing else matters: not the speed of the
    machine, nor what is cached.

    **Arguments:**

    - `components`: the sources and their weights.
    - `geometry`: see [`Geometry`][].
    - `crop`: see [`RandomCrop`][] and [`CentreCrop`][].
    - `excerpt`: what is taken of a clip: see [`RandomStretch`][] and [`WholeClip`][].
    - `batch_size`: sequences in a batch.
    - `seed`: of the order, the stretches and the windows.
    - `shard`: (index, count) of this process if several read the same data. The items of each
        are its own; together they are all.
    - `workers`: processes that prepare batches; 0 for one thread of this process. Each worker
        packs batches of its own, so their number is part of what a run must keep to resume.
        Programs that use workers must protect their main module by
        `if __name__ == "__main__":`.

    **Raises:** `ValueError` for settings that contradict each other or the number of items.
    """

    components: tuple[Component, ...]
    geometry: Geometry
    crop: AbstractCrop = _CROP
    excerpt: AbstractExcerpt = _EXCERPT
    batch_size: int = 8
    seed: int = 0
    shard: tuple[int, int] = (0, 1)
    workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 or more")
        index, count = self.shard
        if not 0 <= index < count:
            raise ValueError(f"shard is {self.shard}; it must be (index, count), index < count")
        if not self.used:
            raise ValueError("there is nothing to read: no component has a weight above 0")
        for component in self.used:
            if len(component.source) < count:
                raise ValueError(
                    f"{len(component.source)} {component.name} cannot be divided among {count} "
                    "processes; use fewer processes or more files, or leave them out"
                )

    @property
    def used(self) -> tuple[Component, ...]:
        """The components whose weight is not 0."""
        return tuple(component for component in self.components if component.weight > 0)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def settings(self) -> dict[str, Any]:
        """All that the batches depend on, as JSON: saved with the state of an iterator."""
        settings = {
            "size": self.geometry.size,
            "buckets": self.geometry.buckets,
            "frames_per_block": self.geometry.frames_per_block,
            "blocks": self.geometry.blocks,
            "fps": None if self.geometry.fps is None else float(self.geometry.fps),
            "crop": repr(self.crop),
            "excerpt": repr(self.excerpt),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shard": self.shard,
            "workers": self.workers,
            "weights": [float(component.weight) for component in self.used],
            "data": [component.source.fingerprint() for component in self.used],
        }
        return json.loads(json.dumps(settings))

    def _open(self) -> "grain.DatasetIterator":
        # Not at the top: it takes a second or two, and brings jax along where that is installed.
        from elastictok.data import _pipeline

        request = Request(
            fps=self.geometry.fps,
            frames=self.geometry.frames,
            working=WorkingSize(self.geometry.sizes, self.crop.smallest_scale),
            in_order=self.excerpt.in_order,
        )
        # Every component draws numbers of its own, and so does every process. Orders are the same
        # for all processes, since each has its own items.
        streams = [
            _pipeline.Stream(
                order=EpochOrder(len(component.source), self.shard, _seed(self.seed, place)),
                maker=DocumentMaker(
                    component.source, self.geometry, request, self.crop, self.excerpt
                ),
                share=float(component.weight),
                seed=_seed(self.seed, place, self.shard[0]),
            )
            for place, component in enumerate(self.used)
        ]
        return _pipeline.batches(
            streams, self.geometry, batch_size=self.batch_size, workers=self.workers
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
        self._components = dataset.used
        # Closed at the latest when the interpreter begins to end. Grain closes its iterators later
        # than that, when half of what it needs for it is gone, and prints exceptions.
        self._stream = _Stream(dataset._open())
        self._end = weakref.finalize(self, self._stream.close)
        self._counts = [_Count(len(component.source)) for component in self._components]
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
            names=tuple(map(tuple, element["names"])),
        )
        for text in news:
            warnings.warn(text, MediaWarning, stacklevel=2)
        return batch

    @property
    def geometry(self) -> Geometry:
        """Of the batches."""
        return self._dataset.geometry

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        return self._dataset.settings()

    def _record(self, element: dict[str, Any]) -> list[str]:
        """Counts what went into a batch; returns what is worth a warning."""
        news = []
        for stream, index, blocks, tail_frames, missing in element["drawn"].tolist():
            self._counts[stream].add(index, blocks)
            self._tail_frames += tail_frames
            if missing:
                self._damaged[stream, index] = Damaged(self._name(stream, index), missing)
        for stream, index, reason in element["skipped"]:
            if (stream, index) not in self._skipped:
                self._skipped[stream, index] = Skipped(self._name(stream, index), reason)
                news.append(f"skipped {self._name(stream, index)}: {reason}")
        for stream in element["retired"]:
            name = self._components[stream].name
            news.append(f"none of the {name} can be used; the rest of the run does without")
        return news

    def _name(self, stream: int, index: int) -> str:
        return self._components[stream].source.name(index)

    def report(self) -> Report:
        """What has been used and skipped since this iterator was made."""
        return Report(
            components=tuple(
                Used(component.name, count.items, count.documents, count.blocks)
                for component, count in zip(self._components, self._counts, strict=True)
            ),
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
                + "; ".join(self._difference(name, theirs.get(name)) for name in differ)
                + ". Resume with the same, or start anew without the state"
            )
        self._stream.open().set_state(state["stream"])

    def _difference(self, name: str, theirs: Any) -> str:
        ours = self._settings[name]
        if name != "data":
            return f"{name} was {theirs} and is now {ours}"
        if not isinstance(theirs, list) or len(theirs) != len(ours):
            return "other kinds of data are mixed"
        return "; ".join(
            f"the {component.name} are not the same"
            for component, one, other in zip(self._components, theirs, ours, strict=True)
            if one != other
        )

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


class _Count:
    """How much was used of a component."""

    def __init__(self, items: int):
        self._seen = np.zeros(items // 8 + 1, np.uint8)  # a bit for each
        self.items = 0
        self.documents = 0
        self.blocks = 0

    def add(self, index: int, blocks: int) -> None:
        byte, bit = divmod(index, 8)
        if not self._seen[byte] >> bit & 1:
            self._seen[byte] |= 1 << bit
            self.items += 1
        self.documents += 1
        self.blocks += blocks


def load_folders(
    folders: Folder | Sequence[Folder] | Mapping[Folder, float | int],
    geometry: Geometry,
    *,
    crop: AbstractCrop = _CROP,
    excerpt: AbstractExcerpt = _EXCERPT,
    batch_size: int = 8,
    image_share: float | int = 0.5,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
    cache_bytes: int = _CACHE_BYTES,
) -> PackedDataset:
    """Training data from folders of pictures and clips, and from data sets that were built.

    Pictures, and clips that are short or few, are kept in memory after they were first decoded,
    no larger than the crops can use. Decoding is the slow part, so data that fits is fast from
    its second epoch on.

    **Arguments:**

    - `folders`: one or several, with files as [`find_media`][] finds them or made by [`build`][];
        taken together, so that a folder of twice as many files is seen twice as often. Or a
        mapping from folders to weights: each then gets that share of the blocks.
    - `image_share`: the share of the blocks that pictures get, of a folder (or of several without
        weights) that holds pictures and clips; 0 or 1 leaves out one of them.
    - `geometry`, `crop`, `excerpt`, `batch_size`, `seed`, `shard`, `workers`: see
        [`PackedDataset`][].
    - `cache_bytes`: memory for decoded files, divided among the workers. Beside it there are, for
        the thread or each worker, four batches and the file in hand.

    **Returns:** a [`PackedDataset`][] to iterate over.

    **Raises:** `MediaError` as [`find_media`][] does, and for a data set that is damaged or not
    complete; `ValueError` as [`PackedDataset`][] does.
    """
    cache = Cache(cache_bytes // max(1, workers))
    components = []
    for label, weight, group in _groups(folders):
        pictures, clips = _libraries(group)
        components += _by_kind(
            label, weight, PictureSource(pictures, cache), ClipSource(clips, cache), image_share
        )
    return PackedDataset(
        components=tuple(components),
        geometry=geometry,
        crop=crop,
        excerpt=excerpt,
        batch_size=batch_size,
        seed=seed,
        shard=shard,
        workers=workers,
    )


def load_clips(
    clips: Sequence[Clip],
    geometry: Geometry,
    *,
    crop: AbstractCrop = _CROP,
    excerpt: AbstractExcerpt = _EXCERPT,
    batch_size: int = 8,
    image_share: float | int = 0.5,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> PackedDataset:
    """Training data from pictures and clips in memory, through the same pipeline as files.

    **Arguments:**

    - `clips`: pictures (those without `fps`) and clips, mixed as you like.
    - `image_share`: see [`load_folders`][].
    - `geometry`, `crop`, `excerpt`, `batch_size`, `seed`, `shard`, `workers`: see
        [`PackedDataset`][].

    **Returns:** a [`PackedDataset`][] to iterate over.

    **Raises:** `ValueError` as [`PackedDataset`][] does.
    """
    pictures = MemorySource([clip for clip in clips if clip.picture])
    others = MemorySource([clip for clip in clips if not clip.picture])
    return PackedDataset(
        components=tuple(_by_kind("", 1.0, pictures, others, image_share)),
        geometry=geometry,
        crop=crop,
        excerpt=excerpt,
        batch_size=batch_size,
        seed=seed,
        shard=shard,
        workers=workers,
    )


def _groups(
    folders: Folder | Sequence[Folder] | Mapping[Folder, float | int],
) -> list[tuple[str, float | int, list[Path]]]:
    """What is mixed by weight: a label, the weight, folders that are taken together."""
    if isinstance(folders, Mapping):
        if not folders:
            raise ValueError("no folder was given; give at least one folder of pictures or clips")
        return [(str(folder), weight, [Path(folder)]) for folder, weight in folders.items()]
    single = isinstance(folders, str | os.PathLike)
    return [("", 1.0, [Path(folder) for folder in ([folders] if single else folders)])]


def _libraries(folders: Sequence[Path]) -> tuple[AbstractLibrary, AbstractLibrary]:
    """Pictures and clips of folders, in the order of these."""
    built = [BuiltDataset(folder) for folder in folders if is_built(folder)]
    plain = [folder for folder in folders if not is_built(folder)]
    pictures: list[AbstractLibrary] = [dataset.pictures for dataset in built]
    clips: list[AbstractLibrary] = [dataset.clips for dataset in built]
    if plain or not built:
        media = find_media(plain)
        pictures.append(Files(media.pictures))
        clips.append(Files(media.clips))
    return Chain(pictures), Chain(clips)


def _by_kind(
    label: str,
    weight: float | int,
    pictures: AbstractSource,
    clips: AbstractSource,
    image_share: float | int,
) -> list[Component]:
    """Divides a weight between pictures and clips, if there are both."""
    if not 0 <= image_share <= 1:
        raise ValueError(f"image_share is {image_share}; it must lie between 0 and 1")
    of = f" of {label}" if label else ""
    both = [
        Component(f"pictures{of}", pictures, weight * image_share),
        Component(f"clips{of}", clips, weight * (1 - image_share)),
    ]
    filled = [component for component in both if len(component.source)]
    if not filled:
        raise ValueError(f"there are neither pictures nor clips to read{of}")
    if len(filled) == 1 and 0 < image_share < 1:
        return [dataclasses.replace(filled[0], weight=weight)]
    if weight > 0 and not any(component.weight > 0 for component in filled):
        raise ValueError(
            f"image_share is {image_share}, which leaves out all there is{of} "
            f"({filled[0].name}); leave it at its default"
        )
    return filled
