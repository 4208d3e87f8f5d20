"""Ring attention over eight devices equals the reference; layouts are permutations."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictok.attention import Contiguous, ZigZag

HERE = Path(__file__).parent


@functools.cache
def found(*arguments: str) -> dict:
    """In a process of its own: the number of devices is chosen at start."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, HERE / "ring_on_devices.py", *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.heavy
def test_both_layouts_are_the_reference():
    errors = found()["both layouts"]
    assert len(errors) == 4
    assert max(errors.values()) <= 2e-6, errors


@pytest.mark.heavy
def test_so_they_are_with_the_kernels_for_tpus():
    errors = found("pallas")
    assert len(errors) == 4
    assert max(errors.values()) <= 2e-6, errors


def test_inside_a_shard_map_the_arrays_are_parts():
    assert found()["inside"] <= 2e-6


def test_a_batch_stays_where_it_is():
    batch = found()["batch"]
    assert batch["error"] <= 2e-6
    assert len(batch["specs"]) == 1
    assert "'data', 'sequence', 'tensor'" in batch["specs"][0]
    assert batch["gathers of the batch"] == 0


def test_a_mesh_with_explicit_axes_keeps_the_batch_by_itself():
    explicit = found()["explicit"]
    assert explicit["error"] <= 2e-6
    assert all("P('data'" in spec for spec in explicit["specs"])


def test_half_precision_is_merged_in_float32():
    assert found()["halves"] <= 2e-2


def test_one_block_of_queries_meets_a_cache_spread_over_the_devices():
    assert found()["cache"] <= 2e-6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no mesh", "no mesh axis 'sequence' here (axes: none): call it inside jax.set_mesh(mesh)"),
        ("no axis", "no mesh axis 'time' here (axes: 'sequence')"),
        ("indivisible", "250 tokens do not divide by 8 devices: pad to 256"),
        ("odd", "248 tokens do not divide by 2 x 8 devices: pad to 256"),
        ("mask", "KeyValid.valid has shape (32,) but there are 256 keys"),
        ("inner", "each hop: it runs on TPUs"),
        ("heads", "2 key heads do not divide by the 8 devices of axis 'tensor'"),
    ],
)
def test_what_cannot_be_split_is_refused_with_a_remedy(case, message):
    assert message in found()["refusals"][case]


@given(st.sampled_from([Contiguous(), ZigZag()]), st.integers(1, 9), st.integers(1, 5))
def test_a_layout_is_a_permutation_in_equal_parts(layout, shards, half):
    length = shards * half * 2
    order = layout.order(shards, length)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    parts = order.reshape(shards, -1)
    for shard in range(shards):
        np.testing.assert_array_equal(layout.places(shard, shards, 2 * half), parts[shard])
    if isinstance(layout, ZigZag):  # the n-th from the front with the n-th from the back
        assert len(set(parts.sum(axis=1))) == 1


def test_a_layout_refuses_a_length_that_it_cannot_divide():
    with pytest.raises(ValueError, match="12 tokens do not divide by 2 x 4 devices: pad to 16"):
        ZigZag().order(4, 12)
