"""Run by test_kill.py, which kills it: trains into the folder given, saving often."""

import sys

import jax
from tiny_training import OPTIMIZER, Counted, tiny_model

from elastictok.models import ElasticTok
from elastictok.quantizers import GaussianVAE
from elastictok.train import AbstractTracker, data_mesh, fit


class Say(AbstractTracker):
    """Tells the parent process of every step."""

    def log(self, step, metrics):
        print(step, flush=True)

    def close(self):
        pass


def train(out: str, steps: int, every: int) -> ElasticTok:
    return fit(
        tiny_model(GaussianVAE(3)),
        Counted(),
        steps=steps,
        out=out,
        optimizer=OPTIMIZER,
        save_every=every,
        log_every=1,
        resume=True,
        trackers=[Say()],
        progress=False,
        mesh=data_mesh(jax.local_devices()[:1]),
    )


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py does
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
