"""One device and eight give the same run. In a process of its own: devices are chosen at start."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_training import quantizers

HERE = Path(__file__).parent


# Compiling a step takes seconds, and here everything is compiled twice.
pytestmark = pytest.mark.heavy
NAMES = sorted(quantizers())


@functools.cache
def runs():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, HERE / "on_devices.py", *NAMES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(one, eight):
    np.testing.assert_allclose(one["losses"], eight["losses"], rtol=1e-5)
    np.testing.assert_allclose(one["gradients"], eight["gradients"], rtol=1e-4)
    np.testing.assert_allclose(one["weights"], eight["weights"], rtol=1e-3, atol=1e-5)
    assert len(set(one["losses"])) == 3


@pytest.mark.parametrize("name", NAMES)
def test_one_and_eight_devices_give_the_same_run(name):
    check(*runs()["results"][name])


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    assert "a batch of 12 examples cannot be split over 8 devices" in runs()["refused"]
