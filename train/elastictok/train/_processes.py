"""What the processes of one run say to each other. With one process all of it is trivial."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first_process() -> bool:
    """Whether this is the one that writes files and talks to people."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first_process(numbers: Sequence[int]) -> list[int]:
    """The first process's numbers, on every process."""
    if jax.process_count() == 1:
        return list(numbers)
    found = multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))
    return [int(number) for number in found]


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def of_all_processes(value: Any) -> list[Any]:
    """Every process's value, JSON, in the order of their numbers, on every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.atleast_1d(multihost_utils.process_allgather(np.array(len(text), np.int32)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[: int(size)].tobytes()) for row, size in zip(rows, sizes, strict=True)]
