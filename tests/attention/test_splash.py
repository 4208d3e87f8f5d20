"""A second opinion: jax's own splash attention, which others wrote and run on TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from elastictok.attention import (
    BlockCausal,
    PallasTPU,
    Segments,
    TileSizes,
    TPUTileSizes,
    attention,
)

pytestmark = pytest.mark.skipif(
    not hasattr(masks, "_ComputableMask"),
    reason="this jax has no splash_attention_mask._ComputableMask, which is private",
)
HEADS, HEAD_DIM = 2, 64
KERNELS = PallasTPU(tiles=TPUTileSizes(*[TileSizes(128, 128)] * 3), interpret=True)


def splash_mask(queries: int, keys: int, block: int, offset: int):
    class BlockCausalMask(masks._ComputableMask):
        def __init__(self):
            def seen(q, k):
                return (q + offset) // block >= k // block

            super().__init__(shape=(queries, keys), mask_function=seen)

        def __eq__(self, other):
            return type(self) is type(other) and self.shape == other.shape

        def __hash__(self):
            return hash((type(self), self.shape))

    return BlockCausalMask()


def theirs(queries: int, keys: int, block: int, offset: int):
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([splash_mask(queries, keys, block, offset)] * HEADS),
        block_sizes=splash.BlockSizes.get_default(),  # of 128
        head_shards=1,
        q_seq_shards=1,
        interpret=True,
    )

    def run(q, k, v, q_ids, k_ids):
        heads_first = (x.swapaxes(0, 1) for x in (q * HEAD_DIM**-0.5, k, v))
        return kernel(*heads_first, splash.SegmentIds(q_ids, k_ids)).swapaxes(0, 1)

    return run


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(run, qkv, d_out, q_ids, k_ids):
    out, pull = jax.vjp(lambda *qkv: run(*qkv, q_ids, k_ids), *qkv)
    return out, *pull(d_out)


@pytest.mark.parametrize(
    ("queries", "keys", "block", "offset"),
    [
        pytest.param(384, 384, 128, 0, marks=pytest.mark.heavy),
        (256, 256, 100, 0),
        (128, 384, 64, 192),
    ],
    ids=["block of a tile", "block of no tile", "cache"],
)
def test_the_output_and_the_gradients_are_those_of_splash(queries, keys, block, offset):
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(queries, HEADS, HEAD_DIM)), jnp.float32) for _ in "qd")
    k, v = (jnp.asarray(rng.normal(size=(keys, HEADS, HEAD_DIM)), jnp.float32) for _ in "kv")
    k_ids = jnp.arange(keys, dtype=jnp.int32) // 170  # of several documents, cutting tiles
    q_ids = k_ids[offset : offset + queries]

    def ours(implementation, q, k, v, q_ids, k_ids):
        mask = BlockCausal(block, offset) & Segments(q_ids, k_ids)
        return attention(q, k, v, mask, implementation=implementation)

    inputs = ((q, k, v), d_out, q_ids, k_ids)
    second = with_gradient(theirs(queries, keys, block, offset), *inputs)
    for implementation in ("reference", KERNELS):
        first = with_gradient(functools.partial(ours, implementation), *inputs)
        for mine, other in zip(first, second, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5)
