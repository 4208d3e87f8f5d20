"""The kernels compile for every TPU, at the lengths they are for, by the compiler that TPUs have.

No TPU is needed, only `libtpu` (the extra `aot`), and nothing is run: shown is that the kernels
lower, that vector and scalar memory suffice, how many calls there are and what a device must hold.
`pytest -m aot -rA` prints it.
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastictok.attention import (
    TPU_CHIPS,
    BlockCausal,
    Causal,
    Contiguous,
    Full,
    KeyValid,
    PallasTPU,
    Ring,
    Segments,
    SlidingBlocks,
    TileKey,
    ZigZag,
    attention,
    tile_sizes,
)

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason='needs the compiler for TPUs: pip install "elastictok[aot]"',
    ),
]

# The smallest piece of a machine that has them.
TOPOLOGIES = {
    "TPU v4": "v4:2x2x1",
    "TPU v5 lite": "v5e:2x2",
    "TPU v5": "v5p:2x2x1",
    "TPU v6 lite": "v6e:2x2",
    "TPU7x": "tpu7x:2x2x1",
}
LARGEST = 4096  # tokens per block, which have the largest tiles


@functools.cache
def devices(topology: str) -> tuple[jax.Device, ...]:
    # Read when libtpu is loaded. There is no TPU to ask, and the workers of pytest-xdist each load
    # it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def one(chip: str) -> Mesh:
    device = devices(TOPOLOGIES[chip])[0]
    assert device.device_kind == chip
    return Mesh(np.array([device]), ("sequence",))


def shape(mesh: Mesh, size: tuple[int, ...], dtype, *spec) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)


def documents(mesh: Mesh, tokens: int, batch: tuple[int, ...] = ()) -> tuple:
    """An offset, labels and validity."""
    return (
        shape(mesh, batch, jnp.int32),
        shape(mesh, (*batch, tokens), jnp.int32),
        shape(mesh, (*batch, tokens), jnp.bool_),
    )


def packed(block: int):
    def mask(at, ids, valid):
        return BlockCausal(block, at) & Segments(ids) & KeyValid(valid)

    return mask


def forward(implementation, mask):
    def run(q, k, v, *facts):
        return attention(q, k, v, mask(*facts), implementation=implementation)

    return run


def forward_and_backward(implementation, mask):
    def run(q, k, v, d_out, *facts):
        out, pull = jax.vjp(lambda *qkv: forward(implementation, mask)(*qkv, *facts), q, k, v)
        return out, pull(d_out)

    return run


class Compiled:
    """What the compiler says of a function."""

    def __init__(self, said: str, mesh: Mesh, run, *arguments):
        with jax.set_mesh(mesh):
            lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",))
            chip = pltpu.get_tpu_info()
            compiled = lowered.compile()
        self.text = compiled.as_text()
        self.calls = self.text.count('custom_call_target="tpu_custom_call"')
        memory, capacity = compiled.memory_analysis(), chip.num_cores * chip.hbm_capacity_bytes
        sizes = (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
        )
        self.fits = sum(sizes) <= capacity
        arguments_, outputs, temporaries = (f"{size / 2**20:.0f}" for size in sizes)
        print(
            f"{said}: {self.calls} calls, MB per device: {arguments_} arguments, "
            f"{outputs} outputs, {temporaries} temporaries, of {capacity / 2**20:.0f}"
        )


def long(chip: str, tokens: int, block: int) -> Compiled:
    mesh = one(chip)
    x = shape(mesh, (tokens, 8, 128), jnp.bfloat16)
    run = forward_and_backward(PallasTPU(chip=chip), packed(block))
    said = f"{chip}, {tokens} tokens, block {block}"
    return Compiled(said, mesh, run, x, x, x, x, *documents(mesh, tokens))


def test_every_chip_with_tiles_of_its_own_is_compiled_for():
    assert set(TOPOLOGIES) == set(TPU_CHIPS)


@pytest.mark.parametrize("block", [2048, 4096])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_16384_tokens(chip, block):
    compiled = long(chip, 16384, block)
    assert compiled.calls == 3
    assert compiled.fits


@pytest.mark.parametrize("chip", ["TPU v4", "TPU v5 lite"])
def test_131072_tokens(chip):
    compiled = long(chip, 131072, 4096)
    assert compiled.calls == 3
    assert compiled.fits


@pytest.mark.parametrize(
    ("topology", "layout"),
    [("v5e:4x4", ZigZag()), ("v4:4x4x4", ZigZag()), ("v4:4x4x4", Contiguous())],
    ids=["v5e-zig-zag", "v4-zig-zag", "v4-contiguous"],
)
def test_a_ring_of_a_million_tokens(topology, layout):
    tokens = 2**20
    mesh = Mesh(np.array(devices(topology)), ("sequence",))
    chip = devices(topology)[0].device_kind
    x = shape(mesh, (tokens, 8, 128), jnp.bfloat16, "sequence")
    run = forward_and_backward(Ring("sequence", layout, PallasTPU(chip=chip)), packed(4096))
    said = f"{mesh.size} x {chip}, {tokens} tokens, {type(layout).__name__}"
    compiled = Compiled(said, mesh, run, x, x, x, x, *documents(mesh, tokens))
    assert compiled.calls == 3  # in the loops over the hops
    assert compiled.fits
    # What travels does so beside the kernels: keys and values, and their gradients going back.
    travels = re.findall(r"= \((\w+)\[[\d,]*\].* collective-permute-start\(", compiled.text)
    assert {"bf16", "f32"} <= set(travels), travels
    assert not re.search(r" collective-permute\(", compiled.text)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_largest_tiles_fit_whatever_the_type_and_head_dim(chip, dtype, head_dim):
    mesh, name = one(chip), jnp.dtype(dtype).name
    tiles = tile_sizes(TileKey("pallas_tpu", chip, name, head_dim, LARGEST)).tiles
    tokens = 2 * tiles.forward.queries + 40
    q, kv = (shape(mesh, (tokens, heads, head_dim), dtype) for heads in (4, 2))
    run = forward_and_backward(PallasTPU(chip=chip), lambda: BlockCausal(LARGEST))
    said = f"{chip}, {name}, head_dim {head_dim}, tiles of {tiles.forward.queries}"
    assert Compiled(said, mesh, run, q, kv, kv, q).calls == 3


MASKS = {
    "full": lambda at, ids, valid: Full(),
    "causal": lambda at, ids, valid: Causal(at),
    "block-causal": lambda at, ids, valid: BlockCausal(100, at),
    "sliding": lambda at, ids, valid: SlidingBlocks(100, 3, at),
    "segments": lambda at, ids, valid: Segments(ids),
    "valid": lambda at, ids, valid: KeyValid(valid),
    "all": lambda at, ids, valid: (
        SlidingBlocks(100, 3, at) & Causal(at) & Segments(ids) & KeyValid(valid)
    ),
}


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask):
    chip, tokens = "TPU v5 lite", 700
    mesh = one(chip)
    x = shape(mesh, (tokens, 2, 64), jnp.bfloat16)
    run = forward_and_backward(PallasTPU(chip=chip), MASKS[mask])
    assert Compiled(mask, mesh, run, x, x, x, x, *documents(mesh, tokens)).calls == 3


@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_block_of_queries_meets_a_cache(batch):
    """In a batch every example stands elsewhere in its cache."""
    chip, queries, keys = "TPU v5 lite", 4096, 131072
    mesh = one(chip)
    q, kv = (shape(mesh, (*batch, n, 8, 128), jnp.bfloat16) for n in (queries, keys))
    at, ids, valid = documents(mesh, keys, batch)
    q_ids = documents(mesh, queries, batch)[1]

    def mask(at, q_ids, k_ids, valid):
        return BlockCausal(4096, at) & Segments(q_ids, k_ids) & KeyValid(valid)

    run = forward(PallasTPU(chip=chip), mask)
    run = jax.vmap(run) if batch else run
    compiled = Compiled(f"cache, batch {batch}", mesh, run, q, kv, kv, at, q_ids, ids, valid)
    assert compiled.calls == 1
    assert compiled.fits
