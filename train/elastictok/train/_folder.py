"""A run's folder: the best model so far, lines of metrics, checkpoints, a line per session."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from elastictok.models import ElasticTok, save

from ._checkpoints import Checkpoints
from ._errors import RunFolderError
from ._metrics import MetricsFile
from ._processes import is_first_process, wait_for_all

_PACKAGES = ("elastictok", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "numpy")


class RunFolder:
    """What `fit` writes. Other files in the folder are left alone.

    - `config.json`, `model.safetensors`, `README.md`: a model folder with the best model so far.
    - `metrics.jsonl`: a line per `log_every` steps.
    - `checkpoints/<step>`: to resume from.
    - `sessions.jsonl`: a line per call of `fit`: its settings and the versions it ran with.

    Of several processes, which must share the file system, the first one writes all but their parts
    of the checkpoints.
    """

    def __init__(self, path: Path, *, resume: bool):
        """**Raises:** `RunFolderError` if there is a run and it is not to be resumed."""
        marks = (path / "model.safetensors", path / "metrics.jsonl", path / "checkpoints")
        used = [mark.name for mark in marks if _has_content(mark)]
        if used and not resume:
            raise RunFolderError(
                f"{path} already holds a run ({', '.join(used)}); resume it with resume=True "
                "(--resume), or choose another folder"
            )
        wait_for_all("run folder seen")  # before one of them writes to it
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.begun = False
        self._metrics: MetricsFile | None = None

    def begin(self, step: int, settings: Mapping[str, Any]) -> None:
        """Opens `metrics.jsonl` for the lines after `step`, and notes this session."""
        self.begun = True
        if not is_first_process():
            return
        self._metrics = MetricsFile(self.path / "metrics.jsonl", after=step)
        session = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_step": step,
            **settings,
            "devices": [device.device_kind for device in jax.devices()],
            "processes": jax.process_count(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES},
        }
        with open(self.path / "sessions.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(session) + "\n")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of `metrics.jsonl`; after `begin`."""
        if self._metrics is not None:
            self._metrics.write(step, metrics)

    def save_model(self, model: ElasticTok) -> None:
        """Makes it the folder's model. What was there stays whole until the new one is.

        **Arguments:**

        - `model`: on one device, see `gather`.
        """
        if is_first_process():
            save(model, self.path)

    def close(self) -> None:
        """Ends the threads of the checkpoints."""
        self.checkpoints.close()


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # elastictok's packages can be installed one by one
