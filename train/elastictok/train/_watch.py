"""Steps that take far longer than the others, and where their time went."""

import collections
import statistics

_FACTOR = 10.0
_LEAST = 20  # steps before there is a median to speak of
_SECONDS = 0.1  # a hiccup of a fast step is nothing to report
_SPAN = 200  # steps that the median looks back over


class StepWatch:
    """Reports steps that take ten times the median of the last ones."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=_SPAN)

    def add(self, step: int, *, data: float, compute: float, saving: float) -> str | None:
        """Takes a step's seconds; what there is to say about it, or None.

        **Arguments:**

        - `data`: waiting for its batch.
        - `compute`: the step itself, on the devices and in Python.
        - `saving`: the checkpoint behind it, and waiting for the one before. What validation and
            pictures take is not a surprise, and not counted.
        """
        total = data + compute + saving
        median = statistics.median(self._seconds) if len(self._seconds) >= _LEAST else None
        self._seconds.append(total)
        if median is None or total < max(_FACTOR * median, _SECONDS):
            return None
        return (
            f"step {step} took {total:.3g} s, {total / max(median, 1e-9):.0f} times the median: "
            f"{data:.3g} s waiting for data, {compute:.3g} s computing, {saving:.3g} s saving a "
            "checkpoint"
        )
