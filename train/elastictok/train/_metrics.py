"""Metrics between the step and the reader: means since the last line, and the lines."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ._errors import NonFiniteError
from ._step import Metrics

_PENDING = 256  # steps whose metrics may stay on the device
_NAMED = 16  # documents that an error lists
_MEMORY = 0.98  # of the running loss: it looks back over about 50 steps


class Meter:
    """Collects each step's metrics; they stay on the device until somebody asks.

    - `running_loss`: exponential mean of the loss over the last 50 steps or so; infinite before
        the first. Up to date after `fetch`.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        """**Arguments:**

        - `state`: an earlier meter's, so that a resumed run writes the lines that the whole run
            would have written.
        """
        self._rows: list[dict[str, float]] = list(state["rows"]) if state else []
        self.running_loss: float = state["running_loss"] if state else math.inf
        self._pending: list[tuple[int, Metrics, tuple[str, ...]]] = []

    def add(self, step: int, metrics: Metrics, names: tuple[str, ...] = ()) -> None:
        """Takes what the step gave, most of the time without waiting for it.

        **Arguments:**

        - `names`: of the documents in the step's batch, to blame.
        """
        self._pending.append((step, metrics, names))
        if len(self._pending) == _PENDING:
            self.fetch()

    def fetch(self) -> None:
        """Waits for the steps added so far.

        **Raises:** `NonFiniteError` naming the first metric that is not finite, its step and what
        the step's batch was made of.
        """
        pending = list(self._pending)
        rows = jax.device_get([metrics for _, metrics, _ in pending])
        self._pending.clear()
        for (step, _, names), row in zip(pending, rows, strict=True):
            numbers = {name: float(value) for name, value in row.items()}
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise NonFiniteError(f"{name} is {value} at step {step}{_made_of(names)}")
            self._rows.append(numbers)
            loss, mean = numbers["loss"], self.running_loss
            self.running_loss = loss if math.isinf(mean) else mean + (1 - _MEMORY) * (loss - mean)

    def means(self) -> dict[str, float]:
        """Means over the fetched steps since `clear`, and the `psnr` in dB of the mean `mse`."""
        means = {
            name: math.fsum(row[name] for row in self._rows) / len(self._rows)
            for name in self._rows[0]
        }
        return {"loss": means["loss"], "psnr": psnr(means["mse"])} | means

    def clear(self) -> None:
        """Starts the next line's means."""
        self._rows.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `fetch`."""
        return {"rows": list(self._rows), "running_loss": self.running_loss}


def _made_of(names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (its batch: {', '.join(names[:_NAMED])}{more})"


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, each step at most once, steps growing."""

    def __init__(self, path: Path, *, after: int):
        """**Arguments:**

        - `path`: appended to.
        - `after`: lines of later steps, and one cut off by a crash, are dropped: the run does those
            steps again.
        """
        self._path = path
        if path.exists():
            _keep_until(path, after)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; it is with the operating system when this returns."""
        line = json.dumps({"step": step} | dict(metrics), allow_nan=False)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def _keep_until(path: Path, last: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= last:
            kept.append(line)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(kept), encoding="utf-8")
    os.replace(scratch, path)
