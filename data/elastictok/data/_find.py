"""From folders to lists of files, in an order that does not depend on the machine."""

import dataclasses
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from elastictok.data._errors import MediaError

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of files read as pictures; of an animated one, the first frame."""

CLIPS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
"""Suffixes of files read as clips; an animated GIF is a clip, also if it has a single frame."""


@dataclasses.dataclass(frozen=True)
class Media:
    """Files that were found, by kind, each in a deterministic order."""

    pictures: tuple[Path, ...]
    clips: tuple[Path, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Pictures, then clips."""
        return self.pictures + self.clips


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def is_clip(path: Path) -> bool:
    return path.suffix.lower() in CLIPS


def wanted() -> str:
    return " ".join(PICTURES + CLIPS)


def find_media(folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Media:
    """Finds pictures and clips in folders and all folders below them.

    The suffix alone decides, in any case (`.JPG`). Names that begin with a dot are left out, as
    are files of other suffixes, pipes and sockets; links are followed, a folder that links back
    to itself is entered once. A broken link counts as a file, and fails when it is read.

    **Arguments:**

    - `folders`: one folder or several; single files may be given too.

    **Returns:** the files, folder by folder as given, within a folder sorted by the path below
    it. A file that two folders share is listed once.

    **Raises:** `MediaError` for a path that does not exist or cannot be listed, for a folder
    without any picture or clip, and for a single file of another suffix.
    """
    roots = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    if not roots:
        raise ValueError("no folder was given; give at least one folder of pictures or clips")
    unique: dict[str, Path] = {}
    for root in map(Path, roots):
        for path in _one(root):
            unique.setdefault(os.path.abspath(path), path)
    return Media(
        pictures=tuple(filter(is_picture, unique.values())),
        clips=tuple(filter(is_clip, unique.values())),
    )


def walk(root: Path) -> Iterator[str]:
    """Files in a folder and below it, of any suffix: names below `root`, with forward slashes.

    They come sorted, though no more than the entries of one folder, and of those above it, are
    held at once. Names that begin with a dot are left out; see [`find_media`][].

    **Raises:** `MediaError` for a folder that cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    pending = [_entries(root, "", entered)]
    while pending:
        if not pending[-1]:
            pending.pop()
            continue
        name = pending[-1].pop()
        if name.endswith("/"):
            pending.append(_entries(root, name, entered))
        else:
            yield name


def _entries(root: Path, below: str, entered: set[tuple[int, int]]) -> list[str]:
    """Files of one folder, and folders with a slash at the end; the first one last."""
    folder = root / below
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in entered:
            return []
        entered.add(identity)
        names = [
            f"{below}{entry.name}{suffix}"
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and (suffix := _suffix(entry)) is not None
        ]
    except OSError as error:
        raise MediaError(
            folder, f"cannot be listed ({error.strerror}); allow it or leave the folder out"
        ) from error
    # With the slash, the order within folders adds up to that of whole names.
    return sorted(names, reverse=True)


def _suffix(entry: os.DirEntry[str]) -> str | None:
    """A slash for a folder, nothing for a file; `None` for pipes, sockets and links to them. A
    broken link is a file, which fails when it is read."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "" if entry.is_symlink() else None
    if stat.S_ISDIR(mode):
        return "/"
    return "" if stat.S_ISREG(mode) else None


def _one(root: Path) -> list[Path]:
    if root.is_dir():
        paths: list[Path] = []
        others = 0
        other = ""
        for name in walk(root):
            path = root / name
            if is_picture(path) or is_clip(path):
                paths.append(path)
            else:
                others, other = others + 1, other or name
        if not paths:
            seen = f"; it holds {others} other files, such as {other}" if others else ""
            raise MediaError(
                root, f"no picture or clip in this folder or below it (looked for {wanted()}){seen}"
            )
        return paths
    if not os.path.lexists(root):
        raise MediaError(root, "no such file or folder; check the spelling")
    if not (is_picture(root) or is_clip(root)):
        raise MediaError(root, f"neither a folder nor a picture or clip (of {wanted()})")
    return [root]
