"""Run by test_meshes.py in processes with eight CPU devices in all: the same ten steps on any mesh.

Prints one JSON object: the losses, the first step's gradient, what lies where, and how often the
step was compiled. With `--process I OF PORT`, as one of several processes.
"""

import argparse
import functools
import json
import sys

import equinox as eqx
import jax
import numpy as np
import optax
from tiny_training import Counted, quantizers, tiny_coordinates, tiny_model, tiny_registers

from elastictok.data import Batch
from elastictok.models import ElasticTok, InformationDrop, UniformDrop
from elastictok.train import (
    MSE,
    CompiledStep,
    adamw,
    data_share,
    make_mesh,
    parse_mesh,
    shardings,
    train_step,
)
from elastictok.train._devices import place
from elastictok.train._fit import _placed_state
from elastictok.train._sharding import execution_on

STEPS = 10
MODELS = {"registers": tiny_registers, "coordinates": tiny_coordinates}
POLICIES = {"uniform": UniformDrop(), "information": InformationDrop()}


def remember() -> optax.GradientTransformation:
    """Keeps the last gradient in its state, and passes it on."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: 0 * x, params),
        lambda updates, state, params=None: (updates, updates),
    )


def own_part(batch: Batch, mesh) -> Batch:
    """What this process brings of a batch that all know."""
    number, shares = data_share(mesh)
    rows = np.split(np.arange(len(batch.pixels)), shares)[number]
    return Batch(batch.pixels[rows], batch.segments[rows], batch.valid[rows])


def everything(tree) -> list[float]:
    """All numbers of a tree, wherever they are."""
    leaves = [
        np.asarray(jax.device_get(multihost(leaf)), np.float64).ravel()
        for leaf in jax.tree.leaves(tree)
    ]
    return np.concatenate(leaves).tolist()


def multihost(leaf):
    if leaf.is_fully_addressable:
        return leaf
    everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(leaf, everywhere).addressable_data(0)


def make(name: str) -> ElasticTok:
    """One of `MODELS`, or the usual one with the quantizer of that name."""
    if name in MODELS:
        return MODELS[name]()
    return tiny_model(quantizers()[name], heads=8, dim=32, context=4)


def run(name: str, axes: str, parts: str = "1", policy: str = "uniform") -> dict:
    sizes = parse_mesh(axes)
    count = int(np.prod(list(sizes.values())))
    devices = jax.devices()[:count]
    mesh = make_mesh(**sizes, devices=devices)
    execution = execution_on(mesh, None)
    optimizer = optax.chain(remember(), adamw(3e-3, weight_decay=0.1))
    state = _placed_state(make(name), optimizer, jax.random.key(0), mesh, None)
    batches = iter(Counted(examples=8, blocks=4))
    step = functools.partial(
        train_step,
        optimizer=optimizer,
        loss=MSE(),
        tail_drop=POLICIES[policy],
        quantizer_weight=0.5,
        accumulate=int(parts),
        execution=execution,
    )
    compiled, losses, gradient = None, [], None
    for _ in range(STEPS):
        batch = place(own_part(next(batches), mesh), mesh)
        if compiled is None:
            compiled = CompiledStep(step, state, batch, mesh=mesh)
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        if gradient is None:
            gradient = everything(state.opt_state[0])
    arrays = eqx.filter(state, eqx.is_array)
    where = jax.tree.leaves(shardings(arrays, mesh))
    return {
        "losses": losses,
        "gradient": gradient,
        "compilations": compiled.compilations,
        "in place": all(
            array.sharding.is_equivalent_to(sharding, array.ndim)
            for array, sharding in zip(jax.tree.leaves(arrays), where, strict=True)
        ),
        "largest part": max(
            leaf.addressable_data(0).size / leaf.size
            for leaf in jax.tree.leaves(state.model.encoder.transformer.layers.feed_forward)
        ),
        "collectives": [
            name
            for name in ("all-gather", "all-reduce", "collective-permute")
            if f" {name}" in compiled.compiled.as_text()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", help="QUANTIZER:AXES[:PARTS[:POLICY]]")
    parser.add_argument("--process", nargs=3, type=int)
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    if arguments.process:
        number, count, port = arguments.process
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    results = {}
    for name in arguments.runs:
        results[name] = run(*name.split(":"))
    if jax.process_index() == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
