"""Plans for TPUs, by the compiler that TPUs have. Only `libtpu` is needed (the extra `aot`)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from elastictok.attention import TPU_CHIPS
from elastictok.models import Patching, RankRotary, Raster, presets, with_compute_dtype
from elastictok.quantizers import FSQ
from elastictok.train import (
    CHIPS,
    adamw,
    blocks_of,
    make_mesh,
    plan,
    topology_devices,
)

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='needs the compiler for TPUs: pip install "elastictok[aot]"',
    ),
]
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"} | {
    "tpu7x": "tpu7x:2x2x1"
}


def test_there_is_a_chip_for_every_kernel():
    assert {chip.device_kind for chip in CHIPS} == set(TPU_CHIPS)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_chips_have_the_devices_and_the_memory_that_the_compiler_says(chip):
    devices = topology_devices(SMALLEST[chip.name])
    assert {device.device_kind for device in devices} == {chip.device_kind}
    places = {tuple(device.coords) for device in devices}
    assert len(devices) == chip.devices * len(places)
    terabyte = jax.ShapeDtypeStruct(
        (2**18, 2**20), jnp.float32, sharding=SingleDeviceSharding(devices[0])
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x.sum()).lower(terabyte).compile()
    (available,) = re.findall(r"exceeds available HBM \(([\d.]+)G\)", str(refused.value))
    assert chip.memory_bytes / chip.devices == float(available) * 2**30


def test_topologies_that_there_are_not():
    with pytest.raises(ValueError, match=r"no topology 'v9:4x4' .*; write it as in v4:2x2x1, "):
        topology_devices("v9:4x4")
    with pytest.raises(ValueError, match="no topology 'v5e:3x3'"):
        topology_devices("v5e:3x3")
    with pytest.raises(ValueError, match="takes 3 devices and there are 4"):
        make_mesh(data=3, devices=topology_devices("v5e:2x2"))


def test_the_200m_model_on_sequences_of_262144_tokens():
    model = eqx.filter_eval_shape(
        lambda: with_compute_dtype(presets.elastictok_fsq_200m(key=jax.random.key(0)), jnp.bfloat16)
    )
    mesh = make_mesh(fsdp=4, sequence=4, devices=topology_devices("v5e:4x4"))
    found = plan(model, mesh, context=blocks_of(model, 262_144), optimizer=adamw(1e-3))
    print(found)
    assert found.fits
    # Parameters and the optimizer's two averages lie on four devices each, but for vectors.
    assert found.parameters == pytest.approx(210_165_760, rel=0.01)
    assert found.optimizer == pytest.approx(2 * 210_165_760, rel=0.01)
    assert found.total - found.temporaries - found.code == pytest.approx(
        found.parameters + found.optimizer + found.batch, rel=0.01
    )
    # Each layer's input for the backward pass, at least: float32, a quarter of a sequence.
    assert 20 * 65_536 * 1024 * 4 < found.activations < found.temporaries
    # Forward, again for the backward pass, and its two kernels; for encoder and decoder.
    assert found.kernels == 2 * 4
    assert found.endless == 0
    # Keys and values go round the four devices of a sequence; weights are gathered from the four
    # that share them, in bfloat16, forward and backward.
    assert found.sent["all-gather over fsdp"] == pytest.approx(0.75 * 2 * 2 * 210_165_760, rel=0.02)
    # In a layer: both go round forward, again for the backward pass, and in it; there their
    # gradients follow them, in float32, and at last go one further, in bfloat16.
    keys, hops = 65_536 * 1024 * 2, 4
    sent = 20 * keys * (3 * 2 * hops + 2 * 2 * hops + 2)
    assert found.sent["collective-permute over sequence"] == pytest.approx(sent, rel=0.001)
    # Products of matrices: forward, again, and twice backward. Of attention: two forward, two
    # again, three and four backward; and the last of four devices has blocks that see 49 to 64.
    matrices = 4 * 2 * 209_715_200 * 65_536
    pairs = 65_536 * 262_144 * (49 + 64) / 2 / 64
    attention = 20 * (2 + 2 + 3 + 4) * 2 * pairs * 1024
    assert found.flops == pytest.approx(matrices + attention, rel=0.002)
    assert 0.2 < found.mfu < 0.5


def test_a_device_alone_sends_nothing():
    model = eqx.filter_eval_shape(lambda: presets.demo(key=jax.random.key(0)))
    mesh = make_mesh(devices=topology_devices("v6e:2x2")[:1])
    found = plan(model, mesh, optimizer=adamw(1e-3), accumulate=2)
    assert found.batch_size == 2
    assert found.kernels == 2 * 3  # nothing is computed again
    assert found.sent == {}
    assert found.fits
    assert found.link_seconds == 0
    assert 0 < found.mfu < 1


def test_what_does_not_fit_says_what_the_compiler_says():
    """Its parameters alone are too many, which is found before anything else is compiled."""
    model = eqx.filter_eval_shape(wide)
    mesh = make_mesh(data=4, devices=topology_devices("v5e:2x2"))
    found = plan(model, mesh, optimizer=adamw(1e-3))
    assert found.fits is False
    assert re.search(r"Ran out of memory on HBM.* exceeds available HBM \(15\.75G\)", found.refused)
    assert "Try more devices along fsdp" in str(found)


def wide():
    """Seven billion parameters."""
    return presets.build(
        size=(16, 16),
        context=1,
        frames_per_block=1,
        min_tokens=1,
        patching=Patching(1, 8, 8),
        order=Raster(),
        quantizer=FSQ((5, 5, 5)),
        dim=8192,
        hidden=65536,
        layers=1,
        heads=64,
        rotary=RankRotary(1e4),
        key=jax.random.key(0),
    )


def test_the_command(tmp_path):
    """In a process of its own, as it settles things before jax is imported."""
    program = Path(sys.executable).parent / "elastictok"
    done = subprocess.run(
        [program, "plan", "demo", "--topology", "v5e:2x2", "--precision", "float32"],
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 x TPU v5 lite: data 4" in done.stdout
    assert "tokens per second" in done.stdout
