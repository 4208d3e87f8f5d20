"""Building a data set by a pipeline of Apache Beam, on whatever it runs on."""

import os
from collections.abc import Sequence
from pathlib import Path

from elastictok.data._build import Built, completing, state_of
from elastictok.data._plan import Plan, plan_for
from elastictok.data._task import run_task


def build_with_beam(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    resolution: int | None = None,
    fps: float | int | None = None,
    source: str = "",
    licence: str = "",
    table: str | os.PathLike[str] | None = None,
    shard_bytes: int | None = None,
) -> Built:
    """Builds the data set that [`build`][] builds, byte for byte, as a pipeline of Apache Beam.

    The elements are the tasks of the plan, each of which makes a shard. The folders and `out` must
    be the same places for this process and for the workers: on a file system that all of them
    mount. Called again after an interruption, it does the tasks that are left.

    **Arguments:**

    - `runner`: the name of a runner of Beam; `DirectRunner` is this machine.
    - `options`: further options of Beam and its runner, such as `--project=NAME`.
    - The others: see [`build`][].

    **Raises:** as [`build`][] does; `RuntimeError` if Beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options import (  # pyright: ignore[reportMissingImports]
            pipeline_options,
        )
    except ImportError as error:
        raise RuntimeError(
            'Apache Beam is not installed; get it by pip install "elastictok[beam]"'
        ) from error
    out = Path(out)
    found = plan_for(
        folders,
        out,
        resolution=resolution,
        fps=fps,
        source=source,
        licence=licence,
        table=table,
        shard_bytes=shard_bytes,
    )
    if found is None:
        return state_of(out)
    tasks = [task.index for task in found.open_tasks((0, 1))]
    settings = pipeline_options.PipelineOptions([f"--runner={runner}", *options])
    with completing(found), beam.Pipeline(options=settings) as pipeline:
        indices = pipeline | "Tasks" >> beam.Create(tasks)
        # Without it, a runner may give all to the worker that made the list.
        spread = indices | "Spread" >> beam.Reshuffle()
        _ = spread | "Make shards" >> beam.Map(_do, os.path.abspath(out))
    return state_of(out)


def _do(task: int, out: str) -> int:
    run_task(Plan(Path(out)), task)
    return task
