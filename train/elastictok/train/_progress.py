"""What the terminal shows of a run."""

import abc
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class AbstractDisplay(abc.ABC):
    """Shows where a run is."""

    @abc.abstractmethod
    def say(self, text: str) -> None:
        """A line that stays."""

    @abc.abstractmethod
    def step(self, step: int) -> None:
        """Called after every step; must cost nothing."""

    @abc.abstractmethod
    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with every line of metrics."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leaves the terminal as it was."""


class Silent(AbstractDisplay):
    """Shows nothing."""

    def say(self, text: str) -> None: ...
    def step(self, step: int) -> None: ...
    def metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Bar(AbstractDisplay):
    """One live line on a terminal."""

    def __init__(self, console: Console, *, start: int, steps: int, seconds: float = 0.25):
        """**Arguments:**

        - `console`: a terminal.
        - `start`, `steps`: steps done and steps in all.
        - `seconds`: between two drawings.
        """
        # Drawn from the loop: rich's own thread would draw in the middle of a step's dispatch.
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
        )
        self._task: TaskID = self._progress.add_task("", total=steps, completed=start)
        self._seconds = seconds
        self._drawn = 0.0
        self._progress.start()

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def step(self, step: int) -> None:
        now = time.monotonic()
        if now - self._drawn >= self._seconds:
            self._drawn = now
            self._progress.update(self._task, completed=step, refresh=True)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        total = int(self._progress.tasks[0].total or 0)
        text = describe(step, total, metrics)
        self._progress.update(self._task, completed=step, description=text, refresh=True)

    def close(self) -> None:
        self._progress.stop()


class Lines(AbstractDisplay):
    """A plain line now and then, for logs."""

    def __init__(self, console: Console, *, steps: int, seconds: float = 10.0):
        """**Arguments:**

        - `console`: not a terminal.
        - `steps`: in all.
        - `seconds`: least time between two lines; the last step has one in any case.
        """
        self._console = console
        self._steps = steps
        self._seconds = seconds
        self._printed = 0.0

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int) -> None: ...

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._printed >= self._seconds or step == self._steps:
            self._printed = now
            self.say(f"step {step}/{self._steps}  {describe(step, self._steps, metrics)}")

    def close(self) -> None: ...


def display(*, progress: bool, start: int, steps: int) -> AbstractDisplay:
    """A bar on a terminal, lines elsewhere, both on standard error; nothing if not wanted."""
    if not progress:
        return Silent()
    console = Console(stderr=True)
    if console.is_terminal:
        return Bar(console, start=start, steps=steps)
    return Lines(console, steps=steps)


def describe(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Loss, errors at fixed lengths if they are known, speed and time left in one line."""
    rate = metrics["steps_per_second"]
    left = int((steps - step) / rate) if rate > 0 else 0
    parts = [f"loss {_short(metrics['loss'])}"]
    if "mse_full" in metrics:
        parts.append(
            f"MSE {_short(metrics['mse_full'])} full, {_short(metrics['mse_quarter'])} quarter"
        )
    else:
        parts.append(f"PSNR {metrics['psnr']:.1f} dB")
    parts += [
        f"{_thousands(metrics['tokens_per_second'])} tokens/s",
        f"{metrics['waiting_for_data']:.0%} waiting for data",
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
    ]
    return "  ".join(parts)


def _short(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def _thousands(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value / 1000:.3g}k"
