"""How much memory model files take: a 200M model saved, loaded, and read from an official file.

    python benchmarks/model_files.py                 # prints
    python benchmarks/model_files.py --write         # and keeps benchmarks/results/model_files.md

Each task is a process of its own. Its peak is the largest resident set between the task's start and
end, less what the process had before it (the interpreter, jax and, for saving, the model are
listed apart). Linux only: the peak is reset through /proc.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "model_files.md"
PACKAGES = ("elastictok", "jax", "equinox", "numpy", "safetensors")
TASKS = {
    "save": "save, one file",
    "load": "load",
    "save_in_parts": "save, files of at most 200 MB",
    "load_parts": "load them",
    "write_official": "write an official file of bfloat16 (this script's own code)",
    "load_official": "load_official to float32",
    "load_official_half": "load_official, bfloat16 as it is",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        print(json.dumps(run(arguments.task, arguments.folder)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in TASKS:
            command = [sys.executable, __file__, "--task", task, "--folder", folder]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[task] = json.loads(answer.stdout.splitlines()[-1])
    text = describe(rows)
    print(text)
    if arguments.write:
        RESULT.write_text(text, encoding="utf-8")


def run(task: str, folder: Path) -> dict[str, float]:
    """Bytes and seconds of one task, in this process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from elastictok.models import OFFICIAL_FSQ, count_parameters, load, load_official, presets, save

    def make() -> Any:
        return jax.block_until_ready(presets.elastictok_fsq_200m(key=jax.random.key(0)))

    jnp.zeros(1).block_until_ready()
    start = resident()
    model = None
    if task in ("save", "save_in_parts", "write_official"):
        model = make()
    tasks: dict[str, Callable[[], Any]] = {
        "save": lambda: save(model, folder / "whole"),
        "load": lambda: load(folder / "whole"),
        "save_in_parts": lambda: save(model, folder / "parts", shard_bytes=200_000_000),
        "load_parts": lambda: load(folder / "parts"),
        "write_official": lambda: write_official(model, folder / "params"),
        "load_official": lambda: load_official(folder / "params", OFFICIAL_FSQ),
        "load_official_half": lambda: load_official(folder / "params", OFFICIAL_FSQ, dtype=None),
    }
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    clock = time.perf_counter()
    result = jax.block_until_ready(tasks[task]())
    seconds = time.perf_counter() - clock
    held = result if model is None else model
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert count_parameters(held) == 210_165_760
    peak = status("VmHWM")
    return {
        "model": size,
        "start": start,
        "held before": before - start,
        "peak": peak - start,
        "seconds": seconds,
    }


def resident() -> int:
    return status("VmRSS")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


def write_official(model: Any, path: Path) -> None:
    """The model in the official byte format, in bfloat16, one tensor at a time."""
    import jax.numpy as jnp
    import msgpack
    import numpy as np

    from elastictok.models._describe import named
    from elastictok.models._official import _sources

    with open(path, "wb") as file:
        for name, array in named(model):
            ((official, shape),) = _sources(name, array.shape, False).items()
            values = np.asarray(array).astype(jnp.bfloat16).reshape(shape)
            payload = msgpack.packb((values.shape, "bfloat16", values.tobytes()))
            value = msgpack.packb(msgpack.ExtType(1, payload))
            file.write(msgpack.packb((official.split("/"), value)))


def describe(rows: dict[str, dict[str, float]]) -> str:
    """The result as a page of Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Model files: memory and time",
        "",
        f"`python benchmarks/model_files.py --write`, {datetime.date.today()}, on {os.cpu_count()} "
        f"CPU cores, Linux. Python {platform.python_version()}, {versions}.",
        "",
        "`elastictok_fsq_200m` with random weights, 210,165,760 parameters. Sizes as multiples of "
        "the model's in memory; *peak* counts all that the process holds but the interpreter and "
        "jax, so the model that is saved or loaded is in it once. Times depend on the disk.",
        "",
        "| task | model, MB | held before | peak | seconds |",
        "|---|---|---|---|---|",
    ]
    for task, row in rows.items():
        size = row["model"]
        lines.append(
            f"| {TASKS[task]} | {size / 1e6:.0f} | {row['held before'] / size:.2f} "
            f"| {row['peak'] / size:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
