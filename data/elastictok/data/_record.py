"""Records: a picture or clip as the bytes of its file, with what is known of it.

A record is a JSON object of at most 64 KiB, its length as four bytes, little-endian, before it, and
the encoded bytes after it.
"""

import dataclasses
import json
import math
import struct
from typing import Any, Literal

from elastictok.data._errors import MediaError
from elastictok.data._stored import Blob

_MOST_HEADER = 2**16
_TYPES: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "kind": str,
    "height": int,
    "width": int,
    "frames": int,
    "fps": (float, int, type(None)),
    "duration": (float, int, type(None)),
    "missing": int,
    "source": str,
    "licence": str,
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A picture or clip in a built data set.

    **Arguments:**

    - `key`: unique in the data set: the name of the folder given, and the path below it.
    - `kind`: what it is.
    - `height`, `width`: of the upright picture or frame, in pixels.
    - `frames`: how many can be decoded; 1 for a picture.
    - `fps`: average frames per second; `None` for a picture.
    - `duration`: seconds; `None` for a picture.
    - `missing`: frames that the container promises, at least, and that cannot be decoded.
    - `source`, `licence`: as the builder was told, perhaps empty.
    - `data`: the encoded file.
    """

    key: str
    kind: Literal["picture", "clip"]
    height: int
    width: int
    frames: int
    fps: float | int | None
    duration: float | int | None
    missing: int
    source: str
    licence: str
    data: bytes = dataclasses.field(repr=False)

    def to_bytes(self) -> bytes:
        """As it is stored.

        **Raises:** `MediaError` if its texts are too long.
        """
        header = json.dumps({name: getattr(self, name) for name in _TYPES}).encode()
        if len(header) > _MOST_HEADER:
            raise MediaError(
                self.key, f"its key, source and licence take {len(header)} bytes; shorten them"
            )
        return struct.pack("<I", len(header)) + header + self.data

    @classmethod
    def from_bytes(cls, stored: bytes, name: str) -> "Record":
        """Reads what `to_bytes` wrote.

        **Raises:** `MediaError`, which speaks of `name`, if it is anything else.
        """
        size = struct.unpack("<I", stored[:4])[0] if len(stored) >= 4 else -1
        if not 0 <= size <= min(_MOST_HEADER, len(stored) - 4):
            raise MediaError(name, "not a record of a data set built by elastictok")
        try:
            fields: Any = json.loads(stored[4 : 4 + size])
        except (ValueError, RecursionError) as error:
            raise MediaError(name, "the description in its record is damaged") from error
        wrong = [key for key, kind in _TYPES.items() if not _fits(fields, key, kind)]
        if wrong or fields["kind"] not in ("picture", "clip"):
            fault = ", ".join(wrong or ["kind"])
            raise MediaError(name, f"the description in its record is damaged ({fault})")
        return cls(**{key: fields[key] for key in _TYPES}, data=stored[4 + size :])

    @property
    def blob(self) -> Blob:
        """What is to be decoded."""
        return Blob(self.key, self.data)


def _fits(fields: Any, key: str, kind: type | tuple[type, ...]) -> bool:
    if not isinstance(fields, dict) or key not in fields:
        return False
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, str | None):
        return True
    return 0 <= value < (2**63 if isinstance(value, int) else math.inf)
