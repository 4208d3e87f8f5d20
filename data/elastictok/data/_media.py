"""Reading one file, whatever its kind, and the files of a folder one by one."""

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from elastictok.data._clip import MAX_BYTES, read_clip
from elastictok.data._errors import MediaError, MediaWarning
from elastictok.data._find import find_media, is_clip, is_picture, wanted
from elastictok.data._picture import MAX_PIXELS, read_picture
from elastictok.data._report import Damaged, Report, Skipped, Used
from elastictok.data._types import Clip


def read_media(
    path: str | os.PathLike[str],
    *,
    fps: float | int | None = None,
    max_frames: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Clip:
    """Reads a picture or a clip; the suffix decides which.

    Both come upright (EXIF orientation, the container's rotation) and with three channels: grey
    is repeated, palettes are looked up, CMYK is converted without a profile, transparent pixels
    are laid on white, 16 bits are rounded to 8. Of an animated PNG or WebP the first frame is
    read; a GIF is a clip. Colour profiles and the aspect of pixels are not applied.

    **Arguments:**

    - `path`: the file; see [`find_media`][] for the suffixes.
    - `fps`: resample a clip: frame `k` shows what is on screen `k / fps` seconds after the first
        frame (time stamps are trusted to 2.5 milliseconds), to the end of the last frame. `None`
        keeps every frame. Ignored for a picture.
    - `max_frames`: stop after this many frames.
    - `max_pixels`: refuse pictures, and clips with frames, of more pixels. A picture above
        Pillow's own error limit, twice the default, is refused whatever is given here.
    - `max_bytes`: refuse a clip whose frames take more memory.

    **Returns:** a [`Clip`][]. Of a damaged or cut-off clip the frames that can be decoded, and in
    `missing` how many of those promised are not there.

    **Raises:** `MediaError` naming the file and the reason if nothing of it can be used.
    """
    path = Path(path)
    if is_clip(path):
        return read_clip(
            path, fps=fps, max_frames=max_frames, max_pixels=max_pixels, max_bytes=max_bytes
        )
    if is_picture(path):
        return Clip(read_picture(path, max_pixels=max_pixels)[None], None, path)
    raise MediaError(path, f"its suffix is none of those read: {wanted()}")


class MediaReader:
    """The files of folders, one at a time and in a fixed order: for evaluation.

    Pictures come first, then clips, each as [`find_media`][] sorts them. A file that cannot be
    used is left out with one [`MediaWarning`][] and counted.

    **Arguments:**

    - `folders`: as for [`find_media`][].
    - `fps`, `max_frames`, `max_pixels`, `max_bytes`: as for [`read_media`][].

    **Raises:** `MediaError` as [`find_media`][] does, and at the end of an iteration in which no
    file could be used.
    """

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        fps: float | int | None = None,
        max_frames: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ):
        self.paths = find_media(folders).paths
        self._fps = fps
        self._max_frames = max_frames
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._report = Report()

    def __len__(self) -> int:
        """The number of files, usable or not."""
        return len(self.paths)

    def __iter__(self) -> Iterator[Clip]:
        self._report = Report()
        counts = {"pictures": 0, "clips": 0}
        for path in self.paths:
            try:
                clip = read_media(
                    path,
                    fps=self._fps,
                    max_frames=self._max_frames,
                    max_pixels=self._max_pixels,
                    max_bytes=self._max_bytes,
                )
            except MediaError as error:
                skipped = Skipped(str(path), error.reason)
                self._report = dataclasses.replace(
                    self._report, skipped=(*self._report.skipped, skipped)
                )
                warnings.warn(f"skipped {error}", MediaWarning, stacklevel=2)
                continue
            counts["pictures" if clip.picture else "clips"] += 1
            damaged = (Damaged(str(path), clip.missing),) if clip.missing else ()
            self._report = dataclasses.replace(
                self._report,
                # Blocks are not known here.
                components=tuple(Used(kind, n, n, 0) for kind, n in counts.items()),
                damaged=self._report.damaged + damaged,
            )
            yield clip
        if not self._report.used:
            first = self._report.skipped[0]
            reason = f"{first.reason}; none of the {len(self)} files can be used"
            raise MediaError(first.name, reason)

    def report(self) -> Report:
        """What has been used and skipped since the last iteration began."""
        return self._report
