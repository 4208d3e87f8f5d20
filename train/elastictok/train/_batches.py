"""The next batch, made and placed while the step runs, with the state of the data behind it."""

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from elastictok.data import Batch

from ._errors import DataError
from ._step import DeviceBatch


@runtime_checkable
class ResumableIterator(Protocol):
    """An iterator of batches that can say where it is and go there."""

    def __iter__(self) -> Any: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any, /) -> None: ...
    def close(self) -> None: ...


class _Made(NamedTuple):
    batch: DeviceBatch
    state: str | None
    names: tuple[str, ...]


class _Ended(NamedTuple):
    error: Exception | None


class Batches:
    """Iterates over `data` in a thread, one batch ahead.

    - `state`: that of the batches handed out by `next`, not of those made ahead: a run resumed from
        it sees every batch exactly once.
    - `names`: of the documents in the batch handed out last.
    - `seconds_waited`: for batches, in all.
    - `iterator`: of the data.
    """

    def __init__(
        self,
        data: Iterable[Batch],
        place: Callable[[Batch], DeviceBatch],
        state: Any = None,
    ):
        """**Arguments:**

        - `data`: iterated once, from `state` on.
        - `place`: moves a batch to the devices.
        - `state`: of an earlier iterator's `get_state`; None starts at the beginning.

        **Raises:** `DataError` if there is a state and `data` cannot go to it.
        """
        iterator = iter(data)
        self._resumable = iterator if isinstance(iterator, ResumableIterator) else None
        if state is not None:
            if self._resumable is None:
                raise DataError(
                    f"{type(data).__name__} cannot be resumed: its iterator has no get_state and "
                    "set_state. Give fit a dataset of elastictok.data, or start a new run"
                )
            self._resumable.set_state(state)
        self.state = state
        self.names: tuple[str, ...] = ()
        self.seconds_waited = 0.0
        self.iterator = iterator
        self._place = place
        self._handed_out = 0
        self._first: _Made | None = None
        self._queue: queue.Queue[_Made | _Ended] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="elastictok-batches", daemon=True)
        self._thread.start()

    def peek(self) -> DeviceBatch:
        """The batch that `next` gives first; before the first `next`."""
        if self._first is None:
            self._first = self._get()
        return self._first.batch

    def next(self) -> DeviceBatch:
        """The next batch; waits for it.

        **Raises:** `DataError` when there is none left, and whatever the data raised.
        """
        made, self._first = self._first or self._get(), None
        self._handed_out += 1
        self.state = None if made.state is None else json.loads(made.state)
        self.names = made.names
        return made.batch

    def close(self) -> None:
        """Ends the thread and closes the data's iterator."""
        self._closing.set()
        self._thread.join()
        if self._resumable is not None:
            self._resumable.close()

    def _get(self) -> _Made:
        start = time.perf_counter()
        item = self._queue.get()
        self.seconds_waited += time.perf_counter() - start
        if isinstance(item, _Made):
            return item
        self._put(item)  # a second call must not wait for ever
        if item.error is not None:
            raise item.error
        raise DataError(
            f"the data ended after {self._handed_out} batches; give more, fewer steps, or repeat "
            "them (itertools.cycle)"
        )

    def _fill(self) -> None:
        error: Exception | None = None
        try:
            for batch in self.iterator:
                # As text, now: the iterator may go on changing the dictionary that it gave.
                resumable = self._resumable
                state = None if resumable is None else json.dumps(resumable.get_state())
                names = tuple(name for sequence in batch.names for name in sequence)
                self._put(_Made(self._place(batch), state, names))
                if self._closing.is_set():
                    return
        except Exception as raised:  # handed to the thread that waits for the batch
            error = raised
        self._put(_Ended(error))

    def _put(self, item: _Made | _Ended) -> None:
        while not self._closing.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
