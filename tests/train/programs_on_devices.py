"""Run by test_program.py in a process with eight CPU devices: programs whose costs are known.

Prints one JSON object: for each program what `read_program` finds in it.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elastictok.train._program import read_program

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def shape(*sizes, spec=()):
    where = NamedSharding(MESH, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=where)


def found(run, *arguments, out=None):
    where = None if out is None else NamedSharding(MESH, PartitionSpec(*out))
    program = read_program(
        jax.jit(run, out_shardings=where).lower(*arguments).compile().as_text() or ""
    )
    return {
        "flops": program.flops,
        "traffic": program.traffic,
        "endless": program.endless,
        "collectives": [
            [x.kind, list(x.axes(MESH.shape)), x.size, x.times, x.sent] for x in program.collectives
        ],
    }


def mapped(run, in_specs, out_specs):
    return jax.shard_map(
        run, mesh=MESH, in_specs=in_specs, out_specs=out_specs, check_vma=False, axis_names={"b"}
    )


P = PartitionSpec
W = shape(64, 32, spec=("b",))


def layers(x, w):
    """Seven products, in a loop."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested(x, w):
    """Three times the same, in a loop around it."""
    return jax.lax.scan(lambda x, _: (layers(x, w), None), x, None, length=3)[0]


def ring(x):
    def hop(x, _):
        return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]) + 1, None

    return jax.lax.scan(hop, x, None, length=5)[0]


def while_positive(x):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x - 1, x)


PROGRAMS = {
    "all-gather": lambda: found(
        mapped(lambda x: jax.lax.all_gather(x, "b", tiled=True), P("b"), P()), W
    ),
    "all-reduce": lambda: found(mapped(lambda x: jax.lax.psum(x, "b"), P("b"), P()), W),
    "reduce-scatter": lambda: found(
        mapped(lambda x: jax.lax.psum_scatter(x, "b", tiled=True), P(), P("b")), shape(64, 32)
    ),
    "all-to-all": lambda: found(
        mapped(lambda x: jax.lax.all_to_all(x, "b", 1, 0, tiled=True), P("b"), P("b")), W
    ),
    "ring": lambda: found(mapped(ring, P("b"), P("b")), W),
    "both axes": lambda: found(lambda x: x.sum(0), shape(64, 32, spec=(("a", "b"),)), out=()),
    "layers": lambda: found(layers, shape(16, 64), shape(7, 64, 64)),
    "nested": lambda: found(nested, shape(16, 64), shape(7, 64, 64)),
    "while": lambda: found(while_positive, shape(8, 8)),
    "gradient": lambda: found(
        lambda x, w: jax.grad(lambda w: jnp.sum(layers(x, w) ** 2))(w),
        shape(16, 64, spec=("a",)),
        shape(7, 64, 64),
        out=(),
    ),
}


if __name__ == "__main__":
    assert jax.local_device_count() == 8
    print(json.dumps({name: run() for name, run in PROGRAMS.items()}))
