"""A run goes on on another mesh, another number of devices, and on several processes."""

import shutil

import numpy as np
import pytest
from processes import in_two, result, start

from elastictok.models import load
from elastictok.train import latest_step

pytestmark = pytest.mark.heavy


SCRIPT = "fit_on_mesh.py"


def on(devices, *arguments):
    return result(start(SCRIPT, devices, *arguments))


def on_two_processes(*arguments):
    return in_two(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Four steps on one device, and eight."""
    folder = tmp_path_factory.mktemp("runs")
    on(1, folder / "half", "data=1", 4)
    whole = on(1, folder / "whole", "data=1", 8)
    return folder, whole


def check(found, whole):
    assert [step for step, _ in found["losses"]] == list(range(1, 9))
    np.testing.assert_allclose(found["losses"], whole["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["weights"], whole["weights"], rtol=1e-3, atol=1e-4)


def test_from_one_device_to_eight(half, tmp_path):
    folder, whole = half
    shutil.copytree(folder / "half", tmp_path / "run")
    found = on(8, tmp_path / "run", "data=2,sequence=2,fsdp=2", 8)
    check(found, whole)


def test_from_eight_devices_to_others_and_back_to_one(half, tmp_path):
    _, whole = half
    out = tmp_path / "run"
    on(8, out, "fsdp=4,tensor=2", 3)
    on(4, out, "data=2,sequence=2", 5)
    found = on(1, out, "data=1", 8)
    check(found, whole)


def test_two_processes_save_and_resume_bit_for_bit(half, tmp_path):
    """Stopped by a signal that only one of them gets; then from two processes to one."""
    _, whole = half
    axes = "fsdp=4,data=2"
    straight = on_two_processes(tmp_path / "straight", axes, 8)
    check(straight, whole)
    out = tmp_path / "parts"
    on_two_processes(out, axes, 8, "--interrupt", 1, 4)
    stopped = latest_step(out)
    assert 2 <= stopped < 8
    load(out)
    shutil.copytree(out, tmp_path / "other")
    assert on_two_processes(out, axes, 8) == straight
    # Its data was read in two shares.
    refused = start(SCRIPT, 8, tmp_path / "other", axes, 8)
    assert "trained with its data in 2 shares" in refused.communicate()[1]
    assert refused.returncode != 0
