"""Run by test_devices.py in a process with eight CPU devices: losses and weights on one and on all.

Prints one JSON object: for each quantizer the losses of three steps and the weights' checksums.
"""

import json
import sys

import jax
import numpy as np
from tiny_training import OPTIMIZER, Counted, quantizers, tiny_model

from elastictok.train import AbstractTracker, DataError, data_mesh, fit


class Losses(AbstractTracker):
    def __init__(self):
        self.rows: list[dict[str, float]] = []

    def log(self, step, metrics):
        self.rows.append(dict(metrics))

    def close(self):
        pass


def run(name, devices):
    losses = Losses()
    model = fit(
        tiny_model(quantizers()[name]),
        Counted(examples=16),
        steps=3,
        log_every=1,
        optimizer=OPTIMIZER,
        trackers=[losses],
        progress=False,
        mesh=data_mesh(jax.local_devices()[:devices]),
    )
    assert all(x.devices() == {jax.local_devices()[0]} for x in jax.tree.leaves(model))
    weights = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(model)]
    return {
        "losses": [row["loss"] for row in losses.rows],
        "gradients": [row["gradient_norm"] for row in losses.rows],
        "weights": np.concatenate(weights).tolist(),
    }


def main(names):
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.local_device_count() == 8
    refused = ""
    try:
        fit(tiny_model(), Counted(examples=12), steps=1, progress=False)
    except DataError as error:
        refused = str(error)
    results = {name: [run(name, 1), run(name, 8)] for name in names}
    print(json.dumps({"refused": refused, "results": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
