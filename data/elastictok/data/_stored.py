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


def readable(stored: Stored) -> str | io.BytesIO:
    """What Pillow and PyAV open."""
    # Absolute, because ffmpeg would take "a:b.mp4" for an address.
    return str(stored.absolute()) if isinstance(stored, Path) else io.BytesIO(stored.data)


def read_bytes(stored: Stored) -> bytes:
    """The encoded bytes."""
    return stored.read_bytes() if isinstance(stored, Path) else stored.data
