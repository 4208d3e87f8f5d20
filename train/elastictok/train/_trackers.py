"""Where metrics go besides `metrics.jsonl`."""

import abc
import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class AbstractTracker(abc.ABC):
    """Receives every line of metrics. `fit` closes it when it ends, however it ends."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; steps only grow."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is left. May be called more than once."""


class TensorBoard(AbstractTracker):
    """Event files for TensorBoard. Needs the extra `tensorboard`."""

    def __init__(self, folder: str | os.PathLike[str]):
        """**Arguments:**

        - `folder`: of the event files; made if absent.

        **Raises:** `ImportError` naming what to install.
        """
        self._module = _late_import("tensorboardX", "tensorboard")
        self._folder = os.fspath(folder)
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            # A resumed run repeats steps: TensorBoard drops what earlier files say from here on.
            self._writer = self._module.SummaryWriter(self._folder, purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(AbstractTracker):
    """A run at wandb.ai, or on disk with `WANDB_MODE=offline`. Needs the extra `wandb`."""

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        run_id: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """**Arguments:**

        - `project`, `name`: as shown there; a name is invented if none is given.
        - `run_id`: the same for every part of a resumed run, so that they become one curve.
        - `folder`: of wandb's files; the current one by default.
        - `config`: settings to show beside the run.

        **Raises:** `ImportError` naming what to install.
        """
        wandb = _late_import("wandb", "wandb")
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume=None if run_id is None else "allow",
            dir=None if folder is None else os.fspath(folder),
            config=dict(config or {}),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def _late_import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this tracker needs {module}: pip install "elastictok[{extra}]"', name=module
        ) from error
