"""The training loop with quantizers and decoders that it was not written for."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import OPTIMIZER, make_batch, tiny_coordinates, tiny_model

from elastictok.models import FixedDrop, trainable
from elastictok.quantizers import (
    BSQ,
    FSQ,
    VQ,
    Gradient,
    Grouped,
    Identity,
    KMeansStart,
    Projected,
    Residual,
    RotationTrick,
    SimVQ,
)
from elastictok.train import MSE, CompiledStep, Perceptual, Sum, data_mesh, init_state
from elastictok.train._devices import place, replicated
from elastictok.train._step import train_step

MESH = data_mesh(jax.local_devices()[:1])
KEY = jax.random.key(3)
QUANTIZERS = {
    "vq_gradient": VQ(17, 3, key=KEY, book=Gradient(), start=KMeansStart(steps=3)),
    "vq_cosine": VQ(17, 3, key=KEY, cosine=True, estimator=RotationTrick()),
    "simvq": SimVQ(17, 3, key=KEY),
    "bsq": BSQ(6),
    "grouped": Grouped(Residual(VQ(9, 2, key=KEY), 2), 3),
    "projected": Projected(8, FSQ((5, 5, 5)), 8, key=KEY),
    "identity": Identity(3),
}
STEPS = 60
# What the reconstruction's error falls by in so many steps.
FACTOR = 1.5


def steps(model, loss=None, count=STEPS, weight=0.1):
    state = init_state(model, OPTIMIZER, jax.random.key(0))
    state = jax.device_put(state, replicated(MESH))
    batch = place(make_batch(0), MESH)

    def step(state, batch):
        return train_step(
            state,
            batch,
            optimizer=OPTIMIZER,
            loss=MSE() if loss is None else loss,
            tail_drop=FixedDrop(4),
            quantizer_weight=weight,
        )

    compiled = CompiledStep(step, state, batch, mesh=MESH)
    losses = []
    for _ in range(count):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["mse"]))
    return state.model, losses


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("simvq", "grouped") else pytest.mark.heavy)
        for name in QUANTIZERS
    ],
)
def test_every_quantizer_trains(name):
    model = tiny_model(QUANTIZERS[name])
    trained, losses = steps(model)
    assert np.isfinite(losses).all()
    assert losses[0] / np.min(losses[-5:]) > FACTOR, losses[:: STEPS // 6]
    before, after = eqx.filter((model, trained), eqx.is_array)
    marks = trainable(model)
    for path, old in jax.tree_util.tree_leaves_with_path(before.quantizer):
        new = dict(jax.tree_util.tree_leaves_with_path(after.quantizer))[path]
        trained_here = dict(jax.tree_util.tree_leaves_with_path(marks.quantizer))[path]
        if trained_here:
            assert not np.array_equal(old, new), path
    if name == "simvq":
        np.testing.assert_array_equal(after.quantizer.base, before.quantizer.base)
    if name == "vq_gradient":
        assert after.quantizer.started == 3


def test_patches_asked_for_are_learnt_too():
    model = tiny_coordinates()
    _, losses = steps(model, weight=1e-6)
    assert np.mean(losses[:5]) / np.mean(losses[-5:]) > 2


def test_a_loss_of_whole_frames_has_no_use_for_single_patches():
    loss = Sum((1.0, MSE()), (0.1, Perceptual(lambda a, b: jnp.mean(jnp.abs(a - b)))))
    with pytest.raises(ValueError, match="looks at whole frames and the model's decoder"):
        steps(tiny_coordinates(), loss, 1)
