"""Where documents come from: random access to pictures or clips, by index.

A source knows files or arrays; it knows nothing of blocks, crops or batches.
"""

import abc
import bisect
import dataclasses
import functools
import hashlib
import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from elastictok.data._cache import Cache
from elastictok.data._clip import ClipReader, Probe, probe_clip, read_clip, read_stretch, shown
from elastictok.data._crop import WorkingSize, resize
from elastictok.data._errors import MediaError
from elastictok.data._picture import read_picture
from elastictok.data._stored import Stored
from elastictok.data._types import Clip

_PROBE_BYTES = 1024  # more than one takes


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of every item of a source.

    **Arguments:**

    - `fps`: the rate that clips are resampled to; `None` for the average rate of each.
    - `frames`: the most frames that are read of an item at once.
    - `working`: the size that frames may be scaled down to.
    - `in_order`: whether stretches of an item are read one after the other, from its beginning on.
    """

    fps: float | int | None
    frames: int
    working: WorkingSize
    in_order: bool = False


class AbstractItem(abc.ABC):
    """A picture or clip, resampled, of which any stretch can be read."""

    @property
    @abc.abstractmethod
    def frames(self) -> int:
        """Number of frames, at least 1; of a damaged clip there may be fewer in the end."""

    @property
    @abc.abstractmethod
    def missing(self) -> int:
        """Frames that are known not to be there although promised."""

    @abc.abstractmethod
    def read(self, start: int, count: int) -> UInt8[np.ndarray, "frames height width 3"]:
        """Frames `start` to `start + count`; fewer, perhaps none, where the clip is damaged.

        **Raises:** `MediaError`.
        """


class AbstractSource(abc.ABC):
    """Random access to pictures, or to clips. Instances are sent to worker processes."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What to call an item in messages."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes when items are added, removed or put in another order."""

    @abc.abstractmethod
    def item(self, index: int, request: Request) -> AbstractItem:
        """Opens an item.

        **Raises:** `MediaError` if it cannot be used.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class _Frames(AbstractItem):
    """An item that is in memory, with the stored frame that each of its frames shows."""

    stored: UInt8[np.ndarray, "stored height width 3"]
    order: np.ndarray
    lost: int = 0

    @property
    def frames(self) -> int:
        return len(self.order)

    @property
    def missing(self) -> int:
        return self.lost

    def read(self, start: int, count: int) -> UInt8[np.ndarray, "frames height width 3"]:
        order = self.order[start : start + count]
        if len(order) and order[-1] - order[0] == len(order) - 1 and (np.diff(order) == 1).all():
            return self.stored[order[0] : order[-1] + 1]
        return self.stored[order]


@dataclasses.dataclass(frozen=True, eq=False)
class _LongClip(AbstractItem):
    """A clip that is decoded stretch by stretch, by a function of first frame and count."""

    count: int
    decode: Callable[[int, int], np.ndarray]

    @property
    def frames(self) -> int:
        return self.count

    @property
    def missing(self) -> int:
        return 0

    def read(self, start: int, count: int) -> UInt8[np.ndarray, "frames height width 3"]:
        return self.decode(start, count)


class MemorySource(AbstractSource):
    """Pictures or clips in memory. At first use of each, a copy no larger than the crops can use
    is made and kept.

    **Arguments:**

    - `clips`: see [`Clip`][].
    """

    def __init__(self, clips: Sequence[Clip]):
        self._clips = tuple(clips)
        self._small: dict[tuple[int, WorkingSize], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, index: int) -> str:
        clip = self._clips[index]
        return f"item {index}" if clip.path is None else str(clip.path)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for clip in self._clips:
            pixels = zlib.crc32(np.ascontiguousarray(clip.frames).data)
            digest.update(f"{clip.frames.shape} {clip.fps} {pixels}\n".encode())
        return digest.hexdigest()

    def item(self, index: int, request: Request) -> AbstractItem:
        clip = self._clips[index]
        stored = self._stored(index, request.working)
        order = np.arange(len(stored))
        if clip.fps is not None and request.fps is not None:
            order = shown(len(stored), clip.fps, request.fps)
        return _Frames(stored, order, clip.missing)

    def _stored(
        self, index: int, working: WorkingSize
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        frames = self._clips[index].frames
        size = working(*frames.shape[1:3])
        if size == frames.shape[1:3]:
            return frames
        if (index, working) not in self._small:
            self._small[index, working] = np.stack([resize(frame, size) for frame in frames])
        return self._small[index, working]


class AbstractLibrary(abc.ABC):
    """Random access to encoded pictures, or to encoded clips. Instances are sent to workers."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """What to call a file in messages."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes when files are added, removed or put in another order."""

    @abc.abstractmethod
    def stored(self, index: int) -> Stored:
        """The file, or its bytes.

        **Raises:** `MediaError` if it cannot be read.
        """


class Files(AbstractLibrary):
    """Files on a disk.

    **Arguments:**

    - `paths`: all pictures, or all clips.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def fingerprint(self) -> str:
        # Of the names without their folders, so that a run can be resumed after a move.
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(path.name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def stored(self, index: int) -> Stored:
        return self._paths[index]


class Chain(AbstractLibrary):
    """Several libraries as one, one after the other.

    **Arguments:**

    - `libraries`: all of pictures, or all of clips.
    """

    def __init__(self, libraries: Sequence[AbstractLibrary]):
        self._libraries = tuple(library for library in libraries if len(library))
        self._ends = list(itertools.accumulate(map(len, self._libraries)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        library, place = self._find(index)
        return library.name(place)

    def fingerprint(self) -> str:
        parts = [library.fingerprint() for library in self._libraries]
        return (
            parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()
        )

    def stored(self, index: int) -> Stored:
        library, place = self._find(index)
        return library.stored(place)

    def _find(self, index: int) -> tuple[AbstractLibrary, int]:
        which = bisect.bisect_right(self._ends, index)
        return self._libraries[which], index - (self._ends[which - 1] if which else 0)


class PictureSource(AbstractSource):
    """Encoded pictures, decoded when asked for and kept at working size.

    **Arguments:**

    - `library`: where the encoded pictures are.
    - `cache`: where decoded ones are kept.
    """

    def __init__(self, library: AbstractLibrary, cache: Cache):
        self._library = library
        self._cache = cache
        self._broken: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._library)

    def name(self, index: int) -> str:
        return self._library.name(index)

    def fingerprint(self) -> str:
        return self._library.fingerprint()

    def item(self, index: int, request: Request) -> AbstractItem:
        if index in self._broken:
            raise MediaError(self.name(index), self._broken[index])
        key = (id(self), index, request)
        pixels = self._cache.get(key)
        if pixels is None:
            try:
                pixels = read_picture(self._library.stored(index), working=request.working)
            except MediaError as error:
                self._broken[index] = error.reason
                raise
            self._cache.put(key, pixels, pixels.nbytes)
        return _Frames(pixels[None], np.zeros(1, np.int64))


class ClipSource(AbstractSource):
    """Encoded clips. Short ones, and all if they fit into the cache together, are decoded whole and
    kept at working size; of others, only the stretch that is asked for is decoded.

    Which of the two depends on the file and the settings alone, never on what is in the cache.

    **Arguments:**

    - `library`: where the encoded clips are.
    - `cache`: where decoded ones are kept.
    """

    def __init__(self, library: AbstractLibrary, cache: Cache):
        self._library = library
        self._cache = cache
        self._broken: dict[int, str] = {}
        # The clip that is being read in order. A source draws from one at a time.
        self._reader: tuple[tuple, ClipReader] | None = None
        # What was learnt last, for the next part of the same clip.
        self._probed: tuple[tuple, Probe] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_probed": None}

    def __len__(self) -> int:
        return len(self._library)

    def name(self, index: int) -> str:
        return self._library.name(index)

    def fingerprint(self) -> str:
        return self._library.fingerprint()

    def item(self, index: int, request: Request) -> AbstractItem:
        if index in self._broken:
            raise MediaError(self.name(index), self._broken[index])
        try:
            return self._item(index, request)
        except MediaError as error:
            self._broken[index] = error.reason
            raise

    def _item(self, index: int, request: Request) -> AbstractItem:
        key = (id(self), index, request)
        known = self._cache.get(key)
        if isinstance(known, _Frames):
            return known
        if known is None and self._probed is not None and self._probed[0] == key:
            known = self._probed[1]
        stored = None
        if isinstance(known, Probe):
            probe = known
        else:
            stored = self._library.stored(index)
            probe = probe_clip(stored)
            self._probed = key, probe
        rate = float(request.fps or probe.rate)
        height, width = request.working(probe.height, probe.width)
        size = probe.frames(rate) * height * width * 3
        if probe.frames(rate) > 4 * request.frames and size * len(self) > self._cache.limit:
            # The probe only: the bytes of a record would soon fill the memory.
            self._cache.put(key, probe, _PROBE_BYTES)
            if request.in_order:
                decode = functools.partial(self._decode_on, index, probe, rate, request.working)
            else:
                stored = stored or self._library.stored(index)
                decode = functools.partial(_decode_stretch, stored, probe, rate, request.working)
            return _LongClip(probe.frames(rate), decode)
        stored = stored or self._library.stored(index)
        clip = read_clip(stored, fps=rate, working=request.working)
        item = _Frames(clip.frames, np.arange(len(clip.frames)), clip.missing)
        self._cache.put(key, item, clip.frames.nbytes)
        return item

    def _decode_on(
        self, index: int, probe: Probe, rate: float, working: WorkingSize, start: int, count: int
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """Of a clip that is decoded once, from its beginning on.

        Never from a key frame in the middle: of a damaged clip that would give other frames, and so
        another run after a resumption.
        """
        key = (index, rate, working)
        if self._reader is None or self._reader[0] != key or self._reader[1].position > start:
            reader = ClipReader(self._library.stored(index), probe, rate, working)
            self._reader = key, reader
        return self._reader[1].read(start, count)


def _decode_stretch(
    stored: Stored, probe: Probe, rate: float, working: WorkingSize, start: int, count: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    return read_stretch(stored, probe, rate=rate, start=start, count=count, working=working)
