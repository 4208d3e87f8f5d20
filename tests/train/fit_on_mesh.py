"""Run by test_resuming_on_meshes.py, with more than one device or process: `fit` into a folder.

Prints one JSON object from the first process: the weights, and the losses of metrics.jsonl.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
from on_meshes import own_part
from tiny_training import OPTIMIZER, Counted, CountedIterator, make_batch, quantizers, tiny_model

from elastictok.train import Average, fit, make_mesh, parse_mesh


class Shared(Counted):
    """This process's part of batches that all know; its iterator's state is their number."""

    def __init__(self, mesh, interrupt: int | None):
        super().__init__(examples=8, blocks=4)
        self.mesh = mesh
        self.interrupt = interrupt

    def __iter__(self):
        outer = self

        class Iterator(CountedIterator):
            def __next__(self):
                self._state["next"] += 1
                number = self._state["next"]
                if number == outer.interrupt:
                    os.kill(os.getpid(), signal.SIGTERM)
                return own_part(make_batch(number, examples=8, blocks=4), outer.mesh)

        return Iterator(self)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("axes")
    parser.add_argument("steps", type=int)
    parser.add_argument("--process", nargs=3, type=int)
    parser.add_argument("--interrupt", nargs=2, type=int, help="PROCESS BATCH")
    arguments = parser.parse_args()
    jax.config.update("jax_disable_most_optimizations", True)
    if arguments.process:
        number, count, port = arguments.process
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    axes = parse_mesh(arguments.axes)
    mesh = make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    process, batch = arguments.interrupt or (None, None)
    model = fit(
        tiny_model(quantizers()["GaussianVAE"], heads=8, dim=32, context=4),
        Shared(mesh, batch if process == jax.process_index() else None),
        steps=arguments.steps,
        out=arguments.out,
        optimizer=OPTIMIZER,
        quantizer_weight=0.5,
        average=Average(0.9),
        save_every=2,
        log_every=1,
        resume=True,
        mesh=mesh,
        progress=False,
    )
    if jax.process_index() == 0:
        weights = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(model)]
        lines = (arguments.out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        print(
            json.dumps(
                {
                    "weights": np.concatenate(weights).tolist(),
                    "losses": [(row["step"], row["loss"]) for row in rows],
                }
            )
        )


if __name__ == "__main__":
    main()
