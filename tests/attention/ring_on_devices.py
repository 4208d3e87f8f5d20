"""Ring attention on eight devices of one process against the reference: prints what it found.

Run by test_ring.py in a process of its own, since the number of devices is chosen at start. With
the argument `pallas`, only whether the kernels for TPUs do for the hops.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elastictok.attention import (
    XLA,
    BlockCausal,
    Contiguous,
    KeyValid,
    PallasTPU,
    Ring,
    Segments,
    SlidingBlocks,
    TileSizes,
    TPUTileSizes,
    XLATileSizes,
    ZigZag,
    attention,
)

LENGTH, HEADS, KV_HEADS, WIDTH = 256, 4, 2, 16
SMALL = TileSizes(16, 16)
INNER = {
    "xla": XLA(XLATileSizes(SMALL, SMALL)),
    "pallas": PallasTPU(tiles=TPUTileSizes(SMALL, SMALL, SMALL), interpret=True),
}
LAYOUTS = {"contiguous": Contiguous(), "zig-zag": ZigZag()}


def arrays(*batch, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(LENGTH, HEADS, WIDTH)] * 2 + [(LENGTH, KV_HEADS, WIDTH)] * 2
    return [jnp.asarray(rng.normal(size=(*batch, *shape)), dtype) for shape in shapes]


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def with_gradient(implementation):
    def run(q, d_out, k, v, mask):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, implementation=implementation), q, k, v)
        return out, pull(d_out)

    return run


def error(ours, theirs) -> float:
    """The largest difference, as a share of the largest value: output and gradients apart."""

    def of(a, b):
        a, b = ([np.asarray(x, np.float64) for x in jax.tree.leaves(y)] for y in (a, b))
        assert all(np.isfinite(x).all() for x in a)
        largest = max(np.abs(x).max() for x in b)
        return max(np.abs(x - y).max() for x, y in zip(a, b, strict=True)) / largest

    return max(of(ours[0], theirs[0]), of(ours[1], theirs[1]))


PACKED = np.arange(LENGTH) // 90 * 3 % 5
MASKS = {
    "packed": BlockCausal(16) & Segments(PACKED) & KeyValid(np.arange(LENGTH) < 240),
    # A third of the queries see nothing at all, and some devices have nothing to do.
    "sliding": SlidingBlocks(16, 2, offset=16) & KeyValid(np.arange(LENGTH) >= 96),
}


def both_layouts(inner_name: str) -> dict[str, float]:
    mesh, found, inner = mesh_of(sequence=8), {}, INNER[inner_name]
    args = arrays()
    for mask_name, mask in MASKS.items():
        theirs = jax.jit(with_gradient("reference"))(*args, mask)
        for name, layout in LAYOUTS.items():
            order = layout.order(8, LENGTH)
            back = np.argsort(order)
            laid_out = [x[order] for x in args]
            ring = Ring("sequence", layout, inner)
            with jax.set_mesh(mesh):
                ours = jax.jit(with_gradient(ring))(*laid_out, mask)
            ours = jax.tree.map(lambda x, back=back: x[back], ours)
            found[f"{mask_name} {name}"] = error(ours, theirs)
    return found


def inside_a_shard_map() -> float:
    spec, args = PartitionSpec("sequence"), arrays()
    order = ZigZag().order(8, LENGTH)
    ring = Ring("sequence", ZigZag(), INNER["xla"])
    split = jax.shard_map(
        with_gradient(ring),
        mesh=mesh_of(sequence=8),
        in_specs=(spec,) * 4 + (PartitionSpec(),),
        out_specs=spec,
        check_vma=False,
    )
    ours = jax.jit(split)(*(x[order] for x in args), MASKS["packed"])
    ours = jax.tree.map(lambda x: x[np.argsort(order)], ours)
    return error(ours, jax.jit(with_gradient("reference"))(*args, MASKS["packed"]))


def batch_over_a_mesh() -> dict[str, object]:
    """vmap with `spmd_axis_name`: each device works on its part of batch, sequence and heads."""
    mesh = mesh_of(data=2, sequence=2, tensor=2)
    ring = Ring("sequence", ZigZag(), INNER["xla"], heads="tensor")
    args = arrays(4)
    ids = jnp.stack([jnp.asarray(PACKED + i) // (i + 1) for i in range(4)])
    order = ZigZag().order(2, LENGTH)

    def batched(implementation):
        def one(q, d_out, k, v, ids):
            mask = BlockCausal(16) & Segments(ids)
            return with_gradient(implementation)(q, d_out, k, v, mask)

        return one

    theirs = jax.jit(jax.vmap(batched("reference")))(*args, ids)
    spec = NamedSharding(mesh, PartitionSpec("data", "sequence", "tensor"))
    laid_out = [jax.device_put(x[:, order], spec) for x in args]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.vmap(batched(ring), spmd_axis_name="data"))
        ours = run(*laid_out, ids)
        lowered = run.lower(*laid_out, ids).compile().as_text()
    specs = {str(x.sharding.spec) for x in jax.tree.leaves(ours)}
    ours = jax.tree.map(lambda x: x[:, np.argsort(order)], ours)
    return {
        "error": error(ours, theirs),
        "specs": sorted(specs),
        "gathers of the batch": lowered.count("all-gather("),
    }


def explicit_axes() -> dict[str, object]:
    """A mesh as `jax.make_mesh` makes it: arrays carry their sharding, and `vmap` keeps it."""
    mesh = jax.make_mesh((2, 4), ("data", "sequence"))
    q, _, k, v = arrays(2)
    ring = Ring("sequence", inner=INNER["xla"])
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def loss(implementation):
        def one(q, k, v):
            return jnp.sin(attention(q, k, v, BlockCausal(16), implementation=implementation)).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(one, (0, 1, 2))))

    theirs = loss("reference")(q, k, v)
    with jax.set_mesh(mesh):
        ours = loss(ring)(*(jax.device_put(x, sharding) for x in (q, k, v)))
    specs = {str(x.sharding.spec) for x in ours[1]}
    return {"error": error(jax.device_get(ours), theirs), "specs": sorted(specs)}


def halves() -> float:
    args = arrays(dtype=jnp.bfloat16)
    with jax.set_mesh(mesh_of(sequence=8)):
        ours = jax.jit(with_gradient(Ring("sequence", inner=INNER["xla"])))(*args, MASKS["packed"])
    exact = [x.astype(jnp.float32) for x in args]
    return error(ours, jax.jit(with_gradient("reference"))(*exact, MASKS["packed"]))


def queries_of_one_block_and_a_sharded_cache() -> float:
    """The next block of a stream: few queries, keys spread over the devices, an offset."""
    q, d_out, k, v = arrays()
    q, d_out = q[:16], d_out[:16]
    mask = BlockCausal(16, offset=jnp.int32(160)) & KeyValid(jnp.arange(LENGTH) < 176)
    with jax.set_mesh(mesh_of(sequence=8)):
        ours = jax.jit(with_gradient(Ring("sequence", inner=INNER["xla"])))(q, d_out, k, v, mask)
    return error(ours, jax.jit(with_gradient("reference"))(q, d_out, k, v, mask))


def refusals() -> dict[str, str]:
    found = {}

    def refused(name, ring, mask=MASKS["packed"], cut=LENGTH):
        q, _, k, v = (x[:cut] for x in arrays())
        try:
            attention(q, k, v, mask, implementation=ring)
        except (RuntimeError, ValueError) as problem:
            found[name] = f"{type(problem).__name__}: {problem}"

    refused("no mesh", Ring("sequence"))
    with jax.set_mesh(mesh_of(sequence=8)):
        refused("no axis", Ring("time"))
        refused("indivisible", Ring("sequence"), mask=BlockCausal(16), cut=250)
        refused("odd", Ring("sequence", ZigZag()), mask=BlockCausal(16), cut=248)
        refused("mask", Ring("sequence"), mask=KeyValid(np.ones(LENGTH // 8, bool)))
        refused("inner", Ring("sequence", inner=PallasTPU()))
    with jax.set_mesh(mesh_of(sequence=1, tensor=8)):
        refused("heads", Ring("sequence", heads="tensor"))
    return found


if __name__ == "__main__":
    assert jax.device_count() == 8
    if sys.argv[1:] == ["pallas"]:
        print(json.dumps(both_layouts("pallas"), default=float))
        sys.exit()
    report = {
        "both layouts": both_layouts("xla"),
        "inside": inside_a_shard_map(),
        "batch": batch_over_a_mesh(),
        "explicit": explicit_axes(),
        "halves": halves(),
        "cache": queries_of_one_block_and_a_sharded_cache(),
        "refusals": refusals(),
    }
    print(json.dumps(report, default=float))
