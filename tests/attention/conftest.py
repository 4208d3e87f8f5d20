"""Every test with a `backend` argument runs once for each registered backend: also for one that
another package, or this file, registers.
"""

import equinox as eqx
import jax.numpy as jnp
import pytest

from elastictok.attention import (
    XLA,
    AbstractBackend,
    PallasTPU,
    TileSizes,
    TPUTileSizes,
    XLATileSizes,
    backends,
    register,
)
from elastictok.attention._registry import _BACKENDS


class Loop(AbstractBackend):
    """What a third party might register: one head after the other, up to head_dim 64."""

    name: str = eqx.field(static=True, default="loop-over-heads")

    def reasons_against(self, q, k, v, mask):
        return [f"head_dim is {q.shape[2]}, above 64"] if q.shape[2] > 64 else []

    def __call__(self, q, k, v, mask, *, scale):
        group = q.shape[1] // k.shape[1]
        seen = mask.dense(q.shape[0], k.shape[0])
        outs = []
        for head in range(q.shape[1]):
            query, key, value = (
                x[:, at].astype(jnp.float32)
                for x, at in ((q, head), (k, head // group), (v, head // group))
            )
            scores = jnp.where(seen, query @ key.T * scale, -1e30)
            weights = jnp.where(seen, jnp.exp(scores - scores.max(axis=1, keepdims=True)), 0)
            outs.append(weights @ value / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30))
        return jnp.stack(outs, axis=1).astype(q.dtype)


register(Loop())
# Tiles so small that a hundred tokens make several, and unequal, so that they cannot be mixed up.
register(XLA(XLATileSizes(TileSizes(32, 24), TileSizes(40, 24)), name="xla-small-tiles"))
# The kernels for TPUs in Pallas' interpreter. It takes any tile; a TPU wants multiples of 128.
PALLAS_TILES = TPUTileSizes(TileSizes(32, 24), TileSizes(24, 40), TileSizes(40, 32))
register(PallasTPU(tiles=PALLAS_TILES, interpret=True, name="pallas-tpu-interpreted"))
# Pallas' interpreter compiles for seconds what others compile in half a second: the plain run asks
# it the first questions only, and .ci/run all of them.
SLOW = {"pallas-tpu-interpreted"}
SLOW_ONES_TOO = {
    "test_value_and_gradient_are_the_references",
    "test_rows_that_see_nothing_are_zero_with_zero_gradient",
    "test_a_nan_that_is_seen_is_not_hidden",
    "test_vmap_is_a_loop_whatever_the_batch_shares",
    "test_what_is_not_seen_changes_nothing",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        specialists = {name for name, each in _BACKENDS.items() if each.is_specialist()}
        able = {name for name, reasons in backends().items() if not reasons}
        plain = metafunc.function.__name__ in SLOW_ONES_TOO
        metafunc.parametrize(
            "backend",
            [
                pytest.param(name, marks=[pytest.mark.heavy] * (name in SLOW and not plain))
                for name in _BACKENDS
                if name in able - specialists
            ],
        )
