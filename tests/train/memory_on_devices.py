"""Run by test_plan.py in a process of its own: what a step was planned to need, and what it took.

Takes a mesh, such as `data=2,fsdp=2`, and prints one JSON object. All devices are in this process:
its resident memory is that of all of them.
"""

import ctypes
import functools
import gc
import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

from elastictok.models import Local, Patching, RankRotary, Raster, UniformDrop, presets
from elastictok.quantizers import FSQ
from elastictok.train import (
    MSE,
    CompiledStep,
    DeviceBatch,
    Sharded,
    adamw,
    default_quantizer_weight,
    init_state,
    make_mesh,
    parse_mesh,
    plan,
    shardings,
    train_step,
)
from elastictok.train._sharding import pixels_spec

OPTIMIZER = adamw(1e-3)
EXAMPLES = 8


def make():
    """11 million parameters, so that what the optimizer keeps counts as well."""
    return presets.build(
        size=(128, 128),
        context=2,
        frames_per_block=4,
        min_tokens=8,
        patching=Patching(4, 8, 8),
        order=Raster(),
        quantizer=FSQ((8, 8, 8)),
        dim=512,
        hidden=1024,
        layers=2,
        heads=4,
        rotary=RankRotary(1e4),
        key=jax.random.key(0),
    )


def resident(which: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(which + ":"))
    return int(line.split()[1]) * 1024


def tidy() -> None:
    """Gives what is free back to the system, so that it is not taken from there."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(text: str) -> None:
    mesh = make_mesh(**parse_mesh(text))
    model = eqx.filter_eval_shape(make)
    planned = plan(model, mesh, batch_size=EXAMPLES, optimizer=OPTIMIZER)

    def start():
        state = init_state(make(), OPTIMIZER, jax.random.key(0))
        front = (EXAMPLES, model.context)
        pixels = jax.random.bits(
            jax.random.key(1), (*front, model.frames_per_block, *model.size, 3), jnp.uint8
        )
        batch = DeviceBatch(pixels, jnp.ones(front, jnp.int32), jnp.ones(front, bool))
        return eqx.filter(state, eqx.is_array), batch

    shapes = eqx.filter_eval_shape(start)
    static = eqx.filter(
        eqx.filter_eval_shape(lambda: init_state(make(), OPTIMIZER, jax.random.key(0))),
        lambda leaf: not isinstance(leaf, jax.ShapeDtypeStruct),
    )
    split = jax.sharding.NamedSharding(mesh, pixels_spec(shapes[1].pixels.shape, mesh))
    where = shardings(shapes[0], mesh), jax.tree.map(lambda _: split, shapes[1])
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    step = CompiledStep(
        functools.partial(
            train_step,
            optimizer=OPTIMIZER,
            loss=MSE(),
            tail_drop=UniformDrop(),
            quantizer_weight=default_quantizer_weight(model),
            execution=Local() if mesh.size == 1 else Sharded(mesh=mesh),
        ),
        eqx.combine(placed[0], static),
        placed[1],
        mesh=mesh,
    )
    begin = jax.jit(start, out_shardings=where).lower().compile()
    tidy()
    before = resident("VmRSS")
    arrays, batch = begin()
    jax.block_until_ready((arrays, batch))
    tidy()
    given = resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    state, metrics = step(eqx.combine(arrays, static), batch)
    jax.block_until_ready((state, metrics))
    took = resident("VmHWM") - before
    print(json.dumps({"planned": mesh.size * planned.total, "took": took, "given": given}))


if __name__ == "__main__":
    main(sys.argv[1])
