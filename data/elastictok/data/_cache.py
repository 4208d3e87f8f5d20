"""Decoded files in memory, bounded by bytes."""

import collections
import threading
from collections.abc import Hashable
from typing import Any


class Cache:
    """The most recently used values up to a total size. May be used from several threads.

    A copy that is sent to another process starts empty.

    **Arguments:**

    - `limit`: bytes; a value larger than this is not kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()

    def __reduce__(self):
        return Cache, (self.limit,)

    def get(self, key: Hashable) -> Any:
        """The value, or `None`."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keeps a value of `size` bytes and drops what has not been used for longest."""
        if size > self.limit:
            return
        with self._lock:
            self.held += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = (value, size)
            while self.held > self.limit:
                _, (_, dropped) = self._values.popitem(last=False)
                self.held -= dropped
