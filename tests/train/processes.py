"""Scripts of this folder in processes of their own: how many devices there are is settled when one
starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def start(script: str, devices: int, *arguments: object) -> subprocess.Popen:
    """A script in a process with so many CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, HERE / script, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(*processes: subprocess.Popen) -> dict:
    """What the first one prints, when all have ended well."""
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(said[0][0].splitlines()[-1])


def in_two(script: str, *arguments: object) -> dict:
    """A script in two processes of four devices, which meet: it takes `--process I OF PORT`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return result(*[start(script, 4, *arguments, "--process", i, 2, port) for i in range(2)])
