import itertools

import jax
import pytest
from tiny_training import make_batch, tiny_model

from elastictok.models import FixedDrop
from elastictok.quantizers import GaussianVAE
from elastictok.train import AbstractTracker, fit


@pytest.mark.heavy
def test_one_batch_can_be_learnt_by_heart():
    """With the default optimizer and weights: three latents can hold a patch of one colour."""
    errors = []

    class Errors(AbstractTracker):
        def log(self, step, metrics):
            errors.append(metrics["mse"])

        def close(self):
            pass

    fit(
        tiny_model(GaussianVAE(3)),
        itertools.repeat(make_batch(0, examples=2 * jax.local_device_count())),
        steps=300,
        tail_drop=FixedDrop(4),
        log_every=1,
        trackers=[Errors()],
        progress=False,
    )
    assert errors[-1] < errors[0] / 300
