"""A polite end: the first SIGINT or SIGTERM asks the loop to stop, the second is the usual one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `name`; the handlers found are put back.

    Outside of the main thread, where Python allows no handlers, signals do what they always do.

    - `name`: of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._found: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._found[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._put_back()  # whoever cannot wait presses again

    def _put_back(self) -> None:
        while self._found:
            number, handler = self._found.popitem()
            # None: a handler not installed from Python, which Python cannot put back either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
