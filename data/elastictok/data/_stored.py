"""An encoded file, on disk or in memory."""

import dataclasses
import io
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Blob:
    """The bytes of a picture or clip file.

    **Arguments:**

    - `name`: what to call it in messages.
    - `data`: the whole file.
    """

    name: str
    data: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name


Stored = Path | Blob
"""What can be decoded: a file, or the bytes of one."""


class _Nameless(io.FileIO):
    """A file whose name says nothing of its content to ffmpeg, which would judge by the suffix and
    take "a:b.mp4" for an address: a file is to be read in the same way as its bytes."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.name = "<none>"


def readable(stored: Stored) -> _Nameless | io.BytesIO:
    """What Pillow and PyAV open."""
    return _Nameless(stored) if isinstance(stored, Path) else io.BytesIO(stored.data)


def read_bytes(stored: Stored) -> bytes:
    """The encoded bytes."""
    return stored.read_bytes() if isinstance(stored, Path) else stored.data
