"""What needs a process of its own: several devices, 64-bit mode, the run-time type gate."""

import os
import subprocess
import sys
import textwrap


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_and_eight_devices_agree():
    """Also in 64-bit mode, which must change no dtype."""
    program = """
        import equinox as eqx, jax, jax.numpy as jnp, numpy as np
        from elastictok.quantizers import LFQ, VQ

        assert len(jax.devices()) == 8 and jax.config.jax_enable_x64
        key = jax.random.key(0)
        z = jax.random.normal(key, (8, 16, 4), jnp.float32)
        keep = jax.random.bernoulli(key, 0.7, (8, 16))

        def total(q, z, keep):
            out = jax.vmap(q)(z, keep)
            return jax.tree.map(lambda s: s.sum(0), (out.loss, out.statistics))

        @eqx.filter_jit
        def step(q, z, keep):
            gradient = jax.grad(lambda x: q.batch_loss(total(q, x, keep)[1]))(z)
            loss, statistics = total(q, z, keep)
            return loss, q.update(statistics), gradient

        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        def arrays(tree):
            return jax.tree.leaves(eqx.filter(tree, eqx.is_array))

        for q in (VQ(32, 4, key=key), LFQ(4)):
            one = arrays(step(q, z, keep))
            z8, keep8 = jax.device_put((z, keep), rows)
            eight, again = arrays(step(q, z8, keep8)), arrays(step(q, z8, keep8))
            for a, b, c in zip(one, eight, again, strict=True):
                assert a.dtype == b.dtype == jnp.float32, (a.dtype, b.dtype)
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(b, c)
        print("agree")
    """
    flags = "--xla_force_host_platform_device_count=8"
    assert "agree" in run(program, XLA_FLAGS=flags, JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu")


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
