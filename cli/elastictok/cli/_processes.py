"""Several processes, each with its own devices: found before anything asks jax for a device."""

import glob
import importlib.util
import os
from collections.abc import Mapping

import jax


def join_processes(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Meets the other processes of a run, if there are any.

    Without a coordinator, jax looks for them itself where the environment says that this is one of
    several tasks: of SLURM or Open MPI, of a job on Kubernetes, or of a TPU pod.

    **Raises:** `ValueError` if only some of the three are given.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given):
        if not all(given):
            raise ValueError(
                "--coordinator, --processes and --process belong together, such as "
                "--coordinator 10.0.0.1:1234 --processes 2 --process 0"
            )
        assert processes is not None
        assert process is not None
        if not 0 <= process < processes:
            raise ValueError(
                f"--process is {process}; with --processes {processes} it is 0 to {processes - 1}"
            )
        jax.distributed.initialize(coordinator, processes, process)
    elif is_one_of_several(os.environ):
        jax.distributed.initialize()


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether jax should look for other processes."""
    tasks = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(
        environment.get(name, "1").isdecimal() and int(environment.get(name, "1")) > 1
        for name in tasks
    ):
        return True
    if (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    ):
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    # On a TPU virtual machine only its metadata server knows of the others; jax asks it.
    has_tpu = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None
