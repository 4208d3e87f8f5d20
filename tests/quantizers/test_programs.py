"""What needs a process of its own: several devices, 64-bit mode, the run-time type gate."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ONE_AND_EIGHT_DEVICES = """
    import importlib.util, sys
    import equinox as eqx, jax, jax.numpy as jnp, numpy as np

    assert len(jax.devices()) == 8 and jax.config.jax_enable_x64
    spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def total(q, z, keep):
        out = jax.vmap(q)(z, keep)
        sums = jax.tree.map(lambda s: s.sum(0), (out.loss, out.statistics))
        return (jnp.sum(out.latents**2) + sums[0], sums[1]), out

    @eqx.filter_jit
    def step(q, z, keep):
        own, rest = eqx.partition(q, eqx.is_inexact_array)

        def objective(z, own):
            q = eqx.combine(own, rest)
            (loss, statistics), out = total(q, z, keep)
            return loss + q.batch_loss(statistics), (out.latents, out.codes, statistics)

        value, gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(z, own)
        return value, gradients, q.update(value[1][2])

    def arrays(tree):
        return jax.tree.leaves(eqx.filter(tree, eqx.is_array))

    names = sys.argv[2].split()
    for name in names or cases.CASES:
        q = cases.CASES[name].quantizer
        key = jax.random.key(0)
        z = jax.random.normal(key, (8, 16, q.input_dim), jnp.float32)
        keep = jax.random.bernoulli(key, 0.7, (8, 16))
        one = arrays(step(q, z, keep))
        z8, keep8 = jax.device_put((z, keep), rows)
        eight, again = arrays(step(q, z8, keep8)), arrays(step(q, z8, keep8))
        assert len(one) >= 3
        for a, b, c in zip(one, eight, again, strict=True):
            assert a.dtype == b.dtype, (name, a.dtype, b.dtype)
            assert a.dtype in (jnp.float32, jnp.int32), (name, a.dtype)
            atol = 2e-6 + 1e-5 * float(jnp.max(jnp.abs(a)))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=name)
            np.testing.assert_array_equal(b, c, err_msg=name)
    print("agree", *(names or cases.CASES))
"""
CASES = Path(__file__).with_name("test_properties.py")


@pytest.mark.heavy
def test_one_and_eight_devices_agree():
    """Outputs, gradients and the next quantizer, for every case of the property suite. Also in
    64-bit mode, which must change no dtype.
    """
    flags = "--xla_force_host_platform_device_count=8"
    out = run(
        ONE_AND_EIGHT_DEVICES,
        str(CASES),
        "",
        XLA_FLAGS=flags,
        JAX_ENABLE_X64="1",
        JAX_PLATFORMS="cpu",
    )
    done = out.split()
    assert done[0] == "agree"
    assert len(done) > 25


def test_types_are_checked_at_run_time_on_request():
    program = """
        import jax.numpy as jnp
        from elastictok.quantizers import FSQ

        try:
            FSQ((4, 4))(jnp.zeros((5, 2)), jnp.ones(6, bool))
        except Exception as error:
            print(type(error).__module__.split(".")[0])
    """
    assert run(program, ELASTICTOK_TYPECHECK="1").startswith(("jaxtyping", "beartype"))
